"""What a person sees of a run: two lines a stage without a terminal, above a live line with one, something at once, and curves on request."""

import csv
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from clbench import cli, experiment
from clbench.config.composition import compose
from clbench.protocols import Engine
from clbench.record.curves import curves_of
from clbench.report import tables
from clbench.report.columns import MEASURES
from clbench.train import loop
from clbench.types import Reading, UserMistake
from tests import test_methods as methods
from tests.conftest import TINY_MODEL, TINY_STREAM

ROOT = Path(__file__).resolve().parent.parent


EXTRAS = ("deepspeed", "wandb", "tensorboard", "joblib", "optuna", "submitit", "matplotlib")


def command(cache_dir, tmp_path, *, without: Sequence[str] = ()) -> list[str]:
    """A run in an interpreter that does not find the modules `without`."""
    start = f"import sys; sys.modules.update(dict.fromkeys({without})); from clbench.cli import main; main()"
    places = (f"cache_dir={cache_dir}", f"results_dir={tmp_path / 'results'}")
    return [sys.executable, "-c", start, *TINY_MODEL, *TINY_STREAM, "engine.threads=1", *places]


def test_without_a_terminal_and_any_extra_a_line_within_two_seconds_and_two_after_every_stage(cache_dir, tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    environment = {**os.environ, "COLUMNS": "80"}
    with subprocess.Popen(
        [*command(cache_dir, tmp_path, without=EXTRAS), "tracking.tasks=true"], env=environment, **pipes
    ) as process:
        first = process.stderr.readline()
        computed = psutil.Process(process.pid).cpu_times()  # unlike the time that passed, the same beside other work
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert re.fullmatch(r"seq16-seq-s0-\w{8}: seq, 3 tasks of seq16, model world\n", first)
    assert computed.user + computed.system < 2
    lines = stderr.splitlines()
    numbers = [number for number, line in enumerate(lines) if re.search(r"stage \d/3", line)]
    assert [re.search(r"stage (\d)/3", lines[number]).group(1) for number in numbers] == ["0", "1", "2", "3"]
    assert all(re.match(r"  learned .+ kept .+ retention .+ perplexity x\d", lines[number + 1]) for number in numbers)
    assert [len(re.findall(r"kept \S+ +world", stderr[stderr.index(f"stage {stage}/3") :])) for stage in (3, 2)] == [
        3,
        5,
    ]
    assert max(len(line) for line in (first, *lines[numbers[0] :], *stdout.splitlines()[:-1])) <= 80
    (path,) = (tmp_path / "results" / "runs").iterdir()
    assert not re.search(r"\bnan\b", stderr + stdout + (path / "run.log").read_text())
    assert "\x1b" not in stderr and "\r" not in stderr
    assert "leaderboard.csv" in stdout and "seq" in stdout


def test_in_a_terminal_of_eighty_columns_a_live_line_below_what_is_said_of_every_stage(cache_dir, tmp_path):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm-256color"}
    process = subprocess.Popen(
        command(cache_dir, tmp_path), stdout=slave, stderr=slave, cwd=ROOT, env=environment, close_fds=True
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # the terminal closes with the process
            break
        if not piece:
            break
        shown += piece
    assert process.wait(timeout=300) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))
    for stage in (1, 2, 3):
        assert re.search(rf"stage {stage}/3 \w+ +loss \d[^\r\n]*[\r\n]+  learned", text)
    for phase in (
        "loading libraries",
        "reading the rows",
        "checking the data",
        "loading the model",
        "canaries",
        "writing",
    ):
        assert phase in text
    live = [line for line in re.split(r"[\r\n]+", text) if "━" in line]
    assert live and max(map(len, live)) <= 80
    assert any(re.match(r"stage \d/3 examining: \w+ \w+ +\d+/\d+.* about [\d.]+ s left", line) for line in live)
    assert "Leaderboard" in text and "leaderboard.csv" in text


# --- curves -------------------------------------------------------------------------------------------------------------

SECRET = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"


def read_wandb(path: Path) -> dict[str, list]:
    """The records of a file of W&B by their kind; it is written as LevelDB writes its log: blocks of 32 KiB, each piece behind 7 bytes."""
    data, at, piece, found = path.read_bytes(), 7, b"", defaultdict(list)
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        piece, at = piece + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = Record.FromString(piece)
            found[record.WhichOneof("record_type")].append(getattr(record, record.WhichOneof("record_type")))
            piece = b""
    return found


def values(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.fixture(scope="module")
def followed(tiny, tmp_path_factory) -> Iterator[tuple[Path, list[dict[str, list]]]]:
    """A run that was interrupted in its second stage and resumed: its directory, and what W&B had of each start."""
    folder = tmp_path_factory.mktemp("followed")
    given = ["method=l2", "order=reversed", "train.lr=0.01", "tracking.wandb=offline", "tracking.tensorboard=true"]
    config = compose([*tiny, *given, f"+model.note={SECRET}", f"results_dir={folder / 'results'}"])
    steps, take = [], loop.train_step

    def interrupted(*args, **rest):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return take(*args, **rest)

    with pytest.MonkeyPatch.context() as patch:
        for place in ("DATA", "CACHE", "CONFIG"):
            patch.setenv(f"WANDB_{place}_DIR", str(folder / "wandb"))
        patch.setattr(sys, "argv", ["clbench", f"method.token={SECRET}"])
        patch.setattr(loop, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            experiment.run(config)
        path = experiment.run(config)
    starts = sorted(folder.glob("results/wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    tables.refresh(folder / "results")
    return path, [read_wandb(file) for file in starts]


def test_wandb_has_one_run_under_its_hash_however_often_it_was_started(followed):
    path, starts = followed
    manifest = json.loads((path / "manifest.json").read_text())
    (begun,), (resumed,) = (start["run"] for start in starts)
    for run in (begun, resumed):
        assert run.run_id == manifest["config_hash"] and run.resume and run.display_name == path.name
        assert run.run_group == "seq16" and run.project == "clbench"
        assert sorted(run.tags) == sorted(["l2", manifest["model"], "seed=0", "order=reversed"])
    assert [start["exit"][0].exit_code for start in starts] == [1, 0]


def test_wandb_draws_training_over_the_runs_steps_and_scores_over_stages(followed):
    path, starts = followed
    axes = {metric.glob_name: metric.step_metric for start in starts for metric in start["metric"]}
    assert axes == {"train/*": "train/step"} | dict.fromkeys(
        [f"{probe}/*" for probe in ("stream", "knowledge", "perplexity", "divergence", "update", "canaries")], "stage"
    )
    lines = [[values(line.item) for line in start["history"]] for start in starts]
    training = [[line for line in of_start if "train/loss" in line] for of_start in lines]
    assert [[line["train/step"] for line in of_start] for of_start in training] == [[3], [6, 9]]
    for line in sum(training, []):
        # Three steps rise, full, half of 0.01.
        assert line["train/learning_rate"] == pytest.approx(0.005)
        assert line["train/loss"] > line["train/penalty"] > 0 and line["train/tokens_per_second"] > 0
        assert "stage" not in line
    scores = [json.loads(line) for line in (path / "scores.jsonl").read_text().splitlines()]
    stages = {
        line["stage"]: line for line in sum(lines, []) if "stream/world_total/accuracy" in line or "stage" in line
    }
    for score in scores:
        if score["probe"] not in ("canaries", "data"):
            key = f"{score['probe']}/{score['task']}/{score['metric']}"
            assert stages[score["stage"]][key] == pytest.approx(score["value"], nan_ok=True)


def test_wandb_ends_with_the_leaderboards_columns_the_matrix_and_the_report(followed):
    path, (begun, resumed) = followed
    summary = {}
    for change in resumed["summary"]:
        summary |= values(change.update)
    (row,) = csv.DictReader((path.parents[1] / "leaderboard.csv").open())
    assert {name: summary[name] for name in MEASURES if row[name]} == pytest.approx(
        {name: float(row[name]) for name in MEASURES if row[name]}
    )
    assert "average_accuracy" in summary and not {"average_accuracy"} & values(begun["summary"][-1].update).keys()
    (table,) = path.parents[1].glob("wandb/offline-run-*/files/media/table/*.json")
    manifest, table = json.loads((path / "manifest.json").read_text()), json.loads(table.read_text())
    assert table["columns"] == ["after", *manifest["tasks"]]
    assert [line[0] for line in table["data"]] == ["base", *manifest["tasks"]]
    scores = [json.loads(line) for line in (path / "scores.jsonl").read_text().splitlines()]
    found = {
        (score["stage"], score["task"], score["metric"]): score["value"]
        for score in scores
        if score["probe"] == "stream"
    }
    for stage, (_, *cells) in enumerate(table["data"]):
        assert cells == [found[stage, task, manifest["metrics"][task]] for task in manifest["tasks"]]
    (report,) = (one for one in resumed["artifact"] if one.type == "report")
    (file,) = report.manifest.contents
    assert report.name == f"report-{path.name}" and file.path == "report.html"
    assert path.name in Path(file.local_path).read_text()


def test_no_file_of_a_tracker_has_a_secret_of_the_configuration_or_of_the_command_line(followed):
    path, _ = followed
    files = [file for file in path.parents[2].rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files) and any("tfevents" in file.name for file in files)
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]


def test_tensorboard_has_the_same_curves(followed):
    path, starts = followed
    events = EventAccumulator(str(path.parents[1] / "tensorboard" / path.name)).Reload()
    loss = [(event.step, event.value) for event in events.Scalars("train/loss")]
    lines = [values(line.item) for start in starts for line in start["history"]]
    sent = [(line["train/step"], line["train/loss"]) for line in lines if "train/loss" in line]
    assert [step for step, _ in loss] == [3, 6, 9] and loss == [(step, pytest.approx(value)) for step, value in sent]
    scores = [json.loads(line) for line in (path / "scores.jsonl").read_text().splitlines()]
    task = json.loads((path / "manifest.json").read_text())["tasks"][0]
    expected = [
        one["value"] for one in scores if (one["probe"], one["task"], one["metric"]) == ("stream", task, "accuracy")
    ]
    found = [(event.step, event.value) for event in events.Scalars(f"stream/{task}/accuracy")]
    assert found == [(stage, pytest.approx(value)) for stage, value in enumerate(expected)]
    (row,) = csv.DictReader((path.parents[1] / "leaderboard.csv").open())
    (last,) = events.Scalars("leaderboard/average_accuracy")
    assert last.value == pytest.approx(float(row["average_accuracy"])) and last.step == 3


def test_a_reading_is_of_the_steps_since_the_one_before(monkeypatch):
    given = ("train.steps=12", "train.schedule=cosine", "train.warmup=0.2")
    read: dict[bool, list[Reading]] = {}
    rates: list[float] = []
    for is_penalised in (False, True):
        toy, calls = methods.lab("seq", *given), []
        _, engine = toy.open(1)

        def penalty(engine: Engine, *, calls=calls, is_penalised=is_penalised) -> float:
            calls.append(engine.optimizer.param_groups[0]["lr"])
            return float(len(calls)) if is_penalised else 0.0

        monkeypatch.setattr(toy.method, "correct_gradients", penalty)
        clock = iter(range(100, 200, 2))
        monkeypatch.setattr(loop.time, "perf_counter", lambda clock=clock: next(clock))
        plan, heard = loop.plan_stage(toy.method.training_set(toy.stage(1)), toy.run.config.train), []
        rest = {"method": toy.method, "engine": engine, "encoder": toy.run.encoder, "config": toy.run.config.train}
        trained = loop.train_stage(
            toy.stage(1), plan, seed=0, report=lambda *said, heard=heard: heard.append(said), **rest
        )
        monkeypatch.undo()
        assert [step for step, _, _ in heard] == list(range(13)) and heard[0][2] is None is heard[9][2]
        read[is_penalised], rates = [heard[10][2], heard[12][2]], calls
        assert heard[11][2] is heard[10][2]
    plain, penalised = read[False], read[True]
    assert [one.penalty for one in penalised] == [5.5, 11.5] and [one.penalty for one in plain] == [0.0, 0.0]
    assert [one.loss - other.loss for one, other in zip(penalised, plain, strict=True)] == pytest.approx(
        [5.5, 11.5], abs=1e-5
    )
    assert [one.learning_rate for one in penalised] == pytest.approx([rates[9], rates[11]])
    assert sum(2 * one.tokens_per_second for one in penalised) == trained.tokens_trained
    assert trained.loss == penalised[1].loss


def test_an_unknown_mode_and_an_unknown_tracker_are_one_line(capsys, monkeypatch, tmp_path):
    for given, said in {
        "tracking.wandb=perhaps": "tracking.wandb='perhaps' is unknown; choose one of disabled, offline, online",
        "tracking=mlflow": "'tracking/mlflow' is unknown; choose one of tensorboard, terminal, wandb (conf/)",
    }.items():
        monkeypatch.setattr(sys, "argv", ["clbench", given, f"results_dir={tmp_path}"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2 and capsys.readouterr().err == f"clbench: {said}\n"


def test_wandb_takes_its_mode_from_where_wandb_does(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert compose(["tracking=wandb"]).tracking.wandb == "offline"
    monkeypatch.delenv("WANDB_MODE")
    assert compose(["tracking=wandb"]).tracking.wandb == "online"
    assert compose(["tracking=tensorboard"]).tracking.tensorboard


def test_wandb_without_a_key_is_one_line(overrides, tmp_path, monkeypatch):
    for place in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{place}_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserMistake, match="tracking.wandb=online: No API key .*, or give tracking.wandb=offline"):
        curves_of(compose([*overrides, "tracking.wandb=online"]))
