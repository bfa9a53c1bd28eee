"""A method that diverges is a result: the run says where, keeps its stages before, and stands in the table without a rank."""

import json
from pathlib import Path

import pytest
import torch

from clbench.config.composition import compose
from clbench.examine.student import Student
from clbench.experiment import run
from clbench.record.runs import read_runs
from clbench.report import html as report
from clbench.report import tables
from clbench.types import UserMistake
from tests.test_leaderboard import ALPHA, read, refreshed, results, write_run  # noqa: F401 (a fixture)


def test_a_run_whose_weights_are_not_finite_ends_as_diverged_and_keeps_its_last_good_stage(overrides, monkeypatch):
    from clbench.experiment import underway

    trained = underway.train_stage

    def broken(stage, *given, engine, **named):
        found = trained(stage, *given, engine=engine, **named)
        if stage.index == 2:
            next(engine.tensors()).value = torch.full_like(next(engine.tensors()).value, torch.inf)
        return found

    monkeypatch.setattr(underway, "train_stage", broken)
    path = run(compose(overrides))
    status = (path / "status").read_text()
    assert status.startswith("diverged: stage 2 of 3") and "step 3: " in status and "is not finite" in status
    stages = {json.loads(line)["stage"] for line in (path / "scores.jsonl").read_text().splitlines()}
    assert stages == {0, 1} and (path / "checkpoint" / "stage.safetensors").is_file()
    monkeypatch.undo()
    before = (path / "scores.jsonl").stat().st_mtime_ns
    assert run(compose(overrides)) == path and (path / "scores.jsonl").stat().st_mtime_ns == before
    tables.refresh(path.parents[1])
    (row,) = read(path.parents[1], "leaderboard.csv")
    assert row["average_accuracy"] == "" and "stage 2 of 3" in row["notes"]


@pytest.mark.parametrize("rate", [1e30])
def test_a_step_far_too_long_ends_as_diverged(overrides, rate):
    path = run(compose([*overrides, f"train.lr={rate}", "train.clip=0", "stream.limit=1"]))
    assert (path / "status").read_text().startswith("diverged: stage 1 of 1 ")


def test_what_a_model_says_is_checked_where_its_weights_are_finite(overrides, monkeypatch):
    read_ = Student._read

    def silent(self, requests, **named):
        found = read_(self, requests, **named)
        return [(float("nan"), False, rest) for *_, rest in found] if silent.on else found

    silent.on = True
    monkeypatch.setattr(Student, "_read", silent)
    with pytest.raises(UserMistake, match="untrained"):
        run(compose(overrides))
    from clbench import experiment

    trained, silent.on = experiment.train, False

    def then_silent(*given, **named):
        found = trained(*given, **named)
        silent.on = True
        return found

    monkeypatch.setattr(experiment, "train", then_silent)
    path = run(compose(overrides))
    assert (path / "status").read_text().startswith("diverged: stage 1 of 3")


def diverge(results: Path, **named) -> Path:  # noqa: F811
    folder = write_run(results, matrix=ALPHA, stages=1, status="diverged: stage 2 of 3 (food), step 60: loss", **named)
    return folder


def test_runs_that_diverged_stand_in_the_table_below_the_ranked_ones_without_a_rank(results):  # noqa: F811
    ranked = refreshed(results)
    diverge(results, method="gamma", seed=0)
    diverge(results, method="alpha", seed=7)
    rows = refreshed(results)
    assert rows[: len(ranked)] == ranked
    assert [(row["method"], row["n_blocks"]) for row in rows[2:]] == [("alpha", "1"), ("gamma", "1")]
    for row in rows[2:]:
        assert row["average_accuracy"] == row["average_accuracy_rank_best"] == ""
        assert "diverged, not ranked" in row["notes"] and "stage 2 of 3 (food), step 60" in row["notes"]
    text = (results / "leaderboard.md").read_text()
    assert "| gamma (diverged) | 1 (1, 1) | - |" in text
    assert "gamma (diverged)" in report.write(results).read_text()
    assert len(json.loads((results / "leaderboard.json").read_text())) == 4
    state = read_runs(results).runs.set_index("method").loc["gamma", "state"]
    assert state == "diverged"


def test_a_setting_in_which_all_runs_diverged_is_a_table_too(tmp_path):
    diverge(tmp_path, method="gamma", seed=0)
    (row,) = refreshed(tmp_path)
    assert row["method"] == "gamma" and "gamma (diverged)" in (tmp_path / "leaderboard.md").read_text()
    assert report.write(tmp_path).is_file()
