"""A small results directory with known answers: two methods, three seeds, three tasks."""

import csv
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pytest import approx

from clbench.config import variant
from clbench.record.runs import pack
from clbench.report import html as report
from clbench.report import tables as leaderboard
from clbench.types import Cost, Score, UserMistake

TASKS = ("sums", "food", "rhyme")
# Row 0 is the untouched model. Of ALPHA: average .667, learning .8, BWT -.2, forgetting .25, FWT .075 (see test_metrics).
ALPHA = [[0.10, 0.20, 0.30], [0.80, 0.25, 0.30], [0.90, 0.70, 0.40], [0.50, 0.60, 0.90]]
# Of BETA: average .4, learning .7, BWT ((.1 - .6) + (.3 - .7)) / 2 = -.45.
BETA = [[0.10, 0.20, 0.30], [0.60, 0.20, 0.30], [0.30, 0.70, 0.30], [0.10, 0.30, 0.80]]
T_HALF = 4.302653 * 0.01 / np.sqrt(3)  # half the interval of three seeds that differ by steps of .01


def outcomes(*runs):
    """outcomes((3, 1), (2, 0)) is [1, 1, 1, 0, 0]."""
    return np.concatenate([np.full(count, float(value)) for count, value in runs])


# "facts" (chance .25) goes from 80 to 60 right of 100, "logic" (chance .5) from 70 to 65: retention (.35 + .15) / .75.
BEFORE = {"facts": outcomes((80, 1), (20, 0)), "logic": outcomes((70, 1), (30, 0))}
AFTER = {"facts": outcomes((55, 1), (25, 0), (5, 1), (15, 0)), "logic": outcomes((60, 1), (10, 0), (5, 1), (25, 0))}
CHANCE = {"facts": 0.25, "logic": 0.5}
# The probability of the right choice goes from .70 to .475, from .80 to .65: retention (.225 + .15) / (.45 + .30).
PROBABILITY = {"facts": (0.7, 0.475), "logic": (0.8, 0.65)}


def stage_scores(stage, row):
    """Everything that a run measures after one stage; base knowledge changes in the last stage only."""
    at = {"stage": stage, "stage_name": ("base", *TASKS)[stage], "seconds": 0.25}
    for task, value in zip(TASKS, row, strict=True):
        yield Score(**at, probe="stream", task=task, metric="accuracy", value=value, n=40, stderr=0.05)
        yield Score(**at, probe="stream@fast", task=task, metric="accuracy", value=0.0, n=40, stderr=float("nan"))
        yield Score(**at, probe="stream", task=task, metric="format_validity", value=0.9, n=40, stderr=0.0)
    if stage == 0:
        for task, chance, majority in (("sums", 0.0, 0.1), ("food", 0.25, 0.4)):
            yield Score(**at, probe="stream", task=task, metric="chance", value=chance, n=40, stderr=0.0)
            yield Score(**at, probe="stream", task=task, metric="majority", value=majority, n=40, stderr=0.0)
    for task, items in (AFTER if stage == 3 else BEFORE).items():
        facts = {**at, "probe": "knowledge", "task": task, "n": 100, "stderr": 0.04}
        primary = {"facts": "acc", "logic": "acc_norm"}[task]
        yield Score(**facts, metric=primary, value=items.mean(), items=tuple(items))
        if primary == "acc_norm":
            yield Score(**facts, metric="acc", value=0.0, items=tuple(np.zeros(100)))  # must not be used
        probability = PROBABILITY[task][stage == 3]
        yield Score(**facts, metric="probability", value=probability, items=(probability,) * 100)
        if stage == 0:
            yield Score(**facts, metric="chance", value=CHANCE[task])
    drift = {"probe": "perplexity", "task": "heldout", "n": 900, "stderr": float("nan")}
    yield Score(**at, **drift, metric="nll_token", value=1.0 + (np.log(2) if stage == 3 else 0.0))
    yield Score(**at, **drift, metric="bits_per_byte", value=0.75 if stage == 3 else 0.5)


def write_run(results, method, *, seed, matrix, status="complete", stages=3, steps=60, name="", dirty=False, failed=()):
    """One run directory as the ledger writes it."""
    run = name or f"demo-{method}-s{seed}-{steps:08x}"
    folder = results / "runs" / run
    (folder / "items").mkdir(parents=True)
    manifest = {
        "run": run,
        "experiment": "demo",
        **{"stream": "three", "order": "default", "model": "tiny", "method": method, "seed": seed},
        "config": {
            "seed": seed,
            "results_dir": str(results),
            "method": {"name": method, "seed": seed, "data": f"{results}"},
            "train": {"steps": steps, "lr": 1e-3},
            "engine": {"dtype": "float32", "processes": 1 + seed},
        },
        "config_hash": f"{seed}{steps}",
        "stream_hash": "abc123",
        "canaries": {"checked": 4, "failed": list(failed)},
        "git": {"commit": "c0ffee", "dirty": dirty},
        "tasks": list(TASKS),
        "metrics": dict.fromkeys(TASKS, "accuracy"),
        "command": f"python -m clbench method={method} seed={seed}",
    }
    write_manifest(folder, manifest)
    (folder / "status").write_text(status + "\n")
    with (folder / "scores.jsonl").open("w") as lines, (folder / "cost.jsonl").open("w") as costs:
        for stage in range(stages + 1):
            row = [value + 0.01 * seed * (stage > 0) for value in matrix[stage]]
            scores = list(stage_scores(stage, row))
            for score in scores:
                record = {
                    key: None if value != value else value for key, value in vars(score).items() if key != "items"
                }
                lines.write(json.dumps(record) + "\n")
            kept = {f"{s.probe}|{s.task}|{s.metric}": np.array(s.items, dtype=np.float32) for s in scores if s.items}
            np.savez_compressed(folder / "items" / f"stage-{stage:02d}.npz", **kept)
            costs.write(json.dumps(vars(stage_cost(stage)) | {"joules": None}) + "\n")
    return folder


def write_manifest(folder, manifest):
    """The manifest, its variant as its configuration makes it."""
    (folder / "manifest.json").write_text(json.dumps(manifest | {"variant": variant(manifest["config"])}))


def stage_cost(stage):
    """Two seconds of training a stage, none for the untouched model."""
    trained = stage > 0
    return Cost(
        stage=stage,
        steps=60 * trained,
        tokens_trained=1000 * trained,
        tokens_replayed=100 * trained,
        tokens_scored=5000,
        seconds_train=2.0 * trained,
        seconds_probe=0.5,
        seconds_other=0.125,
        trainable_parameters=4096 * trained,
        peak_memory_bytes=1_000_000 + stage,
        flops=1e9 * trained,
        joules=float("nan"),
    )


@pytest.fixture
def results(tmp_path):
    for seed in range(3):
        write_run(tmp_path, "alpha", seed=seed, matrix=ALPHA)
        write_run(tmp_path, "beta", seed=seed, matrix=BETA)
    return tmp_path


def read(results, name):
    """The rows of a generated CSV file."""
    with (results / name).open(newline="") as file:
        return list(csv.DictReader(file))


def refreshed(results, name="leaderboard.csv"):
    """The rows of a CSV file after a refresh."""
    leaderboard.refresh(results)
    return read(results, name)


def test_leaderboard_has_one_row_per_method_best_first(results):
    alpha, beta = refreshed(results)
    assert (alpha["method"], beta["method"]) == ("alpha", "beta")
    assert alpha["n_seeds"] == beta["n_seeds"] == "3"
    assert (alpha["stream"], alpha["order"], alpha["model"], alpha["notes"]) == ("three", "default", "tiny", "")


def test_leaderboard_holds_the_hand_computed_numbers(results):
    alpha, beta = (
        {key: float(value or "nan") for key, value in row.items() if key in KNOWN} for row in refreshed(results)
    )
    # Seeds add 0, .01, .02 to every score after training: .01 on the mean, which differences do not see.
    assert alpha == approx(KNOWN, rel=1e-6)
    assert beta["average_accuracy"] == approx(0.41) and beta["bwt"] == approx(-0.45)


KNOWN = {
    "average_accuracy": 2 / 3 + 0.01,
    "average_accuracy_low": 2 / 3 + 0.01 - T_HALF,
    "average_accuracy_high": 2 / 3 + 0.01 + T_HALF,
    "learning_accuracy": 0.81,
    "bwt": -0.2,
    "forgetting": 0.25,
    "fwt": 0.085,
    "retention": 0.5 / 0.75,
    "retention_low": 0.5 / 0.75,
    "retention_probability": 0.375 / 0.75,
    "retention_min": 0.35 / 0.55,
    "perplexity_ratio": 2.0,
    "bits_per_byte_drift": 0.25,
    "format_validity": 0.9,
    "base_accuracy": 0.2,
    "chance_accuracy": 0.25 / 3,  # 0, .25 and, for the task of free answers, none
    "majority_accuracy": 0.5 / 3,
    "seconds_train": 6.0,
    "seconds_probe": 2.0,
    "seconds_other": 0.5,
    "tokens_trained": 3000,
    "tokens_replayed": 300,
    "trainable_parameters": 4096,
    "peak_memory_bytes": 1_000_003,
    "flops": 3e9,
}


def test_leaderboard_columns_come_in_threes_with_the_names_of_the_readme(results):
    columns = list(refreshed(results)[0])
    assert columns[:6] == ["stream", "order", "model", "method", "variant", "n_seeds"]
    assert columns[-2:] == ["stream_hash", "notes"]
    measures = columns[6:-2:3]
    assert columns[6:-2] == [f"{name}{bound}" for name in measures for bound in ("", "_low", "_high")]
    assert measures[:6] == ["average_accuracy", "learning_accuracy", "bwt", "forgetting", "fwt", "retention"]


def test_stages_csv_is_long_and_sorted_and_keeps_secondary_views(results):
    rows = refreshed(results, "stages.csv")
    header = (results / "stages.csv").read_text().split("\n")[0]
    assert header == "stream,order,model,method,seed,stage,stage_name,probe,task,metric,value,n,stderr,run"
    keys = [(r["method"], int(r["seed"]), int(r["stage"]), r["probe"], r["task"], r["metric"]) for r in rows]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)
    one = next(r for r in rows if (r["method"], r["seed"], r["stage"], r["task"]) == ("alpha", "1", "2", "food"))
    assert (one["value"], one["stage_name"], one["n"]) == ("0.71", "food", "40")
    assert {r["probe"] for r in rows} == {"stream", "stream@fast", "knowledge", "perplexity"}
    assert all(r["stderr"] == "" for r in rows if r["probe"] == "perplexity")


def test_retention_csv_has_one_row_per_run_and_stage(results):
    rows = [row for row in refreshed(results, "retention.csv") if row["run"].startswith("demo-alpha-s0")]
    assert [row["stage"] for row in rows] == ["0", "1", "2", "3"]
    assert all(float(row["retention"]) == float(row["perplexity_ratio"]) == 1.0 for row in rows[:3])
    last = rows[3]
    assert float(last["retention"]) == approx(0.5 / 0.75)
    assert float(last["retention_low"]) < 0.5 / 0.75 < float(last["retention_high"])
    assert (last["retention_min_probe"], float(last["retention_min"])) == ("facts", approx(0.35 / 0.55))
    assert float(last["lost"]) == approx(0.175) and float(last["gained"]) == approx(
        0.05
    )  # means of .25, .10 and .05, .05
    assert float(last["perplexity"]) == approx(2 * np.e) and float(last["perplexity_ratio"]) == approx(2.0)
    assert float(last["bits_per_byte"]) == 0.75 and float(last["bits_per_byte_drift"]) == 0.25
    assert last["reason"] == ""


def test_probes_csv_has_one_row_per_run_stage_and_probe(results):
    rows = [row for row in refreshed(results, "probes.csv") if row["run"].startswith("demo-alpha-s0")]
    assert [(row["stage"], row["task"]) for row in rows] == [(f"{n}", task) for n in range(4) for task in BEFORE]
    facts, logic = ({key: float(value) for key, value in row.items() if key in PROBES} for row in rows[-2:])
    assert facts == approx(PROBES)
    assert (logic["floor"], logic["retention"], logic["lost_corrected"]) == approx((0.5, 0.15 / 0.20, 0.0))
    assert logic["retention_probability"] == approx(0.15 / 0.30) and rows[-1]["reason"] == ""


PROBES = {
    "floor": 0.25,
    "before": 0.8,
    "after": 0.6,
    "retention": 0.35 / 0.55,
    "retention_probability": 0.225 / 0.45,
    "delta": -0.2,
    "lost": 0.25,
    "gained": 0.05,
    "lost_corrected": 0.25 - 0.2 * 0.4 / 3,
    "gained_corrected": 0.05 - 0.2 * 0.4 / 3,
}


def test_the_floor_is_the_majority_where_that_is_above_chance(results):
    run = next((results / "runs").glob("demo-alpha-s0*"))
    first = json.loads((run / "scores.jsonl").read_text().splitlines()[0])
    with (run / "scores.jsonl").open("a") as lines:
        for task, share in (("logic", 0.6), ("facts", 0.2)):
            lines.write(
                json.dumps(first | {"probe": "knowledge", "task": task, "metric": "majority", "value": share}) + "\n"
            )
    last = next(r for r in refreshed(results, "retention.csv") if (r["run"], r["stage"]) == (run.name, "3"))
    assert float(last["retention"]) == approx((0.35 + 0.05) / (0.55 + 0.10))
    assert float(last["retention_probability"]) == approx(0.375 / 0.75)  # above chance
    floors = {r["task"]: float(r["floor"]) for r in read(results, "probes.csv") if r["run"] == run.name}
    assert floors == {"facts": 0.25, "logic": 0.6}


def test_records_without_probabilities_leave_their_columns_empty(results):
    for run in (results / "runs").iterdir():
        lines = (run / "scores.jsonl").read_text().splitlines(keepends=True)
        (run / "scores.jsonl").write_text("".join(line for line in lines if '"probability"' not in line))
        for path in (run / "items").iterdir():
            with np.load(path) as items:
                kept = {key: items[key] for key in items.files if not key.endswith("|probability")}
            np.savez_compressed(path, **kept)
    assert [row["retention_probability"] for row in refreshed(results)] == ["", ""]
    rows = read(results, "retention.csv")
    assert all(row["retention"] and not row["retention_probability"] and row["reason"] == "" for row in rows)
    assert all(row["retention"] and not row["retention_probability"] for row in read(results, "probes.csv"))


def test_equal_ledgers_give_equal_bytes_whatever_the_order_of_writing(results, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for seed in (2, 0, 1):
        write_run(other, "beta", seed=seed, matrix=BETA)
        write_run(other, "alpha", seed=seed, matrix=ALPHA)
    for folder in (results, other, other):
        leaderboard.refresh(folder)
    for name in ("stages.csv", "retention.csv", "probes.csv", "leaderboard.csv", "leaderboard.md"):
        assert (results / name).read_bytes() == (other / name).read_bytes(), name
    assert not list(results.glob("*.tmp")) and not list(results.glob(".*.tmp"))


def test_a_torn_last_line_is_ignored(results):
    leaderboard.refresh(results)
    before = (results / "stages.csv").read_bytes()
    run = next((results / "runs").glob("demo-alpha-s0*"))
    with (run / "scores.jsonl").open("a") as lines:
        lines.write('{"stage": 3, "stage_name": "rhy')
    with (run / "cost.jsonl").open("a") as lines:
        lines.write(json.dumps(vars(stage_cost(9)) | {"joules": None}))  # whole, but its newline is missing
    leaderboard.refresh(results)
    assert (results / "stages.csv").read_bytes() == before
    assert float(read(results, "leaderboard.csv")[0]["seconds_train"]) == 6.0


def test_a_stage_that_was_measured_again_counts_once(results):
    leaderboard.refresh(results)
    before = (results / "stages.csv").read_bytes()
    scores = next((results / "runs").glob("demo-alpha-s0*")) / "scores.jsonl"
    text = scores.read_text()
    scores.write_text(text + text.splitlines(keepends=True)[-1])
    leaderboard.refresh(results)
    assert (results / "stages.csv").read_bytes() == before


def test_odd_runs_are_reported_and_break_nothing(results):
    joint = write_run(results, "joint", seed=0, matrix=[ALPHA[0], ALPHA[3]], stages=1)  # one stage trained all tasks
    silent = write_run(results, "silent", seed=0, matrix=ALPHA)
    (silent / "scores.jsonl").write_text("")
    (silent / "cost.jsonl").unlink()
    rows = {row["method"]: row for row in refreshed(results)}
    assert float(rows["joint"]["average_accuracy"]) == approx(2 / 3) and rows["joint"]["bwt"] == ""
    assert "stages 1, tasks 3" in rows["joint"]["notes"]
    assert rows["silent"]["average_accuracy"] == rows["silent"]["seconds_train"] == ""
    assert list(rows)[-1] == "silent"
    assert report.write(results).stat().st_size > 0
    (joint / "items" / "stage-01.npz").write_bytes(b"")
    with pytest.raises(UserMistake, match="stage-01.npz is damaged"):
        leaderboard.refresh(results)


def test_low_precision_runs_of_different_zero_stages_share_no_row(tmp_path):
    for dtype, num_rows in (("float32", 1), ("bfloat16", 2)):
        for zero_stage in (2, 3):
            folder = write_run(tmp_path / dtype, "alpha", seed=zero_stage, matrix=ALPHA)
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["config"]["engine"] |= {"dtype": dtype, "zero_stage": zero_stage}
            write_manifest(folder, manifest)
        assert len(refreshed(tmp_path / dtype)) == num_rows


def test_a_damaged_run_is_named_and_not_ranked(results):
    run = next((results / "runs").glob("demo-beta-s0*"))
    (run / "scores.jsonl").write_text("{}\n")
    (results / "runs" / "empty").mkdir()
    assert [row["n_seeds"] for row in refreshed(results)] == ["3", "2"]
    text = (results / "leaderboard.md").read_text()
    assert "2 of 7 runs are not ranked" in text and "2 unreadable" in text and run.name in text


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_incomplete_runs_are_in_stages_csv_and_not_ranked(results, status):
    run = write_run(results, "alpha", seed=7, matrix=ALPHA, status=status, stages=1)
    assert [row["n_seeds"] for row in refreshed(results)] == ["3", "3"]
    stages = {row["stage"] for row in read(results, "stages.csv") if row["run"] == run.name}
    kept = {row["stage"] for row in read(results, "retention.csv") if row["run"] == run.name}
    assert stages == kept == {"0", "1"}
    assert f"1 of 7 runs are not ranked; 1 {status}: {run.name}." in (results / "leaderboard.md").read_text()


def change_manifest(run, **changes):
    """Rewrites top-level keys of a run's manifest; None takes a key out."""
    path = run / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))


def test_a_run_whose_canaries_failed_or_were_not_run_is_named_and_not_ranked(results):
    failed = write_run(results, "alpha", seed=7, matrix=ALPHA, failed=["chance (a: 1.00 instead of 0.25)"])
    unknown = write_run(results, "alpha", seed=8, matrix=ALPHA)
    change_manifest(unknown, canaries=None)
    assert [row["n_seeds"] for row in refreshed(results)] == ["3", "3"]
    text = (results / "leaderboard.md").read_text()
    assert f"2 of 8 runs are not ranked; {failed.name}: failed canaries: chance (a: 1.00 instead of 0.25)" in text
    assert f"{unknown.name}: no canaries in its manifest" in text


def test_runs_on_other_data_are_a_table_of_their_own(results):
    other = write_run(results, "alpha", seed=7, matrix=ALPHA)
    change_manifest(other, stream_hash="other0")
    rows = refreshed(results)
    assert [(row["method"], row["stream_hash"], row["n_seeds"]) for row in rows] == [
        *(("alpha", "abc123", "3"), ("beta", "abc123", "3"), ("alpha", "other0", "1"))
    ]
    hashes = {(row["run"], row["stream_hash"]) for row in read(results, "retention.csv")}
    assert (other.name, "other0") in hashes and len(hashes) == 7


def test_a_probe_of_trained_data_is_flagged(results):
    run = write_run(results, "gamma", seed=7, matrix=ALPHA)
    change_manifest(run, trained_probes=["knowledge google/boolq: boolq"])
    (gamma,) = [row for row in refreshed(results) if row["method"] == "gamma"]
    assert "probe trained on: knowledge google/boolq: boolq" in gamma["notes"]


def test_variants_of_a_method_are_never_averaged(results):
    write_run(results, "alpha", seed=0, matrix=BETA, steps=120)
    rows = [row for row in refreshed(results) if row["method"] == "alpha"]
    assert [row["n_seeds"] for row in rows] == ["3", "1"]
    assert len({row["variant"] for row in rows}) == 2
    assert "variant: train.steps=60" in rows[0]["notes"] and "variant: train.steps=120" in rows[1]["notes"]
    assert f"alpha [{rows[1]['variant']}]" in (results / "leaderboard.md").read_text()


def test_seed_places_and_processes_make_no_variant(results):
    # write_run gives each seed its own top-level seed, method.seed and engine.processes.
    assert {row["n_seeds"] for row in refreshed(results)} == {"3"}


def test_a_seed_that_was_run_twice_is_one_replicate(results):
    write_run(results, "alpha", seed=2, matrix=ALPHA, name="demo-alpha-again")
    alpha = refreshed(results)[0]
    assert alpha["n_seeds"] == "3" and "4 runs of 3 seeds" in alpha["notes"]
    assert float(alpha["average_accuracy"]) == approx(2 / 3 + 0.01)


def test_notes_warn_of_single_seeds_dirty_commits_and_rows_below_the_untouched_model(tmp_path):
    worse = [ALPHA[0], *[[0.0, 0.0, 0.0]] * 3]
    write_run(tmp_path, "gamma", seed=0, matrix=worse, dirty=True)
    (row,) = refreshed(tmp_path)
    assert row["notes"] == "n_seeds<3: no interval; dirty commit; below base"
    assert row["average_accuracy_low"] == row["average_accuracy_high"] == ""


def test_methods_that_overlap_the_best_are_marked(results):
    for seed in range(3):  # .005 below alpha, whose interval is .025 wide on either side
        close = [ALPHA[0], *[[value - 0.005 for value in row] for row in ALPHA[1:]]]
        write_run(results, "close", seed=seed, matrix=close)
    leaderboard.refresh(results)
    lines = [line for line in (results / "leaderboard.md").read_text().splitlines() if line.startswith("| ")]
    accuracy = {cells[1].strip(): cells[3].strip() for cells in (line.split("|") for line in lines[2:])}
    assert accuracy == {"alpha": "**0.677 ± 0.025**", "close": "0.672 ± 0.025 ≈", "beta": "0.410 ± 0.025"}


def test_retention_is_undefined_with_a_reason_without_items(results):
    for path in (results / "runs").glob("demo-beta-*/items/stage-03.npz"):
        path.unlink()
    alpha, beta = refreshed(results)
    assert alpha["retention"] and not beta["retention"] and "retention undefined" in beta["notes"]
    last = [row for row in read(results, "retention.csv") if row["method"] == "beta" and row["stage"] == "3"]
    assert all(row["reason"] == "facts: stage 3 did not measure the items of stage 0" for row in last)


def test_an_empty_results_dir_gives_headers_and_one_line(tmp_path):
    done = command("leaderboard", tmp_path)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")
    for name in ("stages.csv", "retention.csv", "probes.csv", "leaderboard.csv"):
        assert (tmp_path / name).read_text().count("\n") == 1
    assert "There are no runs yet." in (tmp_path / "leaderboard.md").read_text()


@pytest.mark.parametrize("module", ["leaderboard", "report"])
def test_a_missing_results_dir_is_one_line_and_exit_code_2(module, tmp_path):
    done = command(module, tmp_path / "nowhere")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "nowhere" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(UserMistake):
        leaderboard.refresh(tmp_path / "nowhere")


def test_the_command_prints_the_table_and_the_path(results):
    done = command("leaderboard", results)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("alpha") < done.stdout.index("beta")
    assert "0.677 ± 0.025" in done.stdout and done.stdout.strip().endswith("leaderboard.csv")
    assert leaderboard.refresh(results).row_count == 2


def command(module, *arguments):
    """`python -m clbench.<module> arguments`."""
    run = [sys.executable, "-m", f"clbench.{module}", *map(str, arguments)]
    return subprocess.run(run, capture_output=True, text=True)


GENERATED = ("stages.csv", "retention.csv", "probes.csv", "leaderboard.csv", "leaderboard.md")


def generated(results):
    """The content of the files that a refresh writes."""
    leaderboard.refresh(results)
    return {name: (results / name).read_bytes() for name in GENERATED}


def test_packed_runs_give_the_same_tables_and_the_same_archive(results):
    run = write_run(results, "gamma", seed=0, matrix=ALPHA, status="interrupted", stages=1)
    (run / "checkpoint").mkdir()
    for name in ("checkpoint/stage.safetensors", "lock", "items/stage-02.tmp"):
        (run / name).write_text("not a record")
    before = generated(results)
    done = command("leaderboard", results, "--pack")
    assert (done.returncode, done.stderr) == (0, "") and run.is_dir()
    archive = (results / "runs.tar.xz").read_bytes()
    with tarfile.open(results / "runs.tar.xz") as members:
        assert [name for name in members.getnames() if run.name in name] == [
            f"runs/{run.name}/{name}"
            for name in (
                "cost.jsonl",
                "items/stage-00.npz",
                "items/stage-01.npz",
                "manifest.json",
                "scores.jsonl",
                "status",
            )
        ]
        assert {(member.mtime, member.uid, member.uname) for member in members} == {(0, 0, "")}
    shutil.rmtree(results / "runs")
    assert generated(results) == before
    pack(results)
    assert (results / "runs.tar.xz").read_bytes() == archive


def test_a_run_that_is_packed_and_a_directory_is_read_from_its_directory(results):
    pack(results)
    for run in (results / "runs").glob("demo-beta-*"):
        shutil.rmtree(run)
    (next((results / "runs").glob("demo-alpha-s0*")) / "status").write_text("failed\n")
    assert [(row["method"], row["n_seeds"]) for row in refreshed(results)] == [("alpha", "2"), ("beta", "3")]


@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_damaged_archive_is_one_line_and_exit_code_2(results, kept):
    pack(results)
    content = (results / "runs.tar.xz").read_bytes()
    (results / "runs.tar.xz").write_bytes(content[: int(kept * len(content))] or b"no archive")
    done = command("leaderboard", results)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "runs.tar.xz is damaged" in done.stderr


def test_a_directory_that_cannot_be_read_is_not_packed_over_what_the_archive_holds(results):
    pack(results)
    content, run = (results / "runs.tar.xz").read_bytes(), next((results / "runs").iterdir())
    shutil.rmtree(run)
    run.mkdir()
    with pytest.raises(UserMistake, match=f"runs/{run.name} of .* cannot be packed"):
        pack(results)
    assert (results / "runs.tar.xz").read_bytes() == content


@pytest.mark.slow
def test_the_reference_archive_gives_the_tables_beside_it(tmp_path):
    reference = Path(__file__).resolve().parent.parent / "results" / "reference"
    shutil.copy(reference / "runs.tar.xz", tmp_path)
    assert generated(tmp_path) == {name: (reference / name).read_bytes() for name in GENERATED}


def test_a_run_whose_files_may_not_be_read_or_are_missing_is_named(results):
    (next((results / "runs").glob("demo-alpha-s0*")) / "status").unlink()
    (next((results / "runs").glob("demo-beta-s0*")) / "manifest.json").write_text('{"tasks": ["a"], "metrics": {}}')
    assert [row["n_seeds"] for row in refreshed(results)] == ["2", "2"]
    text = (results / "leaderboard.md").read_text()
    assert "no readable status" in text and "manifest.json lacks a, config, config_hash" in text


def test_the_leaderboard_needs_neither_torch_nor_matplotlib():
    code = "import json, sys, clbench.leaderboard, clbench.report; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert not {"torch", "matplotlib", "hydra", "scipy.stats"} & set(loaded)


def test_the_report_is_one_self_contained_file(results):
    write_run(results, "alpha", seed=0, matrix=BETA, steps=120)
    write_run(results, "beta<b>", seed=9, matrix=BETA, status="failed", stages=1)
    page = report.write(results).read_text(encoding="utf-8")
    sources = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    assert sources and all(source.startswith(("data:image/", "#")) for source in sources)
    assert "<script" not in page and "beta<b>" not in page and "beta&lt;b&gt;" in page
    for text in ("alpha", "c0ffee", "python -m clbench method=alpha seed=0", "0.677", "not ranked"):
        assert text in page, text


def test_the_report_of_nothing_says_so(tmp_path):
    assert "There are no runs yet." in report.write(tmp_path).read_text(encoding="utf-8")


def test_a_report_of_the_same_runs_has_the_same_bytes(results):
    assert report.write(results).read_bytes() == report.write(results).read_bytes()
