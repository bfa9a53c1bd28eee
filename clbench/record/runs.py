"""Run directories read back: what the ledger wrote of each run, as one frozen record.

Reads manifest.json, status, scores.jsonl, cost.jsonl and items/; never writes. Not here: what the numbers amount to
(statistics).

>>> [run.name for run in read_runs(Path("results")) if run.state == "complete"]
['demo-alpha-s0-1f0c2a9b']
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from math import nan
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from clbench.report.metrics import Floats
from clbench.types import Cost, Score, UserMistake

Setting = tuple[str, str, str, str]
"""Stream, order, model, hash of the stream's data."""
STATES = ("complete", "running", "interrupted", "failed", "unreadable")
MATRIX_PROBE = "stream"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory. `state` is one of STATES, `problem` says why it is unreadable, `scores` are in stage order."""

    name: str
    directory: Path
    manifest: Mapping[str, Any]
    state: str
    problem: str
    scores: tuple[Score, ...]
    costs: tuple[Cost, ...]

    @property
    def seed(self) -> int:
        """The seed of every random draw of the run."""
        return int(self.manifest["seed"])

    @property
    def setting(self) -> Setting:
        """Stream, order, model and the hash of the stream's data: what a method is compared on."""
        named = (str(self.manifest[key]) for key in ("stream", "order", "model"))
        return *named, str(self.manifest.get("stream_hash", ""))

    @property
    def unfit(self) -> str:
        """Why a complete run may not be ranked: its evaluation was not shown to be able to fail, or did; "" where it may."""
        if "canaries" not in self.manifest:
            return "no canaries in its manifest"
        failed = self.manifest["canaries"]["failed"]
        return f"failed canaries: {', '.join(failed)}" if failed else ""

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.manifest["method"])

    @property
    def last_stage(self) -> int:
        """The last stage that has a score; 0 is the untouched model."""
        return max((score.stage for score in self.scores), default=0)

    @property
    def stage_names(self) -> dict[int, str]:
        """Stage number to name, in stage order, of the stages that have a score."""
        return {score.stage: score.stage_name for score in self.scores}

    @property
    def commit(self) -> str:
        """The git commit that the code ran from, empty outside a repository."""
        return str((self.manifest["git"] or {}).get("commit") or "")

    @property
    def is_dirty(self) -> bool:
        """Whether the code differed from its commit."""
        return bool((self.manifest["git"] or {}).get("dirty"))

    @property
    def variant(self) -> str:
        """What its seeds have in common, as the manifest says (`config.variant`)."""
        return str(self.manifest["variant"])

    @cached_property
    def values(self) -> dict[tuple[int, str, str, str], float]:
        """(stage, probe, task, metric) to value."""
        return {(score.stage, score.probe, score.task, score.metric): score.value for score in self.scores}

    @cached_property
    def matrix(self) -> Floats:
        """Each task's primary score at each stage, (stages + 1, tasks), NaN where it was not measured."""
        tasks, primary = self.manifest["tasks"], self.manifest["metrics"]
        rows = range(self.last_stage + 1)
        cells = [[self.values.get((row, MATRIX_PROBE, task, primary[task]), nan) for task in tasks] for row in rows]
        return np.array(cells, dtype=np.float64)

    def items(self, stage: int) -> dict[str, Floats]:
        """Per-item outcomes measured after `stage`, by "probe|task|metric"; empty where none were kept."""
        path = self.directory / "items" / f"stage-{stage:02d}.npz"
        if not path.is_file():
            return {}
        try:
            with np.load(path) as archive:
                return {key: archive[key].astype(np.float64) for key in archive.files}
        except (ValueError, OSError, EOFError, BadZipFile) as error:
            raise UserMistake(f"{path} is damaged; remove the run {self.name}, or run it again") from error


def read_runs(results_dir: Path) -> tuple[Run, ...]:
    """Every run under `results_dir`/runs, by name; one that cannot be read says so in its state."""
    if not results_dir.is_dir():
        raise UserMistake(f"results_dir={str(results_dir)!r} is not a directory; give the one that holds runs/")
    return tuple(_read_run(path) for path in sorted((results_dir / "runs").glob("*/")))


def _read_run(directory: Path) -> Run:
    """One run directory; a manifest or a line that is no record makes it unreadable, not the leaderboard."""
    manifest: dict[str, Any] = {}
    scores: tuple[Score, ...] = ()
    costs: tuple[Cost, ...] = ()
    try:
        manifest = _manifest(directory / "manifest.json")
        state = _state(directory / "status")
        scores = tuple(_score(line) for line in _lines(directory / "scores.jsonl"))
        costs = tuple(_cost(line) for line in _lines(directory / "cost.jsonl"))
        problem = ""
    except OSError as error:
        state, problem = "unreadable", f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        state, problem = "unreadable", f"{type(error).__name__}: {error}"
    return Run(
        name=directory.name,
        directory=directory,
        manifest=manifest,
        state=state,
        problem=problem,
        # A stage that was measured again after a crash counts once, as it was measured last.
        scores=tuple({(s.stage, s.probe, s.task, s.metric): s for s in scores}.values()),
        costs=tuple({cost.stage: cost for cost in costs}.values()),
    )


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest, with every key that the leaderboard reads."""
    manifest = json.loads(path.read_text(encoding="utf-8"))
    needed = (
        "stream",
        "order",
        "model",
        "method",
        "seed",
        "variant",
        "config",
        "config_hash",
        "git",
        "tasks",
        "metrics",
    )
    if missing := [key for key in needed if key not in manifest]:
        raise ValueError(f"manifest.json lacks {', '.join(missing)}")
    if missing := [task for task in manifest["tasks"] if task not in manifest["metrics"]]:
        raise ValueError(f"manifest.json names no metric of {', '.join(missing)}")
    return manifest


def _state(path: Path) -> str:
    """The one word of the status file."""
    state = path.read_text(encoding="utf-8").strip()
    if state not in STATES:
        raise ValueError(f"status is {state!r}, not one of {', '.join(STATES[:-1])}")
    return state


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file; a last line without its newline was being written and does not count."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def _score(line: Mapping[str, Any]) -> Score:
    """A line of scores.jsonl; null is NaN."""
    known = {field.name: line[field.name] for field in fields(Score) if field.name != "items"}
    numbers = {key: _number(known[key]) for key in ("value", "stderr", "seconds")}
    return Score(**{**known, **numbers})


def _cost(line: Mapping[str, Any]) -> Cost:
    """A line of cost.jsonl; null is NaN."""
    return Cost(**{field.name: _number(line[field.name]) for field in fields(Cost)})


def _number(value: float | None) -> float:
    """NaN is null in JSON."""
    return nan if value is None else value
