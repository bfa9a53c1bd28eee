"""A whole tiny run, then one edit at a time: what a hand did to records or tables is named."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from clbench import experiment
from clbench.config.composition import compose
from clbench.record.runs import pack
from clbench.record.seals import SEALED, SEALS, seal
from clbench.report import tables
from clbench.report.columns import FILES
from clbench.verify import verify


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A results directory with one complete run, which kept every checkpoint, and its tables."""
    results = tmp_path_factory.mktemp("finished")
    config = compose([*tiny, f"results_dir={results}", "train.checkpoint=all"])
    experiment.run(config)
    tables.refresh(results)
    return results


@pytest.fixture()
def results(finished, tmp_path):
    """A copy to edit."""
    return Path(shutil.copytree(finished, tmp_path / "results"))


def run_of(results):
    (run,) = (results / "runs").iterdir()
    return run


def reseal(run):
    """The seals as the ledger would have left them, had it written what is there now."""
    records = {path.relative_to(run).as_posix(): path.read_bytes() for pattern in SEALED for path in run.glob(pattern)}
    (run / SEALS).write_text(json.dumps(seal(records, stage=3)) + "\n")


def manifest(change):
    """An edit of the manifest: `change` gets it."""

    def edit(run):
        plain = json.loads((run / "manifest.json").read_text())
        change(plain)
        (run / "manifest.json").write_text(json.dumps(plain))

    return edit


def lines(file="scores.jsonl", *, of, **values):
    """An edit of the lines of a record that have the values `of`; 0.01 is added to their value unless `values` says otherwise."""

    def edit(run):
        rows = [json.loads(line) for line in (run / file).read_text().splitlines()]
        chosen = [row for row in rows if all(row[key] == value for key, value in of.items())]
        assert chosen, of
        for row in chosen:
            row |= values or {"value": row["value"] + 0.01}
        (run / file).write_text("".join(json.dumps(row) + "\n" for row in rows))

    return edit


def items(change, *, of):
    """An edit of the items after stage 3: `change` gets those whose "probe|task|metric" begins and ends as `of` does, and gives others."""

    def edit(run):
        path = run / "items" / "stage-03.npz"
        with np.load(path) as kept:
            own = {key: kept[key] for key in kept.files}
        key = next(key for key in own if key.startswith(of[0]) and key.endswith(of[1]))
        np.savez_compressed(path, **own | change(key, own[key].copy()))

    return edit


def flipped(key, own):
    own[0] = 1 - own[0]
    return {key: own}


def apart(key, own):
    """Their mean stays."""
    own[:2] += [0.5, -0.5]
    return {key: own}


def without_items(edit):
    """As records have it that kept no items."""

    def both(run):
        shutil.rmtree(run / "items")
        edit(run)

    return both


FORM = {"probe": "stream", "metric": "format_validity"}
TEXT = {"stage": 3, "probe": "perplexity"}
KL = ("divergence|", "kl_token")
EDITS = {
    "learning rate": (manifest(lambda it: it["config"]["train"].update(lr=1.0)), "manifest.json has config_hash"),
    "variant": (manifest(lambda it: it.update(variant="0" * 8)), "manifest.json has variant '00000000'"),
    "seed": (manifest(lambda it: it.update(seed=7)), "manifest.json has seed 7, what it follows from gives 0"),
    "method": (manifest(lambda it: it.update(method="mine")), "manifest.json has method 'mine'"),
    "model": (manifest(lambda it: it.update(model="mine")), "manifest.json has model 'mine'"),
    "order": (manifest(lambda it: it.update(order="reversed")), "manifest.json has order 'reversed'"),
    "tasks": (manifest(lambda it: it["tasks"].reverse()), "manifest.json has tasks"),
    "metric": (manifest(lambda it: it["metrics"].update({it["tasks"][0]: "copy"})), "manifest.json has metrics"),
    "rows": (manifest(lambda it: it["data"][it["tasks"][0]].update(train_rows=9)), "manifest.json has stream_hash"),
    "verdict": (manifest(lambda it: it["canaries"]["results"][0].update(passed=False)), "has other failed canaries"),
    "canaries left out": (manifest(lambda it: it["canaries"]["results"].pop()), "has other failed canaries"),
    "no results": (manifest(lambda it: it["canaries"].pop("results")), "has no results of its canaries"),
    "no canaries": (manifest(lambda it: it.pop("canaries")), "KeyError: 'canaries'"),
    "name": (lambda run: run.rename(run.with_name("mine")), "manifest.json is that of "),
    "score": (lines(of=FORM | {"stage": 3}), "|format_validity is "),
    "count": (lines(of=FORM, n=5), "|format_validity is over 5 items, 6 are kept"),
    "standard error": (lines(of={"probe": "divergence", "stage": 2}, stderr=0.9), "has the standard error 0.9, "),
    "log-likelihood": (lines(of=TEXT | {"metric": "nll_token"}), "|nll_token is "),
    "bits": (lines(of=TEXT | {"metric": "bits_per_byte"}), "|bits_per_byte is "),
    "perplexity": (lines(of=TEXT | {"metric": "word_perplexity"}), "|word_perplexity is "),
    "gap": (lines(of={"stage": 1, "task": "scoring", "metric": "gap_nats"}, value=0.5), "scoring|failed is 0.0, other"),
    "allowed gap": (
        lines(of={"task": "scoring", "metric": "allowed_nats"}, value=9.0),
        "allowed_nats is 9.0, allowed are 0.0001",
    ),
    "own canaries": (
        lines(of={"stage": 1, "probe": "canaries"}, probe="mine"),
        "stage 1: scores.jsonl has no canaries",
    ),
    "stage's name": (lines(of={"stage": 2}, stage_name="mine"), " names its stage mine, it is "),
    "stage": (lines(of={"stage": 2}, stage=9), "IndexError: "),
    "cost": (lines("cost.jsonl", of={"stage": 2}, stage=7), "cost.jsonl has stages [0, 1, 7, 3]"),
    "a score twice": (lines(of=FORM, metric="format_loss"), " stands twice"),
    "form": (without_items(lines(of={"stage": 3, "metric": "format_loss"})), "|format_loss is "),
    "answer": (items(flipped, of=("knowledge|", "|acc")), "stage 3: knowledge|"),
    "two items": (items(apart, of=KL), "has the standard error "),
    "one item more": (items(lambda key, own: {key: np.append(own, 0)}, of=KL), " items, "),
    "no score": (items(lambda key, own: {"mine|own|acc": own}, of=KL), "have mine|own|acc, which scores.jsonl has not"),
    "damaged": (lambda run: os.truncate(run / "items" / "stage-02.npz", 5000), "BadZipFile: "),
}
"""An edit of a run's directory, and what is said of it though the records are sealed again."""


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_that_seals_again_is_named(results, name):
    edit, said = EDITS[name]
    edit(run_of(results))
    reseal(run_of(results))
    found, count = verify(results)
    assert count == 1 and any(said in one for one in found), found
    assert found[-1] == "the tables are not looked at until the records are whole"
    assert verify(run_of(results))[0] == found[:-1]


@pytest.mark.parametrize("record", ["manifest.json", "scores.jsonl", "cost.jsonl", "items/stage-01.npz"])
def test_a_byte_that_no_other_number_follows_from_is_held_by_the_seal(results, record):
    path = run_of(results) / record
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    assert f"{record} is not what it was" in verify(results)[0][0]


def test_an_edit_is_caught_where_only_the_last_seal_is_made_again(results):
    run = run_of(results)
    seals = (run / SEALS).read_text().splitlines()
    lines("cost.jsonl", of={"stage": 0}, flops=1.0)(run)
    assert len(seals) == 4
    reseal(run)
    (run / SEALS).write_text("".join(f"{line}\n" for line in [*seals[:3], (run / SEALS).read_text().strip()]))
    assert verify(run)[0] == [f"{run.name}: ValueError: cost.jsonl is not what it was when stage 0 was finished"]


def test_records_that_nobody_touched_are_verified(results):
    assert verify(results) == verify(run_of(results)) == ([], 1)
    name = run_of(results).name
    pack(results)
    shutil.rmtree(results / "runs")
    assert verify(results) == verify(results / "runs" / name) == ([], 1)


@pytest.mark.parametrize("last", [1, 2])
def test_a_run_that_was_interrupted_is_verified_up_to_its_last_stage(results, last):
    """After stage 2 was finished, or when it was sealed and had no checkpoint yet."""
    run = run_of(results)
    (run / "status").write_text("interrupted\n")
    shutil.copy(run / "checkpoint" / f"stage-0{last}.safetensors", run / "checkpoint" / "stage.safetensors")
    seals = (run / SEALS).read_text().splitlines(keepends=True)
    (run / SEALS).write_text("".join(seals[:-1]))
    with (run / "scores.jsonl").open("a") as record:
        record.write('{"stage": 4')
    tables.refresh(results)
    assert verify(results) == ([], 1)


@pytest.mark.parametrize("status", ["running", "interrupted", "failed", "diverged: stage 3 of 3"])
def test_a_run_that_was_taken_off_the_table_by_its_status_is_named(results, status):
    (run_of(results) / "status").write_text(f"{status}\n")
    state = status.partition(":")[0]
    (found,) = verify(run_of(results))[0]
    assert found.endswith(f"its records end with stage 3 of 3, yet its status is {state}")


@pytest.mark.parametrize("name", ["stage", "stage-01", "stage-02", "within"])
def test_a_checkpoint_that_was_written_over_is_named(results, name):
    path = run_of(results) / "checkpoint" / f"{name}.safetensors"
    content = bytearray((path.parent / "stage.safetensors").read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (found,) = verify(run_of(results))[0]
    assert f"{path} is damaged (it is not what was written)" in found


@pytest.mark.parametrize("name", ["stage", "stage-02"])
def test_a_checkpoint_of_another_stage_is_named(results, name):
    folder = run_of(results) / "checkpoint"
    shutil.copy(folder / "stage-01.safetensors", folder / f"{name}.safetensors")
    (found,) = verify(run_of(results))[0]
    assert found.endswith(f"{name}.safetensors is of stage 1")


def test_tables_with_another_byte_are_named_with_their_line(results):
    names = sorted([*FILES, "leaderboard.json", "leaderboard.md"])
    for name in names:
        (results / name).write_bytes((results / name).read_bytes().replace(b"\n", b"\n ", 1))
    found, _ = verify(results)
    assert sorted(found) == [f"{name} is not what the records give, first in line 2" for name in names]
    assert verify(run_of(results)) == ([], 1)
    for name in names:
        (results / name).unlink()
    assert sorted(verify(results)[0]) == [f"{name} is missing" for name in names]
    pack(results)
    assert sorted(verify(results)[0]) == [f"{name} is missing" for name in names if name != "stages.csv"]


def command(monkeypatch, path):
    """The exit code of `python -m clbench.verify`."""
    monkeypatch.setattr(sys, "argv", ["verify", str(path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("clbench.verify", run_name="__main__")
    return end.value.code


def test_the_command_says_what_differs_by_its_exit_code_too(results, monkeypatch, capsys):
    assert command(monkeypatch, results) == 0 and capsys.readouterr().out == "1 runs verified\n"
    (results / "stages.csv").unlink()
    assert command(monkeypatch, results) == 1 and capsys.readouterr().out == "stages.csv is missing\n"
    for nothing in (results / "none", results / "runs" / "none", results / "runs"):
        assert command(monkeypatch, nothing) == 2
        assert capsys.readouterr().err.count("\n") == 1
