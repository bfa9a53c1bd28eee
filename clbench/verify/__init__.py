"""`python -m clbench.verify RUN|results_dir`: is every number that follows from others in the records, and every table, what it must be?

RUN is a run's directory, results_dir/runs/NAME. Exit code 1 where something differs, one line each. What is measured cannot be worked out again;
that nobody touched it is what the seals say, and of a checkpoint its own hash. Not looked at: report.html, which is as old as the last
`python -m clbench.report`.
"""

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from clbench.config import model_label, name_of, run_hash, variant
from clbench.examine.text import exponential
from clbench.examine.together import TOLERANCES
from clbench.record import examined
from clbench.record.ledger import COMPLETE, KEPT, STAGE, WITHIN, read_checkpoint
from clbench.record.manifest import failed_canaries
from clbench.record.overlaps import stream_hash
from clbench.record.runs import ARCHIVE, CANARIES, FAILED, Records, read_lines, read_runs
from clbench.record.seals import SEALS, sealed
from clbench.report.measures import KNOWLEDGE_PROBE
from clbench.report.summary import summarise
from clbench.report.tables import generated
from clbench.stream import chosen, ordered
from clbench.types import UserMistake

ROUNDING = 1e-7
"""Relative error of an item, which is kept in float32 (at most 2^-24)."""
CLOSE = 1e-9
"""Relative error of what is worked out from numbers in float64."""
OF_TEXT = {
    "token_perplexity": exponential,
    "word_perplexity": exponential,
    "bits_per_byte": lambda nats: nats / math.log(2),
}
"""What follows from a text's negative log-likelihood in nats a token, word or byte."""


def verify(path: Path) -> tuple[list[str], int]:
    """What differs in the run at `path` or in all of a results_dir and its tables, and how many runs were looked at."""
    path = path.resolve()
    is_run = path.parent.name == "runs" and not ((path / "runs").is_dir() or (path / ARCHIVE).is_file())
    results_dir = path.parents[1] if is_run else path
    records = read_runs(results_dir)
    names = [name for name in records.files if not is_run or name == path.name]
    if not names:
        raise UserMistake(
            f"{path} holds no run; give a results_dir, which holds runs/, or one of the directories there"
        )
    found = [f"{name}: {what}" for name in names for what in of_run(records, name, results_dir / "runs" / name)]
    if not is_run and found:
        found.append("the tables are not looked at until the records are whole")
    elif not is_run:
        made = generated(summarise(records))
        if (results_dir / ARCHIVE).is_file() and not (results_dir / "stages.csv").exists():
            del made["stages.csv"]  # as large as all other files, it need not be kept beside an archive
        found += of_tables(results_dir, made)
    return found, len(names)


def of_tables(results_dir: Path, made: Mapping[str, bytes]) -> Iterator[str]:
    """The tables that are not what was `made` of the records, by name."""
    for name, content in made.items():
        path = results_dir / name
        if not path.is_file():
            yield f"{name} is missing"
        elif (there := path.read_bytes()) != content:
            lines = zip(there.split(b"\n"), content.split(b"\n"), strict=False)
            first = next((number for number, (own, new) in enumerate(lines, start=1) if own != new), "the last")
            yield f"{name} is not what the records give, first in line {first}"


def of_run(records: Records, run: str, directory: Path) -> Iterator[str]:
    """What differs in the records of one run, up to its last finished stage, and in the checkpoints of its `directory`, if it has one."""
    (row,) = records.runs[records.runs["run"] == run].itertuples()
    if row.state == "unreadable":
        yield row.problem
        return
    files = records.files[run]
    try:
        manifest = json.loads(files["manifest.json"])
        seals = read_lines(files.get(SEALS, b""))
        for one in seals:
            sealed(files, one)
        last, stages = seals[-1]["stage"] if seals else -1, len(manifest["tasks"])
        if last == stages and row.state != COMPLETE:
            yield f"its records end with stage {last} of {stages}, yet its status is {row.state}"
        yield from of_checkpoints(directory, last=last, is_complete=row.state == COMPLETE)
        for name in sorted(name for name in files if name.startswith(examined.FOLDER)):
            examined.read(files, file=name, run=run)
        yield from of_manifest(manifest, name=run)
        yield from of_items(records, run)
        yield from of_scores(records, run, manifest)
    except (ValueError, LookupError, TypeError, AttributeError, BadZipFile, zlib.error) as error:
        yield f"{type(error).__name__}: {error}"


def of_checkpoints(directory: Path, *, last: int, is_complete: bool) -> Iterator[str]:
    """Checkpoints that a run would not continue from, and those of another stage than they stand for; `last`: the last sealed stage."""
    # A run that was killed between the two has sealed a stage of which it has no checkpoint.
    of_stage = {last} if is_complete else {last, last - 1}
    for file in sorted((directory / "checkpoint").glob("*.safetensors")):
        try:
            stage = read_checkpoint(file, run=directory.name).stage
        except UserMistake as mistake:
            yield str(mistake)
            continue
        if not (stage in of_stage if file.name == STAGE else file.name in (WITHIN, KEPT.format(stage))):
            yield f"{file} is of stage {stage}"


def of_manifest(manifest: Mapping[str, Any], *, name: str) -> Iterator[str]:
    """What the manifest says beside its configuration, its data and its canaries' results, but should not."""
    config, data, canaries = manifest["config"], manifest["data"], manifest["canaries"]
    stream = config["stream"]
    names = chosen(stream["tasks"], limit=stream["limit"], last=stream.get("last"))
    expected = {
        "run": name_of(config),
        "experiment": config["experiment"],
        "method": config["method"]["name"],
        "model": model_label(config),
        "stream": stream["name"],
        "order": config["order"],
        "seed": config["seed"],
        "config_hash": run_hash(config),
        "variant": variant(config),
        "tasks": ordered(names, config["order"]),
        "metrics": {task: one["metric"].rpartition(" v")[0] for task, one in data.items()},
        "stream_hash": stream_hash(data),
    }
    for key, value in expected.items():
        if manifest[key] != value:
            yield f"manifest.json has {key} {manifest[key]!r}, what it follows from gives {value!r}"
    if manifest["run"] != name:
        yield f"manifest.json is that of {manifest['run']}"
    if "results" not in canaries:
        yield "manifest.json has no results of its canaries"
    elif canaries["failed"] != failed_canaries(canaries["results"]) or canaries["checked"] != len(canaries["results"]):
        yield "manifest.json has other failed canaries than their results"


def of_items(records: Records, run: str) -> Iterator[str]:
    """Scores that are not the sum of their items over n, with the standard error of their mean; items without a score."""
    scores = records.scores[records.scores["run"] == run]
    kept = {int(Path(file).stem.rpartition("-")[2]) for file in records.files[run] if file.startswith("items/")}
    for stage in sorted(kept.union(scores["stage"])):
        own = {f"{one.probe}|{one.task}|{one.metric}": one for one in scores[scores["stage"] == stage].itertuples()}
        for key, items in records.outcomes(run, stage=stage, of="").items():
            if key not in own:
                yield f"the items of stage {stage} have {key}, which scores.jsonl has not"
                continue
            one, is_mean = own[key], not math.isnan(own[key].stderr)
            # A perplexity of all items has no standard error; a mean of tasks' means is the mean of METRIC_by_task.
            of_all = examined.probe_of(one.probe) == KNOWLEDGE_PROBE and one.n > 1 and not is_mean
            if of_all or f"{key}_by_task" in own:
                continue
            if not np.isclose(items.sum() / one.n, one.value, rtol=0, atol=ROUNDING * abs(items).sum() / one.n):
                yield f"stage {stage}: {key} is {one.value}, its items give {items.sum() / one.n}"
            if is_mean and one.n != len(items):
                yield f"stage {stage}: {key} is over {one.n} items, {len(items)} are kept"
            elif is_mean:
                stderr = items.std(ddof=1) / math.sqrt(one.n)
                if not np.isclose(stderr, one.stderr, rtol=ROUNDING, atol=ROUNDING * abs(items).max()):
                    yield f"stage {stage}: {key} has the standard error {one.stderr}, its items give {stderr}"


def of_scores(records: Records, run: str, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Scores that stand twice, that do not follow from others of their task, that are left out, or whose stage has another name; costs of a stage
    too many or few."""
    scores, costs = (table[table["run"] == run] for table in (records.scores, records.costs))
    precision = f"torch.{manifest['config']['engine']['dtype']}"
    least, most = next(both for dtype, both in TOLERANCES.items() if str(dtype) == precision)
    names = ["base", *manifest["tasks"]]
    if costs["stage"].tolist() != list(range(len(costs))):
        yield f"cost.jsonl has stages {costs['stage'].astype(int).tolist()}"
    of_own_model = {*scores[scores["probe"] == CANARIES]["stage"]}
    yield from (
        f"stage {stage}: scores.jsonl has no canaries of the run's own model"
        for stage in range(min(2, len(costs)))
        if stage not in of_own_model
    )
    for (stage, probe, task), own in scores.groupby(["stage", "probe", "task"]):
        where = f"stage {stage}: {probe}|{task}"
        if own["metric"].duplicated().any():
            yield f"{where} stands twice"
            continue
        value, n = (own.set_index("metric")[column].to_dict() for column in ("value", "n"))
        expected = {}
        if "nll_token" in value:
            nats = value["nll_token"] * n["nll_token"]
            expected = {metric: of(nats / n[metric]) for metric, of in OF_TEXT.items() if metric in value}
        if "format_loss" in value:
            expected = {"format_loss": value[manifest["metrics"][task]] - value["exact_match"]}
        if probe == CANARIES:
            allowed = value.get("allowed_nats", least)
            expected = {FAILED: float(not value["gap_nats"] <= allowed)}
            if not least <= allowed <= most:
                yield f"{where}|allowed_nats is {allowed}, allowed are {least} to {most}"
        for metric, number in expected.items():
            if not np.isclose(number, value[metric], rtol=CLOSE, atol=CLOSE, equal_nan=True):
                yield f"{where}|{metric} is {value[metric]}, other scores give {number}"
        if set(own["stage_name"]) != {names[stage]}:
            yield f"{where} names its stage {', '.join(sorted(set(own['stage_name'])))}, it is {names[stage]}"
