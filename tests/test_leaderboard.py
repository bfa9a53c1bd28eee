"""A small results directory with known answers: two methods, three seeds, three tasks."""

import csv
import json
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pytest import approx

from clbench.config import variant
from clbench.record.runs import pack, read_runs
from clbench.record.seals import SEALS
from clbench.report import columns, measures
from clbench.report import html as report
from clbench.report import tables as leaderboard
from clbench.report.columns import FILES
from clbench.report.search import search
from clbench.report.summary import summarise
from clbench.stream import ordered
from clbench.types import Cost, Score, UserMistake
from tests.test_verify import reseal

RESULTS = Path(__file__).resolve().parent.parent / "results"
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
        spread = tuple(value + 0.1 * (-1) ** item for item in range(40))  # their mean is the value
        yield Score(**at, probe="stream", task=task, metric="accuracy", value=value, n=40, stderr=0.05, items=spread)
        yield Score(**at, probe="stream", task=task, metric="format_validity", value=0.9, n=40, stderr=0.0)
    if stage == 0:
        for task, chance, majority in (("sums", 0.0, 0.1), ("food", 0.25, 0.4)):
            yield Score(**at, probe="stream", task=task, metric="chance", value=chance, n=40, stderr=0.0)
            yield Score(**at, probe="stream", task=task, metric="majority", value=majority, n=40, stderr=0.0)
            yield Score(**at, probe="stream", task=task, metric="copy", value=majority / 2, n=40, stderr=0.0)
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
    nll = 1.0 + (np.log(2) if stage == 3 else 0.0)
    yield Score(**at, **drift, metric="nll_token", value=nll, items=(200 * nll, 700 * nll))  # two texts
    kl = {"probe": "divergence", "task": "heldout", "metric": "kl_token", "n": 2, "stderr": 0.0}
    yield Score(**at, **kl, value=0.1 * stage, items=(0.0, 0.2 * stage))
    weights = {"probe": "update", "task": "weights", "metric": "relative_norm", "n": 7, "stderr": float("nan")}
    yield Score(**at, **weights, value=0.02 * stage)
    yield Score(**at, **drift, metric="bits_per_byte", value=0.75 if stage == 3 else 0.5)


def write_run(
    results,
    method,
    *,
    seed,
    matrix,
    order="default",
    status="complete",
    stages=3,
    steps=60,
    name="",
    dirty=False,
    failed=(),
    fast=(),
):
    """One run directory as the ledger writes it; `fast`: the matrix of a secondary view of that name."""
    run = name or f"demo-{method}-s{seed}-{order.replace(':', '')}{steps:08x}"
    folder = results / "runs" / run
    (folder / "items").mkdir(parents=True)
    manifest = {
        "run": run,
        "experiment": "demo",
        **{"stream": "three", "order": order, "model": "tiny", "method": method, "seed": seed},
        "config": {
            "seed": seed,
            "order": order,
            "results_dir": str(results),
            "method": {"name": method, "seed": seed, "data": f"{results}"},
            "train": {"steps": steps, "lr": 1e-3},
            "engine": {"dtype": "float32", "processes": 1 + seed},
        },
        "config_hash": f"{seed}{steps}",
        "stream_hash": "abc123",
        "canaries": {"checked": 4, "failed": list(failed)},
        "git": {"commit": "c0ffee", "dirty": dirty},
        "tasks": ordered(TASKS, order),
        "metrics": dict.fromkeys(TASKS, "accuracy"),
        "command": f"python -m clbench method={method} seed={seed}",
    }
    write_manifest(folder, manifest)
    (folder / "status").write_text(status + "\n")
    with (folder / "scores.jsonl").open("w") as lines, (folder / "cost.jsonl").open("w") as costs:
        for stage in range(stages + 1):
            row = [value + 0.01 * seed * (stage > 0) for value in matrix[stage]]
            scores = list(stage_scores(stage, row))
            if fast:
                scores += [replace(one, probe=f"{one.probe}@fast") for one in stage_scores(stage, fast[stage])]
            for score in scores:
                record = {
                    key: None if value != value else value for key, value in vars(score).items() if key != "items"
                }
                lines.write(json.dumps(record) + "\n")
            kept = {f"{s.probe}|{s.task}|{s.metric}": np.array(s.items, dtype=np.float32) for s in scores if s.items}
            np.savez_compressed(folder / "items" / f"stage-{stage:02d}.npz", **kept)
            costs.write(json.dumps(vars(stage_cost(stage)) | {"joules": None}) + "\n")
    reseal(folder)
    return folder


def write_manifest(folder, manifest):
    """The manifest, its variant as its configuration makes it."""
    (folder / "manifest.json").write_text(json.dumps(manifest | {"variant": variant(manifest["config"])}))
    reseal(folder)


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
    assert [alpha[f"n_{what}"] for what in ("orders", "seeds", "blocks")] == ["1", "3", "3"]
    assert (alpha["stream"], alpha["model"]) == ("three", "tiny")
    assert alpha["notes"] == "n_blocks<6: no claim of difference"


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
    "kl_to_base": 0.3,
    "update_norm": 0.06,
    "bits_per_byte_drift": 0.25,
    "format_validity": 0.9,
    "base_accuracy": 0.2,
    "chance_accuracy": 0.25 / 3,  # 0, .25 and, for the task of free answers, none
    "majority_accuracy": 0.5 / 3,
    "copy_accuracy": 0.25 / 3,
    "seconds_train": 6.0,
    "seconds_probe": 2.0,
    "seconds_other": 0.5,
    "tokens_trained": 3000,
    "tokens_replayed": 300,
    "trainable_parameters": 4096,
    "peak_memory_bytes": 1_000_003,
    "flops": 3e9,
}


@pytest.mark.parametrize("name", FILES)
def test_every_column_is_documented_and_no_other(blocks, name):
    header = (blocks / name).read_text().split("\n")[0].split(",")
    documented = [column for one in FILES[name][1] for column in one.names]
    assert header == documented and len(set(documented)) == len(documented)
    assert all(one.unit and one.definition and one.source for one in FILES[name][1])


@pytest.mark.parametrize("name", ["published.csv", "benchmarks.csv", "real/validation.csv"])
def test_every_column_of_a_file_that_is_not_made_of_records_is_documented_and_no_other(name):
    header = (RESULTS / name).read_text(encoding="utf-8").split("\n")[0].split(",")
    page = (RESULTS / "COLUMNS.md").read_text(encoding="utf-8")
    section = page.partition(f"## {name}\n")[2].partition("## ")[0]
    rows = re.findall(r"^\| (`.*?`) \| ([^|]+) \| ([^|]+) \|", section, re.MULTILINE)
    assert header == [column for names, _, _ in rows for column in re.findall("`([^`]+)`", names)]


def test_the_page_of_columns_is_that_of_the_code():
    page = RESULTS / "COLUMNS.md"
    assert page.read_text(encoding="utf-8").startswith(columns.page())


def test_the_json_twin_has_the_rows_of_the_leaderboard(blocks):
    rows, twin = read(blocks, "leaderboard.csv"), json.loads((blocks / "leaderboard.json").read_text())
    assert [{name: "" if value is None else str(value) for name, value in row.items()} for row in twin] == rows


def test_stages_csv_is_long_and_sorted(results):
    rows = refreshed(results, "stages.csv")
    header = (results / "stages.csv").read_text().split("\n")[0]
    assert header == "stream,order,model,method,seed,stage,stage_name,probe,task,metric,value,n,stderr,run"
    keys = [(r["method"], int(r["seed"]), int(r["stage"]), r["probe"], r["task"], r["metric"]) for r in rows]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)
    one = next(r for r in rows if (r["method"], r["seed"], r["stage"], r["task"]) == ("alpha", "1", "2", "food"))
    assert (one["value"], one["stage_name"], one["n"]) == ("0.71", "food", "40")
    assert {r["probe"] for r in rows} == {"stream", "knowledge", "perplexity", "divergence", "update"}
    assert all(r["stderr"] == "" for r in rows if r["probe"] in ("perplexity", "update"))


def test_a_secondary_view_of_the_weights_is_a_row_of_its_own(tmp_path):
    write_run(tmp_path, "alpha", seed=0, matrix=ALPHA, fast=BETA)
    rows = {row["method"]: row for row in refreshed(tmp_path)}
    assert rows.keys() == {"alpha", "alpha@fast"}
    assert float(rows["alpha"]["average_accuracy"]) == approx(2 / 3)
    assert float(rows["alpha@fast"]["average_accuracy"]) == approx(0.4)
    assert rows["alpha"]["retention"] == rows["alpha@fast"]["retention"] != ""
    assert rows["alpha"]["tokens_trained"] == rows["alpha@fast"]["tokens_trained"]
    (accuracy, *_) = read(tmp_path, "differences.csv")
    assert (accuracy["method"], accuracy["other"], accuracy["n_items"]) == ("alpha", "alpha@fast", "120")
    methods = {(row["method"], row["probe"]) for row in read(tmp_path, "stages.csv")}
    assert {("alpha", "stream"), ("alpha@fast", "stream"), ("alpha@fast", "knowledge")} <= methods
    assert "All 1 runs are complete" in (tmp_path / "leaderboard.md").read_text()


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


def add_majorities(run):
    """The commonest answer: of "logic" above chance, of "facts" below."""
    first = json.loads((run / "scores.jsonl").read_text().splitlines()[0])
    with (run / "scores.jsonl").open("a") as lines:
        for task, share in (("logic", 0.6), ("facts", 0.2)):
            own = {"probe": "knowledge", "task": task, "metric": "majority", "value": share}
            lines.write(json.dumps(first | own) + "\n")
    reseal(run)


def test_the_floor_is_the_majority_where_that_is_above_chance(results):
    run = next((results / "runs").glob("demo-alpha-s0*"))
    add_majorities(run)
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
        reseal(run)
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
    for name in GENERATED:
        assert (results / name).read_bytes() == (other / name).read_bytes(), name
    assert not list(results.glob("*.tmp")) and not list(results.glob(".*.tmp"))


def edited(old: str, new: str):
    """A record's content with a first `old` made `new`."""

    def edit(content: bytes) -> bytes:
        assert old.encode() in content
        return content.replace(old.encode(), new.encode(), 1)

    return edit


@pytest.mark.parametrize(
    ("record", "touch"),
    [
        ("scores.jsonl", edited('"value": 0.', '"value": 0.9')),
        ("scores.jsonl", lambda content: content[:-20]),
        ("scores.jsonl", lambda content: content[: content[:-1].rindex(b"\n") + 1]),
        ("scores.jsonl", lambda content: content + b'{"stage": 3, "stage_name": "rhy'),
        ("scores.jsonl", lambda content: b"garbage"),
        ("cost.jsonl", lambda content: b""),
        ("manifest.json", edited('"seed": 0', '"seed": 8')),
        ("items/stage-03.npz", lambda content: content[:-1] + b"?"),
        ("seals.jsonl", lambda content: b""),
    ],
)
def test_a_run_whose_records_were_touched_is_named_and_not_ranked(results, record, touch):
    run = next((results / "runs").glob("demo-beta-s0*"))
    (run / record).write_bytes(touch((run / record).read_bytes()))
    assert [row["n_seeds"] for row in refreshed(results)] == ["3", "2"]
    left = (results / "leaderboard.md").read_text()
    assert "1 of 6 runs are not ranked" in left and "1 unreadable" in left and run.name in left


def test_odd_runs_are_reported_and_break_nothing(results):
    write_run(results, "joint", seed=0, matrix=[ALPHA[0], ALPHA[3]], stages=1)  # one stage trained all tasks
    silent = write_run(results, "silent", seed=0, matrix=ALPHA)
    (silent / "scores.jsonl").write_text("")
    (silent / "cost.jsonl").unlink()
    reseal(silent)
    rows = {row["method"]: row for row in refreshed(results)}
    assert float(rows["joint"]["average_accuracy"]) == approx(2 / 3) and rows["joint"]["bwt"] == ""
    assert "stages 1, tasks 3" in rows["joint"]["notes"]
    assert rows["silent"]["average_accuracy"] == rows["silent"]["seconds_train"] == ""
    assert list(rows)[-1] == "silent"
    assert report.write(results).stat().st_size > 0


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


@pytest.mark.parametrize("status", ["complete\n", "complete"])
def test_a_run_that_calls_itself_complete_with_fewer_stages_is_not_ranked(results, status):
    # As a copy that was made while it ran leaves it: whole records of two stages, and the status of later.
    run = write_run(results, "alpha", seed=7, matrix=ALPHA, stages=2)
    (run / "status").write_text(status)
    (run / SEALS).write_text((run / SEALS).read_text().replace('"stage": 3', '"stage": 2'))
    assert [row["n_seeds"] for row in refreshed(results)] == ["3", "3"]
    assert f"{run.name} (ValueError: its records end with stage 2 of 3" in (results / "leaderboard.md").read_text()


def test_seals_that_cannot_be_read_are_named(results):
    run = next((results / "runs").glob("demo-beta-s0*"))
    (run / SEALS).write_text("garbage\n")
    assert f"{SEALS} cannot be read" in (read_runs(results).runs.set_index("run").loc[run.name, "problem"])


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
    reseal(run)


def test_a_run_whose_canaries_failed_or_were_not_run_is_named_and_not_ranked(results):
    failed = write_run(results, "alpha", seed=7, matrix=ALPHA, failed=["chance (a: 1.00 instead of 0.25)"])
    unknown = write_run(results, "alpha", seed=8, matrix=ALPHA)
    change_manifest(unknown, canaries=None)
    assert [row["n_seeds"] for row in refreshed(results)] == ["3", "3"]
    text = (results / "leaderboard.md").read_text()
    assert f"2 of 8 runs are not ranked; {failed.name}: failed canaries: chance (a: 1.00 instead of 0.25)" in text
    assert f"{unknown.name}: no canaries in its manifest" in text


def test_a_run_whose_own_model_is_off_plain_forwards_is_named_and_not_ranked(results):
    run = write_run(results, "alpha", seed=7, matrix=ALPHA)
    line = json.loads((run / "scores.jsonl").read_text().splitlines()[-1])
    off = line | {"stage": 1, "probe": "canaries", "task": "scoring", "metric": "failed", "value": 1.0}
    with (run / "scores.jsonl").open("a") as lines:
        lines.write(json.dumps(off) + "\n")
    reseal(run)
    assert [row["n_seeds"] for row in refreshed(results)] == ["3", "3"]
    said = f"{run.name}: failed canaries on its own model: scoring after stage 1"
    assert said in (results / "leaderboard.md").read_text()


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
    assert alpha["n_seeds"] == "3" and "4 runs of 3 blocks" in alpha["notes"]
    assert float(alpha["average_accuracy"]) == approx(2 / 3 + 0.01)


def test_notes_warn_of_single_seeds_dirty_commits_and_rows_below_the_untouched_model(tmp_path):
    worse = [ALPHA[0], *[[0.0, 0.0, 0.0]] * 3]
    write_run(tmp_path, "gamma", seed=0, matrix=worse, dirty=True)
    (row,) = refreshed(tmp_path)
    assert row["notes"] == "n_blocks<6: no claim of difference; dirty commit; below base"
    assert row["average_accuracy_low"] == row["average_accuracy_high"] == ""


def noisy(matrix, *, seed, shift=0.0):
    """The matrix with every score after training moved by `shift`, and by noise that depends on `seed`."""
    noise = np.random.default_rng(seed).normal(0, 0.01, size=(3, 3)) + shift
    return [matrix[0], *(np.array(matrix[1:]) + noise).tolist()]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """The tables of `write_blocks`."""
    folder = tmp_path_factory.mktemp("blocks")
    write_blocks(folder)
    leaderboard.refresh(folder)
    return folder


def write_blocks(folder):
    """Six blocks each of alpha, of gamma, which cannot be told from it, and of beta, which is worse, and three of delta; still trains nothing."""
    for number, (order, seed) in enumerate(
        (order, seed) for order in ("default", "reversed", "latin:1") for seed in (0, 1)
    ):
        shift = {"default": 0.0, "reversed": 0.03, "latin:1": -0.02}[order]
        for base, (method, matrix) in enumerate({"alpha": ALPHA, "beta": BETA, "gamma": ALPHA}.items()):
            moved = noisy(matrix, seed=10 * base + number, shift=shift)
            write_run(folder, method, seed=seed, order=order, matrix=moved)
        if seed == 0:
            write_run(folder, "delta", seed=seed, order=order, matrix=BETA)
    write_run(folder, "still", seed=0, matrix=[ALPHA[0]] * 4)
    change_cost(next((folder / "runs").glob("demo-still*")), tokens_trained=0)


def change_cost(run, **changes):
    """Rewrites fields of every line of a run's costs."""
    lines = (run / "cost.jsonl").read_text().splitlines()
    (run / "cost.jsonl").write_text("".join(json.dumps(json.loads(line) | changes) + "\n" for line in lines))
    reseal(run)


def test_orders_and_seeds_are_blocks_of_one_row(blocks):
    rows = {row["method"]: row for row in read(blocks, "leaderboard.csv")}
    assert len(rows) == 5
    assert [rows["alpha"][f"n_{what}"] for what in ("orders", "seeds", "blocks")] == ["3", "2", "6"]
    assert [rows["delta"][f"n_{what}"] for what in ("orders", "seeds", "blocks")] == ["3", "1", "3"]
    assert "no claim of difference" in rows["delta"]["notes"]
    # What an order does to a method is shared by its seeds.
    assert rows["alpha"]["notes"] == "3 orders in 6 blocks: differences are claimed too often"
    assert "| 6 (3, 2) |" in (blocks / "leaderboard.md").read_text()


def test_names_of_one_order_of_the_tasks_are_one_block(tmp_path):
    for order in ("default", "latin:3", "latin:6", "latin:1", "latin:4"):
        write_run(tmp_path, "alpha", seed=0, order=order, matrix=ALPHA)
    (row,) = refreshed(tmp_path)
    assert [row[f"n_{what}"] for what in ("orders", "seeds", "blocks")] == ["2", "1", "2"]
    assert "5 runs of 2 blocks" in row["notes"]


def test_order_sensitivity_is_between_the_best_and_the_worst_order(tmp_path):
    for order, shift in {"default": 0.0, "reversed": 0.03, "latin:1": -0.02}.items():
        for seed in (0, 1):  # seed 1 adds .01 to all orders alike
            moved = [ALPHA[0], *(np.array(ALPHA[1:]) + shift).tolist()]
            write_run(tmp_path, "alpha", seed=seed, order=order, matrix=moved)
    write_run(tmp_path, "beta", seed=0, matrix=BETA)
    alpha, beta = refreshed(tmp_path)
    assert float(alpha["order_sensitivity"]) == approx(0.05) and beta["order_sensitivity"] == ""
    assert float(alpha["average_accuracy"]) == approx(2 / 3 + 0.01 / 3 + 0.005)


def test_differences_csv_has_every_pair_and_measure(blocks):
    rows = read(blocks, "differences.csv")
    # Of alpha, beta, gamma and delta, six pairs; what trains nothing is a reference.
    names = [one.name for one in measures.COMPARED]
    assert [row["measure"] for row in rows] == [name for name in names for _ in range(6)]
    assert {row["method"] for row in rows} | {row["other"] for row in rows} == {"alpha", "beta", "gamma", "delta"}
    accuracy = {(row["method"], row["other"]): row for row in rows if row["measure"] == "average_accuracy"}
    first, second = sorted(("alpha", "gamma"), key=[pair[0] for pair in accuracy].index)
    assert accuracy[first, second]["verdict"] == "not separated" and accuracy[first, second]["n_items"] == "120"
    better = accuracy["alpha", "beta"]
    assert better["verdict"] == "better" and float(better["p_permutation"]) == 2 / 64
    assert 0 < float(better["low"]) < float(better["difference"]) < float(better["high"]) < 1
    assert {row["verdict"] for pair, row in accuracy.items() if "delta" in pair} == {"too few blocks"}
    assert all(row["q"] == "" for pair, row in accuracy.items() if "delta" in pair)


def test_ranks_are_those_that_the_differences_allow(blocks):
    rows = {row["method"]: row for row in read(blocks, "leaderboard.csv")}
    ranks = {
        method: (row["average_accuracy_rank_best"], row["average_accuracy_rank_worst"]) for method, row in rows.items()
    }
    assert ranks == {
        "alpha": ("1", "3"),
        "gamma": ("1", "3"),
        "beta": ("3", "4"),
        "delta": ("1", "4"),
        "still": ("", ""),
    }
    assert {row["retention_rank_worst"] for method, row in rows.items() if method != "still"} == {"4"}


def test_methods_that_may_be_the_best_are_marked(blocks):
    lines = [line for line in (blocks / "leaderboard.md").read_text().splitlines() if line.startswith("| ")]
    accuracy = [(cells[1].strip(), cells[3].strip()) for cells in (line.split("|") for line in lines[2:])]
    best, *others = [(method, "**" in cell, "≈" in cell) for method, cell in accuracy]
    assert best[1:] == (True, False) and {best[0], others[0][0]} == {"alpha", "gamma"}
    assert {method: tied for method, _, tied in others[1:]} == {"beta": False, "delta": True, "still": False}


def test_items_add_up_to_the_measure_that_they_are_made_of(results):
    for run in (results / "runs").iterdir():
        add_majorities(run)
    records = read_runs(results)
    summary = summarise(records)
    ranked = records.runs.set_index("run").assign(stages=3)
    items = dict(measures._items(records, ranked, measures.COMPARED))
    compared = [one for one in measures.COMPARED if one.column in summary.measures]
    assert len(compared) == len(measures.COMPARED) == 7
    for one in compared:
        for run, value in summary.measures[one.column].items():
            assert sum(own.mean() for own in items[run, one.name].values()) == approx(one.scale(value), abs=1e-6), (
                one.name
            )


def test_a_task_that_ends_the_stream_has_no_part_in_the_items_of_bwt(results):
    records = read_runs(results)
    items = dict(measures._items(records, records.runs.set_index("run").assign(stages=3), measures.COMPARED))
    of_tasks = next(own for (_, name), own in items.items() if name == "bwt")
    assert [bool(own.any()) for own in of_tasks.values()] == [True, True, False]


def test_retention_is_undefined_with_a_reason_without_items(results):
    for path in (results / "runs").glob("demo-beta-*/items/stage-03.npz"):
        path.unlink()
        reseal(path.parents[1])
    alpha, beta = refreshed(results)
    assert alpha["retention"] and not beta["retention"] and "retention undefined" in beta["notes"]
    last = [row for row in read(results, "retention.csv") if row["method"] == "beta" and row["stage"] == "3"]
    assert all(row["reason"] == "facts: stage 3 did not measure the items of stage 0" for row in last)


def test_an_empty_results_dir_gives_headers_and_one_line(tmp_path):
    done = command("leaderboard", tmp_path)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")
    for name in FILES:
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


GENERATED = (*FILES, "leaderboard.json", "leaderboard.md")


def generated(results):
    """The content of the files that a refresh writes."""
    leaderboard.refresh(results)
    return {name: (results / name).read_bytes() for name in GENERATED}


def test_deleted_tables_come_back_byte_for_byte(blocks):
    before = {name: (blocks / name).read_bytes() for name in GENERATED}
    for name in GENERATED:
        (blocks / name).unlink()
    assert generated(blocks) == before


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
                "seals.jsonl",
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


def test_a_folder_in_place_of_a_record_makes_an_archive_damaged(tmp_path):
    (tmp_path / "scores.jsonl").mkdir()
    with tarfile.open(tmp_path / "runs.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "scores.jsonl", "runs/demo/scores.jsonl")
    with pytest.raises(UserMistake, match="runs.tar.xz is damaged .*demo/scores.jsonl is no file"):
        read_runs(tmp_path)


def test_a_directory_that_cannot_be_read_is_not_packed_over_what_the_archive_holds(results):
    pack(results)
    content, run = (results / "runs.tar.xz").read_bytes(), next((results / "runs").iterdir())
    shutil.rmtree(run)
    run.mkdir()
    with pytest.raises(UserMistake, match=f"runs/{run.name} of .* cannot be packed"):
        pack(results)
    assert (results / "runs.tar.xz").read_bytes() == content


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["reference", "reference/tuning", "real", "real/tuning"])
def test_an_archive_gives_the_tables_beside_it(folder, tmp_path):
    committed = RESULTS / folder
    if not (committed / "runs.tar.xz").is_file():
        pytest.skip("this search is not recorded yet")
    shutil.copy(committed / "runs.tar.xz", tmp_path)
    kept = {name for name in GENERATED if name != "stages.csv"} if folder in ("reference", "real") else {"search.csv"}
    beside = {path.name: path.read_bytes() for path in committed.iterdir() if path.name in GENERATED}
    assert kept <= beside.keys() and beside.items() <= generated(tmp_path).items()


def test_a_run_whose_files_may_not_be_read_or_are_missing_is_named(results):
    (next((results / "runs").glob("demo-alpha-s0*")) / "status").unlink()
    (next((results / "runs").glob("demo-beta-s0*")) / "manifest.json").write_text('{"tasks": ["a"], "metrics": {}}')
    reseal(next((results / "runs").glob("demo-beta-s0*")))
    assert [row["n_seeds"] for row in refreshed(results)] == ["2", "2"]
    text = (results / "leaderboard.md").read_text()
    assert "no readable status" in text and "manifest.json lacks a, config, config_hash" in text


def test_the_leaderboard_needs_no_torch():
    code = "import json, sys, clbench.leaderboard, clbench.report; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert not {"torch", "hydra", "scipy.stats"} & set(loaded)


def test_a_search_names_the_chosen_setting_of_each_method_and_the_edges_it_stands_at(tmp_path):
    for steps, shift in ((20, -0.1), (40, 0.1), (60, 0.0)):
        moved = [ALPHA[0], *(np.array(ALPHA[1:]) + shift).tolist()]
        for seed in (0, 1):
            write_run(tmp_path, "alpha", seed=seed, matrix=moved, steps=steps)
    write_run(tmp_path, "beta", seed=0, matrix=BETA)
    leaderboard.refresh(tmp_path)
    rows = read(tmp_path, "search.csv")  # beta has one setting: nothing was searched
    assert [(row["method"], row["settings"], row["chosen"], row["edge"]) for row in rows] == [
        ("alpha", "train.steps=40", "1", ""),
        ("alpha", "train.steps=60", "0", "train.steps highest"),
        ("alpha", "train.steps=20", "0", "train.steps lowest"),
    ]
    # Accuracy is 2/3 + .1 and .005 for the seeds' mean; retention_probability is .375 / .75.
    assert float(rows[0]["criterion"]) == approx(2 * (2 / 3 + 0.105) * 0.5 / (2 / 3 + 0.105 + 0.5))
    assert rows[0]["n_blocks"] == "2"


def test_a_search_without_a_knowledge_probe_takes_the_inverse_perplexity_ratio_for_what_was_kept(tmp_path):
    for steps in (20, 40):
        write_run(tmp_path, "alpha", seed=0, matrix=ALPHA, steps=steps)
    summary = summarise(read_runs(tmp_path))
    ratios = [1.25 if "steps=20" in notes else 0.5 for notes in summary.leaderboard["notes"]]
    unprobed = summary.leaderboard.assign(retention_probability=np.nan, perplexity_ratio=ratios)
    found = search(replace(summary, leaderboard=unprobed)).set_index("settings")["criterion"]
    assert found["train.steps=20"] == approx(2 * (2 / 3) * 0.8 / (2 / 3 + 0.8))
    assert found["train.steps=40"] == approx(2 * (2 / 3) / (2 / 3 + 1)), (
        "a text that is read better counts as kept whole"
    )
