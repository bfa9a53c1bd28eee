"""Whole runs of a tiny model over a tiny stream: the same numbers however they come about."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from baselines.base_interpolation import BaseInterpolation
from clbench import build, cli, experiment
from clbench.config.composition import compose
from clbench.examine.canaries import own_model
from clbench.experiment.afterwards import examine_again
from clbench.record.ledger import Ledger
from clbench.record.runs import read_runs
from clbench.report import tables as leaderboard
from clbench.types import FLOORS, UserMistake

LINEAR = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


def run(overrides: list[str], *more: str) -> Path:
    config = compose([*overrides, *more])
    path = experiment.run(config)
    leaderboard.refresh(Path(config.results_dir))
    return path


def scores(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in (path / "scores.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def elsewhere(overrides: list[str], tmp_path: Path, name: str) -> list[str]:
    return [*(item for item in overrides if not item.startswith("results_dir")), f"results_dir={tmp_path / name}"]


@pytest.mark.parametrize("method", ["base", "seq", "er", "ewc"])
def test_a_run_leaves_a_whole_ledger(overrides, method):
    path = run(overrides, f"method={method}")
    assert (path / "status").read_text() == "complete\n"
    rows = scores(path)
    assert {row["stage"] for row in rows} == {0, 1, 2, 3}
    examined = {"stream", "knowledge", "perplexity", "divergence", "update", "canaries"}
    assert {row["probe"] for row in rows} == examined | ({"data"} if method == "er" else set())
    assert len([line for line in (path / "cost.jsonl").read_text().splitlines()]) == 4
    manifest = json.loads((path / "manifest.json").read_text())
    assert (
        manifest["method"] == method
        and len(manifest["tasks"]) == 3
        and manifest["data"].keys() == set(manifest["tasks"])
    )
    assert manifest["canaries"]["untried"] == []  # its model has fewer positions than the canaries read
    assert manifest["adapted_layers"] == ([] if method == "base" else LINEAR.split(", "))


def test_a_run_whose_loss_is_not_that_of_plain_forwards_is_not_ranked(overrides, monkeypatch):
    answer_loss = own_model.answer_loss
    monkeypatch.setattr(own_model, "answer_loss", lambda *given: 1.01 * answer_loss(*given))
    path = run(overrides, "method=seq")
    assert (path / "status").read_text() == "complete\n"
    said = "failed canaries on its own model: training after stage 0, training after stage 1"
    assert f"{path.name}: {said}" in (path.parents[1] / "leaderboard.md").read_text()


def test_the_manifest_and_the_leaderboard_name_one_variant(overrides):
    path = run(overrides, "method=seq")
    (row,) = csv.DictReader((path.parents[1] / "leaderboard.csv").open())
    assert row["variant"] == json.loads((path / "manifest.json").read_text())["variant"]
    assert run(overrides, "method=seq", "seed=1") != path
    (row,) = csv.DictReader((path.parents[1] / "leaderboard.csv").open())
    assert row["n_seeds"] == "2"


def test_a_sweep_reads_its_runs_once_however_many_jobs_it_has(overrides, monkeypatch, capsys):
    read = []
    monkeypatch.setattr(leaderboard, "read_runs", lambda folder: read.append(folder) or read_runs(folder))
    few = ["stream.limit=1", "train.steps=0"]
    monkeypatch.setattr(sys, "argv", ["clbench", "-m", *overrides, *few, "seed=0,1,2"])
    cli.main()
    assert len(read) == 1 and capsys.readouterr().out.count("is complete") == 3


def costs(folder: Path) -> list[dict]:
    (path,) = folder.glob("runs/*/cost.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_scores(overrides, tmp_path):
    csvs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(elsewhere(overrides, tmp_path, name), "method=er", f"seed={seed}")
        csvs.append((tmp_path / name / "stages.csv").read_bytes())
    assert csvs[0] == csvs[1]
    values = [pd.read_csv(tmp_path / name / "stages.csv")["value"] for name in "ac"]
    assert len(values[0]) == len(values[1]) and not values[0].equals(values[1])


def test_row_zero_is_the_same_for_every_method(overrides):
    first = [
        [row for row in scores(run(overrides, f"method={method}")) if row["stage"] == 0]
        for method in ("base", "seq", "er", "ewc")
    ]
    assert first[0] and all(other == first[0] for other in first[1:])


def test_a_model_that_nothing_trains_is_read_before_the_stream_and_stands_for_every_stage(overrides, tmp_path):
    path = run(elsewhere(overrides, tmp_path, "whole"), "method=base", "+probe.cadence.perplexity=every:3")
    read = [cost["tokens_scored"] for cost in costs(tmp_path / "whole")]
    assert read[0] > 0 and read[1:] == [0, 0, 0], read
    rows = [{key: row[key] for key in ("stage", "probe", "task", "metric", "value", "n")} for row in scores(path)]
    untouched, first, second, third = (
        [{**row, "stage": 0} for row in rows if row["stage"] == stage and row["probe"] != "canaries"]
        for stage in (0, 1, 2, 3)
    )
    assert third == [row for row in untouched if row["metric"] not in FLOORS] != untouched
    assert first == second == [row for row in third if row["probe"] not in ("perplexity", "divergence")] != third


@pytest.mark.parametrize("alphas", ["[0.5,0]", "[0,0.5]"])
def test_a_view_that_training_does_not_touch_is_recorded_as_if_it_were_read_again(
    overrides, alphas, tmp_path, monkeypatch
):
    given = ["method=base_interpolation", f"method.alphas={alphas}"]
    once = run(elsewhere(overrides, tmp_path, "once"), *given)
    monkeypatch.setattr(BaseInterpolation, "still", lambda self: ())
    again = run(elsewhere(overrides, tmp_path, "again"), *given)
    read, twice = ([cost["tokens_scored"] for cost in costs(tmp_path / name)] for name in ("once", "again"))
    # Answers that are written differ in length.
    halves = [one / other for one, other in zip(read[1:], twice[1:], strict=True)]
    assert read[0] == twice[0] and halves == pytest.approx([0.5] * 3, abs=0.01), (read, twice)
    first = [row for line in (once / "scores.jsonl").open() if (row := json.loads(line))["stage"] == 0]
    spent = sum(row["seconds"] for row in first if "@" not in row["probe"] and row["probe"] != "canaries")
    assert costs(tmp_path / "once")[0]["seconds_probe"] == pytest.approx(spent), "once, however many views"
    assert scores(once) == scores(again)
    items = [sorted((path.name, path.read_bytes()) for path in (one / "items").iterdir()) for one in (once, again)]
    assert items[0] == items[1]


@pytest.mark.parametrize("method", ["er_general", "self_replay_text"])
def test_a_method_that_trains_on_what_a_probe_measures_is_refused_or_flagged(overrides, method, tmp_path):
    few = [*overrides, f"method={method}", "stream.limit=1", "train.steps=1"]
    manifest = json.loads((run(few) / "manifest.json").read_text())
    assert manifest["trained_probes"] == []
    measured = [*elsewhere(few, tmp_path, "measured"), "method.texts._target_=tasks.world.heldout_texts"]
    with pytest.raises(UserMistake, match=r"a probe measures \(perplexity world_text\)"):
        run(measured)
    assert not (tmp_path / "measured" / "runs").exists()
    path = run(measured, "probe.allow_overlap=true")
    flagged = json.loads((path / "manifest.json").read_text())["trained_probes"]
    assert flagged == ["perplexity world_text: the method's texts"]
    assert "perplexity world_text: the method's texts" in (tmp_path / "measured" / "leaderboard.md").read_text()
    with pytest.raises(UserMistake, match=r"a probe measures \(perplexity world_text\)"):
        examine_again(path, ("probe=world", "probe.limit=12"))


def test_a_text_of_a_method_that_fits_no_row_is_refused_before_anything_is_examined(overrides, tmp_path):
    with pytest.raises(UserMistake, match=r"text '.*'\.\.\. has more tokens than train.max_length=8 holds"):
        run(overrides, "method=er_general", "train.max_length=8", "stream.too_long=drop")
    assert not (tmp_path / "results" / "runs").exists()


def test_without_steps_every_stage_is_row_zero(overrides):
    rows = scores(run(overrides, "method=seq", "train.steps=0"))
    floors = ("chance", "majority")
    value = {
        (row["stage"], row["probe"], row["task"], row["metric"]): row["value"]
        for row in rows
        if row["metric"] not in floors and row["task"] != "merging"  # of stage 1 alone
    }
    for (_, *rest), found in value.items():
        assert found == value[(0, *rest)], rest


def test_training_changes_scores(overrides):
    rows = scores(run(overrides, "method=seq"))
    nll = [row["value"] for row in rows if row["metric"] == "nll_token"]
    assert len(set(nll)) == len(nll) == 4


class Killed(BaseException):
    """Stands in for a kill: nothing in the code under test may catch it."""


@pytest.mark.parametrize("moment", ["before the scores", "after the scores", "after the checkpoint"])
@pytest.mark.parametrize("method", [pytest.param("seq", marks=pytest.mark.slow), "er", "ewc"])
def test_a_killed_run_continues_to_the_same_bytes(overrides, tmp_path, monkeypatch, method, moment):
    run(elsewhere(overrides, tmp_path, "whole"), f"method={method}")
    append, save = Ledger.append, Ledger.save

    def killed_append(self, rows):
        rows = list(rows)
        if rows[0].stage == 2 and moment == "before the scores":
            raise Killed
        append(self, rows)
        if rows[0].stage == 2 and moment == "after the scores":
            raise Killed

    def killed_save(self, checkpoint):
        save(self, checkpoint)
        if checkpoint.stage == 2 and moment == "after the checkpoint":
            raise Killed

    killed = elsewhere(overrides, tmp_path, "killed")
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", killed_append)
        patch.setattr(Ledger, "save", killed_save)
        with pytest.raises(Killed):
            run(killed, f"method={method}")
    path = run(killed, f"method={method}", "resume=must")
    assert (path / "status").read_text() == "complete\n"
    for name in ("stages.csv", "retention.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_complete_run_is_left_alone(overrides):
    path = run(overrides)
    before = (path / "scores.jsonl").stat().st_mtime_ns
    assert run(overrides) == path
    assert (path / "scores.jsonl").stat().st_mtime_ns == before


def test_resume_must_and_never_mean_what_they_say(overrides):
    with pytest.raises(UserMistake, match="no run"):
        run(overrides, "resume=must")
    run(overrides, "resume=never")
    with pytest.raises(UserMistake, match="resume=never"):
        run(overrides, "resume=never")


def test_changed_data_is_refused_on_resume(overrides, monkeypatch):
    run(overrides)
    monkeypatch.setattr("clbench.stream.fingerprint", lambda rows: "other")
    with pytest.raises(UserMistake, match="other data"):
        run(overrides)


def test_orders_are_permutations_of_the_stream(overrides):
    runs = {
        order: json.loads(
            (run(overrides, f"order={order}", "train.steps=0", "stream.test_rows=1") / "manifest.json").read_text()
        )["tasks"]
        for order in ("default", "reversed", "latin:1", "random:3")
    }
    assert len({tuple(tasks) for tasks in runs.values()}) == 4


def test_a_run_killed_outright_continues_to_the_same_bytes(overrides, tmp_path):
    whole = elsewhere(overrides, tmp_path, "whole")
    run(whole, "method=er")
    killed = elsewhere(overrides, tmp_path, "killed")
    command = [sys.executable, "-m", "clbench", *killed, "method=er"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    scored = tmp_path / "killed" / "runs"
    deadline = time.monotonic() + 120
    while not any('"stage": 1,' in path.read_text() for path in scored.glob("*/scores.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    path = run(killed, "method=er", "resume=auto")
    assert (path / "status").read_text() == "complete\n"
    assert (tmp_path / "killed" / "stages.csv").read_bytes() == (tmp_path / "whole" / "stages.csv").read_bytes()


def test_a_limit_beyond_the_streams_tasks_is_said(overrides, monkeypatch):
    said = []
    monkeypatch.setattr(build.log, "warning", lambda text, *values: said.append(text % values))
    parts = build.build(compose([*overrides, "stream.limit=3", "stream.tasks=[world_before,world_zone]"]))
    assert len(parts.stream.stages) == 2
    assert said == ["stream.limit=3, but the stream has 2 tasks: all are trained"]
