"""What of a results directory must be equal however its runs came about: everything but times and memory."""

import csv
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

UNTIMED = ("stages.csv", "retention.csv", "probes.csv", "differences.csv")
MEASURED_ANEW = ("seconds", "seconds_train", "seconds_probe", "seconds_other", "peak_memory_bytes")
OF_THE_PLACE = ("command", "config", "untouched_measured_by")
"""What a manifest says of where a run was made."""
NOT_COMPARED = ("run.log", "seals.jsonl", "lock", "manifest.json", "scores.jsonl", "cost.jsonl")


def numbers(run: Path) -> dict[str, Any]:
    """By file what a run recorded: lines without times, of the other files a hash."""
    found: dict[str, Any] = {
        name: [
            {key: value for key, value in json.loads(line).items() if key not in MEASURED_ANEW}
            for line in (run / name).read_text().splitlines()
        ]
        for name in ("scores.jsonl", "cost.jsonl")
    }
    manifest = json.loads((run / "manifest.json").read_text())
    found["manifest.json"] = {key: value for key, value in manifest.items() if key not in OF_THE_PLACE}
    others = [path for path in run.rglob("*") if path.is_file() and path.name not in NOT_COMPARED]
    return found | {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in others}


def tables(results_dir: Path) -> dict[str, bytes]:
    """The tables that have no times."""
    return {name: (results_dir / name).read_bytes() for name in UNTIMED}


def ranked(results_dir: Path) -> dict[str, set[tuple[str, ...]]]:
    """By method that has a rank in the leaderboard, its scores after every stage."""
    with (results_dir / "leaderboard.csv").open(newline="") as file:
        methods = {row["method"] for row in csv.DictReader(file) if row["average_accuracy"]}
    with (results_dir / "stages.csv").open(newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file) if row["method"] in methods]
        names = list(csv.DictReader((results_dir / "stages.csv").open(newline="")).fieldnames or ())
    place = names.index("method")
    return {method: {row for row in rows if row[place] == method} for method in methods}


def unlike(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The names under which two records differ."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
