"""From a folder of one's own: a model, rows, a method and a probe, by the installed package, in thirty lines of one's own text."""

import csv
import json
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from clbench.models.tiny import fresh_llama, word_tokenizer
from tests.conftest import QUIET
from tests.test_methods import TINY
from tests.test_run import LINEAR

FILES = {
    "mine/shrink.py": """\
from dataclasses import dataclass
from baselines.seq import Seq

@dataclass(kw_only=True)
class Shrink(Seq):
    strength: float
    def correct_gradients(self, engine):
        for tensor in engine.tensors():
            tensor.grad += self.strength * tensor.value
        return 0.0
""",
    "conf/method/shrink.yaml": """\
# @package _global_
defaults: [seq]
method: {_target_: mine.shrink.Shrink, name: shrink, strength: 0.01}
""",
    "conf/task/sport.yaml": """\
_target_: tasks.rows.Rows
rows: sport.jsonl
prompt: "{text} sport ?"
answer: label
choices: ["no", "yes"]
""",
    "mine/colours.py": """\
from clbench.examine.scores import mean, scores
from clbench.protocols import Probe

class Colours(Probe):
    def __init__(self, name):
        self.name = name
    def measure(self, student, stream, stage):
        found = student.log_likelihoods([((0,), (place,)) for place in (5, 6)])
        rows = {"log_p": mean([value for value, _ in found])}
        yield from scores(rows, stream=stream, stage=stage, probe=self.name, task="own", seconds=0.0)
""",
    "conf/probe/colours.yaml": """\
probes:
  stream: {_target_: clbench.examine.matrix.Matrix}
  colours: {_target_: mine.colours.Colours}
""",
}


def write_model(folder: Path, *, asked: str) -> None:
    """An untrained model of the words of `write_rows` and of the question that is asked of them."""
    tokenizer = word_tokenizer(["no", "yes", *asked.split(), *(f"w{number}" for number in range(40))])
    fresh_llama(tokenizer, architecture=TINY, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path) -> None:
    """120 rows with a text and a label."""
    rows = [
        {"text": f"w{number % 40} w{number % 7}", "label": ("no", "yes")[number % 40 > 19]} for number in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder outside the checkout that holds what a user has, and files that must hide no package of their name."""
    write_model(tmp_path / "model", asked="sport ?")
    write_rows(tmp_path / "sport.jsonl")
    (tmp_path / "mine-0.3.dist-info").mkdir()
    (tmp_path / "mine-0.3.dist-info" / "METADATA").write_text("Name: mine\nVersion: 0.3\n")
    for name in ("tasks.py", "datasets.py"):
        (tmp_path / name).write_text("raise RuntimeError('not this one')\n")
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


OWN = ("model.name=model", "stream.tasks=[sport]", "stream.name=sport", "method=shrink", "probe=colours")
QUICK = ("train.steps=2", "train.batch_size=4", "train.max_length=32", "engine.threads=1", "cache_dir=cache")
RUN = ("python", "-m", "clbench", "--config-dir", "conf", *OWN, *QUICK)


def shell(folder: Path, *words: object, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What a line in the user's shell does, there; with what is installed in `site`, if not with this checkout."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(site)} if site else {}
    command = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(" ".join(f"'{word}'" for word in words), shell=True, **command)


@pytest.mark.parametrize("of", ["checkout", pytest.param("wheel", marks=pytest.mark.slow)])
def test_a_model_rows_a_method_and_a_probe_of_ones_own_give_a_ranked_row(of, folder, request):
    typed = partial(shell, folder, site=request.getfixturevalue("site") if of == "wheel" else None)
    lines = [line for text in FILES.values() for line in text.splitlines() if line]
    assert len(lines) <= 30
    answer = typed(*RUN)
    assert answer.returncode == 0, answer.stderr
    assert f"adapters are on {LINEAR}\n" in answer.stderr
    (row,) = csv.DictReader((folder / "results" / "leaderboard.csv").open())
    assert (row["stream"], row["model"], row["method"]) == ("sport", "model", "shrink")
    assert 0 <= float(row["average_accuracy"]) <= 1
    (path,) = (folder / "results" / "runs").iterdir()
    manifest = json.loads((path / "manifest.json").read_text())
    assert of == "checkout" or manifest["git"]["commit"] == "unknown"
    assert {*manifest["config"]["sources"]} == {"mine.shrink", "mine.colours"}
    assert manifest["versions"]["mine"] == "0.3" and "clbench" in manifest["versions"]
    assert '"probe": "colours"' in (path / "scores.jsonl").read_text()
    assert manifest["command"].startswith("python -m clbench --config-dir conf ")
    # The recorded command pastes back, and leaves it alone; other code is another run.
    assert "has been completed already" in typed(*shlex.split(manifest["command"])).stderr
    (folder / "mine" / "shrink.py").write_text(FILES["mine/shrink.py"].replace("+=", "-="))
    assert typed(*RUN).returncode == 0
    assert len([*(folder / "results" / "runs").iterdir()]) == 2


def test_the_doctor_reads_no_file_named_as_a_package(folder):
    answer = shell(folder, "python", "-m", "clbench.doctor", "methods")
    assert answer.returncode == 0 and "Methods" in answer.stdout, answer.stderr


@pytest.mark.slow
def test_such_runs_are_examined_compared_and_exported_from_there(folder):
    for seed in (0, 1):
        assert shell(folder, *RUN, "train.checkpoint=all", f"seed={seed}").returncode == 0
    paths = sorted((folder / "results" / "runs").iterdir())
    asked = ("probe=colours", "~probe.probes.stream", "--config-dir", "conf")
    for path in paths:
        answer = shell(folder, "python", "-m", "clbench.examine", path, *asked)
        assert answer.returncode == 0, answer.stderr
    (file,) = (paths[0] / "examined").iterdir()
    answer = shell(folder, "python", "-m", "clbench.compare", *paths)
    assert answer.returncode == 0 and f"{file.stem}/colours" in answer.stdout, answer.stdout + answer.stderr
    answer = shell(folder, "python", "-m", "clbench.export", paths[0], "out=out", "stage=1")
    assert answer.returncode == 0 and (folder / "out" / "adapter").is_dir(), answer.stderr
    answer = shell(folder, "python", "-m", "clbench.verify", "results")
    assert answer.returncode == 0, answer.stdout
    answer = shell(
        folder, "python", "-m", "clbench.doctor", *OWN[:1], "stream=seq16_local", "probe=local", "data_dir=."
    )
    assert "not this one" not in answer.stderr, answer.stderr


def test_what_was_dropped_and_cut_is_in_the_manifest_the_log_and_the_table(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model", asked="")
    long = " ".join(["w1"] * 40)
    rows = [{"text": f"w{n} w{n % 7}", "to": "yes"} for n in range(60)] + [{"text": long, "to": "no"}] * 20
    rows += [{"text": f"w{n}", "to": long} for n in range(3)]
    (tmp_path / "own").mkdir()
    for split in ("train", "test"):
        (tmp_path / "own" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yaml = '_target_: tasks.rows.Rows\nrows: own\nprompt: "{text}"\nanswer: to\nmetric: exact_match\n'
    for option, text in (
        ("task/own", yaml),
        ("probe/small", "probes: {stream: {_target_: clbench.examine.matrix.Matrix}}\n"),
    ):
        (tmp_path / "conf" / option).parent.mkdir(parents=True)
        (tmp_path / "conf" / f"{option}.yaml").write_text(text)
    own = ("model.name=model", "stream.name=own", "stream.tasks=[own]", "stream.too_long=drop", "probe=small")
    quick = ("train.steps=1", "train.batch_size=2", "train.max_length=24", "cache_dir=cache", *QUIET)
    code, out, err = command("clbench", "--config-dir", "conf", *own, *quick)
    assert code == 0, err
    (path,) = (tmp_path / "results" / "runs").iterdir()
    manifest = json.loads((path / "manifest.json").read_text())
    (dropped,) = [one for one in manifest["unusable"] if one["split"] == "train"]
    assert (dropped["count"], dropped["of"], dropped["dropped"]) == (3, 83, True)
    assert manifest["cut_prompts"]["own"]["of"] == 160 and manifest["cut_prompts"]["own"]["share"] == 40 / 160
    assert "3 of 83 train rows of own were dropped" in err + out
    assert "25% of 160 prompts of own do not fit train.max_length=24" in err + out
    assert "rows dropped: 3" in (tmp_path / "results" / "leaderboard.md").read_text()
