"""Sweeps: what one job does to the others, what a second start leaves alone, how a signal ends them, and Optuna's sweeper."""

import fcntl
import importlib.util
import json
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from omegaconf import DictConfig

from clbench import cli
from clbench.cli import Ended
from clbench.config import run_directory
from clbench.config.composition import compose
from clbench.record import ledger
from clbench.record.ledger import Ledger
from clbench.report.tables import refresh
from clbench.verify import verify
from tests.faults.warm import Outcome, command

FEW = ("stream.limit=1", "train.steps=1")
UNTIMED = ("stages.csv", "retention.csv", "probes.csv", "differences.csv", "search.csv")
DIVERGING = ("train.lr=1e-3,1e30", "train.clip=0", "train.schedule=constant", "train.warmup=0", "train.steps=3")


def sweep(monkeypatch: pytest.MonkeyPatch, overrides: list[str], *more: str) -> int | str | None:
    """Exit code of `python -m clbench -m` in this process."""
    monkeypatch.setattr(sys, "argv", ["clbench", "-m", *overrides, *FEW, *more])
    try:
        cli.main()
    except SystemExit as end:
        return end.code
    return 0


def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


def states(folder: Path) -> list[str]:
    return sorted(path.read_text().strip() for path in folder.glob("runs/*/status"))


def untimed(folder: Path) -> dict[str, object]:
    """Every table, without the seconds and the memory that the same run takes otherwise another time."""
    tables: dict[str, object] = {name: (folder / name).read_bytes() for name in UNTIMED}
    board = pd.read_csv(folder / "leaderboard.csv", dtype=str, keep_default_na=False)
    timed = [name for name in board if name.startswith(("seconds_", "peak_memory_bytes"))]
    objects = json.loads((folder / "leaderboard.json").read_text())
    lines = [line.split(" | ") for line in (folder / "leaderboard.md").read_text().splitlines()]
    (place,) = {cells.index("train s") for cells in lines if "train s" in cells}
    return tables | {
        "leaderboard.csv": board.drop(columns=timed).to_dict("records"),
        "leaderboard.json": [{name: value for name, value in one.items() if name not in timed} for one in objects],
        "leaderboard.md": [cells[:place] + cells[place + 1 :] for cells in lines],
    }


def test_a_job_that_diverges_is_a_result_in_the_table(overrides, tmp_path, monkeypatch):
    assert sweep(monkeypatch, overrides, *DIVERGING) == 0
    first, second = states(results(tmp_path))
    assert first == "complete" and second.startswith("diverged: stage 1 of 1")
    notes = pd.read_csv(results(tmp_path) / "leaderboard.csv")["notes"]
    assert len(notes) == 2 and "diverged, not ranked" in notes[1]


def test_a_failed_job_is_named_and_leaves_the_others_and_the_tables_alone(overrides, tmp_path, monkeypatch, capsys):
    save_file, calls = ledger.save_file, []

    def full(*given, **named):
        calls.append(given)
        if len(calls) > 2:  # after the two checkpoints of the first job
            raise OSError(28, "No space left on device")
        save_file(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "save_file", full)
        assert sweep(patch, overrides, "seed=0,1") == 1
    said = capsys.readouterr().err
    assert "1 of 2 jobs are complete" in said and "Traceback" not in said
    assert len(pd.read_csv(results(tmp_path) / "leaderboard.csv")) == 1
    assert states(results(tmp_path)) == ["complete", "failed"]
    assert not list(results(tmp_path).glob(".sweep*"))


def test_a_mistake_in_one_job_is_named_and_the_others_are_ranked(overrides, tmp_path, monkeypatch, capsys):
    assert sweep(monkeypatch, overrides, "stream.tasks=[world_total],[nonesuch]") == 2
    said = capsys.readouterr().err
    assert "1 of 2 jobs are complete" in said and "'nonesuch', which has no yaml" in said and "Traceback" not in said
    assert len(pd.read_csv(results(tmp_path) / "leaderboard.csv")) == 1


class Killed(BaseException):
    """Stands in for a kill: nothing in the code under test may catch it."""


def test_a_killed_sweep_started_again_gives_the_tables_of_an_unbroken_one(tiny, tmp_path, monkeypatch):
    whole, broken = ([*tiny, f"results_dir={tmp_path / name}"] for name in ("whole", "broken"))
    settings = ["seed=0,1", "train.lr=1e-3,3e-3"]
    assert sweep(monkeypatch, whole, *settings) == 0
    append, calls = Ledger.append, []

    def die(self, scores):
        calls.append(self)
        if len(calls) == 4:  # of two stages a run
            raise Killed
        append(self, scores)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", die)
        with pytest.raises(Killed):
            sweep(patch, broken, *settings)
    assert not (tmp_path / "broken" / "leaderboard.csv").exists(), "tables are written once, at the end"
    assert sweep(monkeypatch, broken, *settings) == 0
    tables = untimed(tmp_path / "whole")
    assert untimed(tmp_path / "broken") == tables
    assert len(tables["leaderboard.csv"]) == tables["search.csv"].count(b"\n") - 1 == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
def test_two_sweeps_at_once_in_one_folder_leave_what_one_leaves(tiny, tmp_path):
    """They meet in the middle, where one leaves the other's run alone; the tables are those of whichever ends last."""

    def swept(folder: str, seeds: str) -> Outcome:
        given = ["-m", *tiny, *FEW, f"results_dir={tmp_path / folder}", f"seed={seeds}"]
        return command(given, folder=tmp_path / f"from-{folder}-{seeds}")

    assert swept("one", "0,1").code == 0
    with ThreadPoolExecutor() as pool:
        ends = list(pool.map(swept, ["two", "two"], ["0,1", "1,0"]))
    for end in ends:
        assert not end.faults and (end.code == 0 or "being written by another process" in end.err), end
    assert states(tmp_path / "two") == ["complete"] * 2
    assert not list((tmp_path / "two").glob(".*"))
    refresh(tmp_path / "two")  # both may have ended within the time that tables take
    assert untimed(tmp_path / "two") == untimed(tmp_path / "one") and verify(tmp_path / "two") == ([], 2)


def test_a_run_that_another_process_writes_is_left_alone(overrides, tmp_path, monkeypatch, capsys):
    # As the job composes it: Hydra, not `compose`, names the experiment, which is "" in both.
    path = run_directory(compose([*overrides, *FEW, "seed=1"]))
    path.mkdir(parents=True)
    with (path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert sweep(monkeypatch, overrides, "seed=0,1,2") != 0
    said = capsys.readouterr().err
    assert f"{path.name} is being written by another process" in said and "2 of 3 jobs are complete" in said
    assert states(results(tmp_path)) == ["complete", "complete"]


def test_a_run_that_another_process_completed_meanwhile_is_no_failure(tmp_path):
    busy = Ended(path=str(tmp_path), error="being written by another process", code=2)
    assert not busy.is_complete
    (tmp_path / "status").write_text("complete\n")
    assert busy.is_complete and not Ended(error="a mistake before there was a run", code=2).is_complete


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_the_sweep_in_one_line(overrides, tmp_path, monkeypatch, capsys, number, code):
    append = Ledger.append

    def stop(self, scores):
        if scores[0].stage:
            signal.raise_signal(number)
        append(self, scores)

    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
    }
    # A job in the background of a script ignores the one, nohup's the other.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    monkeypatch.setattr(Ledger, "append", stop)
    try:
        assert sweep(monkeypatch, overrides, "seed=0,1") == code
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("clbench: seq16-seq-s0-") and line.endswith("in stage 1/1; the same command continues")
    assert states(results(tmp_path)) == ["interrupted"], "the second job did not start"
    assert not list(results(tmp_path).glob(".sweep*"))


@pytest.mark.parametrize(
    ("ends", "code", "line"),
    [
        (BrokenProcessPool, 1, "a process of the sweep was killed, as for want of memory; the same command continues"),
        (KeyboardInterrupt, 130, "interrupted; the same command continues"),
    ],
)
def test_a_sweep_that_ends_outside_its_jobs_does_so_in_one_line(
    overrides, tmp_path, monkeypatch, capsys, ends, code, line
):
    job = cli._job

    def second_ends(composed: DictConfig) -> float | None:
        if composed.seed:
            raise ends
        return job(composed)

    monkeypatch.setattr(cli, "_job", second_ends)
    assert sweep(monkeypatch, overrides, "seed=0,1") == code
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"clbench: {line}"
    assert (results(tmp_path) / "leaderboard.csv").exists() == (ends is BrokenProcessPool)


def test_the_flag_of_a_sweep_may_stand_between_overrides(overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["clbench", *overrides, *FEW, "-m", "seed=0,1"])
    cli.main()
    assert states(results(tmp_path)) == ["complete", "complete"]


def test_a_grid_that_optimizes_goes_on_and_counts_as_any_other(overrides, tmp_path, monkeypatch, capsys):
    rates = ("optimize=average_accuracy", "train.lr=1e-3,-1,1e30", *DIVERGING[1:])
    assert sweep(monkeypatch, overrides, *rates) == 2
    said = capsys.readouterr().err
    assert "2 of 3 jobs are complete" in said and "train.lr=-1" in said and "Traceback" not in said
    assert "Error executing" not in said
    assert len(pd.read_csv(results(tmp_path) / "leaderboard.csv")) == 2


optuna = pytest.mark.skipif(
    not importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper"), reason="clbench[sweep] is not installed"
)
SEARCH = ("+experiment=tune/optuna", "hydra.sweeper.n_trials=3")


@optuna
@pytest.mark.parametrize(
    ("rates", "allowed", "tried", "complete"), [("1e-3,-1", 1, 3, 1), ("1e-3,-1", 0.5, 1, 0), ("-1,-2", 1, 3, 0)]
)
def test_optuna_hears_of_a_failed_trial_and_the_others_are_in_the_tables(
    overrides, tmp_path, monkeypatch, capsys, rates, allowed, tried, complete
):
    failing = (f"train.lr=choice({rates})", f"hydra.sweeper.max_failure_rate={allowed}")
    assert sweep(monkeypatch, overrides, *SEARCH, *failing) == 2
    assert f"{complete} of {tried} jobs are complete" in capsys.readouterr().err
    assert len(pd.read_csv(results(tmp_path) / "leaderboard.csv")) == min(complete, 1)


@optuna
def test_optuna_maximises_the_named_measure(overrides, tmp_path, monkeypatch):
    search = ("+experiment=tune/optuna", "hydra.sweeper.n_trials=2")
    assert sweep(monkeypatch, overrides, *search) == 0
    best = yaml.safe_load((results(tmp_path) / "optimization_results.yaml").read_text())
    board = pd.read_csv(results(tmp_path) / "leaderboard.csv")
    assert len(board) == 2
    assert best["best_value"] == pytest.approx(board["average_accuracy"].max(), abs=1e-12)


def test_a_measure_that_does_not_exist_is_refused_before_anything_is_trained(overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["clbench", *overrides, *FEW, "optimize=accuracy"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    said = capsys.readouterr().err
    assert (
        "optimize='accuracy'" in said and "average_accuracy" in said and not results(tmp_path).joinpath("runs").exists()
    )
