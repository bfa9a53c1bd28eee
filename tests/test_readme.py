"""Every command and example of README.md, as it is printed: run with the tiny model or, where it names a large one, composed and checked."""

import csv
import os
import re
import shlex
from pathlib import Path

import pytest

from clbench.config.composition import compose
from tests.test_contributing import FILES as CONTRIBUTED
from tests.test_own_folder import QUICK, shell, write_model, write_rows

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line, comments=True)[2:] for line in re.findall(r"^    (python -m .*)$", PAGE, re.MULTILINE)]
LARGE = [words for words in COMMANDS if any("experiment=" in word or "model.name=" in word for word in words)]
PANDAS, YAML, METHOD = re.findall(r"```(?:yaml|python)\n(.*?)```", PAGE, re.DOTALL)


def test_the_commands_run_one_after_another_in_one_folder(command, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [words for words in COMMANDS if words not in LARGE]
    assert len(small) == 11 and small[0] == ["clbench"]
    for words in small:
        runs = sorted(Path("results/runs").glob("*-seq-*")) + [Path("none")] * 2
        names = {
            "probe=mini": "probe=world",
            "results/runs/A": runs[0],
            "results/runs/B": runs[1],
            "results/runs/NAME": runs[0],
        }
        flags = [word for word in words[1:] if word == "-m"]
        own = [
            str(names.get(word, word)).replace("out=DIR", f"out={tmp_path / 'out'}") for word in words[1 + len(flags) :]
        ]
        # Whichever is run, an examination may then read what each stage left.
        added = [*tiny, "train.checkpoint=all"] if words[0] == "clbench" else []
        code, out, errors = command(words[0], *flags, *added, *own)
        assert code == 0, (words, out[-2000:], errors[-2000:])
    assert (tmp_path / "results" / "report.html").is_file() and (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("words", LARGE, ids=" ".join)
def test_a_command_that_names_a_large_model_composes(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my_conf"
    Path("ROWS").mkdir()
    (folder / "task").mkdir(parents=True)
    (folder / "task" / "mine.yaml").write_text(YAML)
    own = words[words.index("my_conf") + 1 :] if "my_conf" in words else words[1:]
    config = compose(own, config_dir=folder if "my_conf" in words else None)
    assert config.stream.tasks and config.method["name"] == "seq"


def test_rows_and_a_method_of_ones_own_are_ranked_as_they_are_printed(tmp_path):
    (words,) = [words for words in COMMANDS if "my_conf" in words]
    files = CONTRIBUTED | {
        # The page leaves out what stands above the class in CONTRIBUTING.
        "my_methods/shrink.py": CONTRIBUTED["my_methods/shrink.py"].partition("@dataclass")[0] + METHOD,
        "my_conf/task/mine.yaml": YAML,
        "my_conf/probe/own.yaml": "probes: {stream: {_target_: clbench.examine.matrix.Matrix}}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    write_model(tmp_path / "model", asked="Is this about sports?")
    write_rows(tmp_path / "mine.jsonl")
    (tmp_path / "ROWS").mkdir()
    tiny = {"model.name=/models/mine": "model.name=model", "probe=mini_local": "probe=own"}
    assert {*tiny} < {*words}
    own = (tiny.get(word, word) for word in words)
    answer = shell(tmp_path, "python", "-m", *own, "method=shrink", *QUICK)
    assert answer.returncode == 0, answer.stderr
    (row,) = csv.DictReader((tmp_path / "results" / "leaderboard.csv").open())
    assert (row["stream"], row["model"], row["method"]) == ("mine", "model", "shrink")
    assert 0 <= float(row["average_accuracy"]) <= 1


def test_the_tables_are_read_with_pandas_as_it_says(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(PANDAS, {})
    printed = capsys.readouterr().out
    assert "average_accuracy" in printed and len(printed.splitlines()) > 5, printed


def test_its_length_and_its_links():
    assert len(PAGE.splitlines()) <= 130
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert len(links) > 6 and not [link for link in links if "://" not in link and not os.path.exists(ROOT / link)]
