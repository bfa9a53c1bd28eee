"""The record of one run: a directory that survives a kill at any moment.

Scores and costs are appended and fsynced line by line and sealed with the stage; the checkpoint replaces its predecessor by a rename, last of
all. A stage counts as finished when the checkpoint says so; on resume whatever lies beyond its seal is cut off and measured again. A second
checkpoint, within the stage that follows, is there only until that one is finished.
"""

import fcntl
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from clbench.config.checks import writing
from clbench.hashes import of_json, of_tensors
from clbench.record.manifest import FORMAT
from clbench.record.runs import read_lines, replace_file, replacing
from clbench.record.seals import SEALED, SEALS, seal, sealed
from clbench.types import Cost, Diverged, NotWritten, Score, UserMistake

RUNNING, COMPLETE, FAILED, INTERRUPTED, DIVERGED = "running", "complete", "failed", "interrupted", "diverged"
STAGE, WITHIN = "stage.safetensors", "within.safetensors"
KEPT = "stage-{:02d}.safetensors"
"""A finished stage's own checkpoint, where all are kept: without the optimizer's moments, as nothing continues from it."""
FACTS = "clbench"
"""The one key of a checkpoint's metadata, as safetensors writes several in no fixed order: equal runs have equal bytes."""
log = logging.getLogger("clbench")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a run continues: after stage `stage`, or, with `step` not 0, within it after that many optimizer steps.

    `weights`: the trainable tensors by name. `state`: the method's, tensors and JSON values. `moments`: the optimizer's (`train.optimizer`).
    `seconds`: of training within the stage so far.
    """

    stage: int
    weights: dict[str, torch.Tensor]
    state: dict[str, Any]
    moments: dict[str, torch.Tensor]
    step: int = 0
    seconds: float = 0.0


class Ledger:
    """One run's directory. `finished` is the last stage that is wholly recorded, -1 when none is. `keep_all`: the checkpoint of every stage."""

    def __init__(self, path: Path, *, manifest: dict[str, Any], keep_all: bool = False) -> None:
        self.path, self._keep_all = path, keep_all
        self._run = str(manifest["run"])
        with writing(path), ExitStack() as unlock:
            (path / "items").mkdir(parents=True, exist_ok=True)
            (path / "checkpoint").mkdir(exist_ok=True)
            self._lock = (path / "lock").open("w")
            unlock.callback(self._lock.close)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserMistake(
                    f"{path} is being written by another process; wait for it, or change the seed or the configuration"
                ) from error
            if not (path / "manifest.json").is_file():
                replace_file(path / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())
            self.finished = self.load().stage if (path / "checkpoint" / STAGE).exists() else -1
            self._cut(self.finished)
            unlock.pop_all()

    @property
    def steps(self) -> int:
        """Optimizer steps of all finished stages."""
        return sum(cost["steps"] for cost in read_lines((self.path / "cost.jsonl").read_bytes()))

    def set_status(self, status: str) -> None:
        replace_file(self.path / "status", f"{status}\n".encode())

    def append(self, scores: Iterable[Score]) -> None:
        """Adds one stage's scores, their items beside them."""
        scores = list(scores)
        kept = [score for score in scores if score.items]
        items: dict[str, Any] = {f"{s.probe}|{s.task}|{s.metric}": np.asarray(s.items, np.float32) for s in kept}
        if items:
            content = BytesIO()
            np.savez_compressed(content, **items)
            replace_file(self.path / "items" / f"stage-{scores[0].stage:02d}.npz", content.getvalue())
        self._lines("scores.jsonl", [{k: v for k, v in asdict(score).items() if k != "items"} for score in scores])

    def append_cost(self, cost: Cost) -> None:
        self._lines("cost.jsonl", [asdict(cost)])

    def save(self, checkpoint: Checkpoint) -> None:
        """Replaces the checkpoint of its kind. After a stage: the stage is finished, and what was kept within it goes."""
        within = self.path / "checkpoint" / WITHIN
        if checkpoint.step:
            return _write(within, checkpoint, run=self._run)
        with writing(self.path):
            self._lines(SEALS, [seal(self._records(), stage=checkpoint.stage)])
            if self._keep_all and checkpoint.stage:
                kept = self.path / "checkpoint" / KEPT.format(checkpoint.stage)
                _write(kept, replace(checkpoint, moments={}), run=self._run)
            _write(self.path / "checkpoint" / STAGE, checkpoint, run=self._run)
            self.finished = checkpoint.stage
            within.unlink(missing_ok=True)

    def load(self) -> Checkpoint:
        """After the last finished stage."""
        return read_checkpoint(self.path / "checkpoint" / STAGE, run=self._run)

    def load_within(self) -> Checkpoint | None:
        """Within the stage that follows, if it was reached."""
        path = self.path / "checkpoint" / WITHIN
        return read_checkpoint(path, run=self._run) if path.exists() else None

    def __enter__(self) -> Self:
        self.set_status(RUNNING)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # Where nothing can be written, that is what is said, and not that its status cannot be either.
            with suppress(NotWritten) if kind else nullcontext():
                self.set_status(_status_after(error))
        finally:
            self._lock.close()

    def _records(self) -> dict[str, bytes]:
        paths = [path for pattern in SEALED for path in sorted(self.path.glob(pattern))]
        return {path.relative_to(self.path).as_posix(): path.read_bytes() for path in paths}

    def _cut(self, stage: int) -> None:
        """Leaves of the records what was there when `stage` was finished."""
        path = self.path / SEALS
        try:
            lines = read_lines(path.read_bytes()) if path.is_file() else []
            seals = {one["stage"]: one for one in lines if one["stage"] <= stage}
            if stage >= 0 and stage not in seals:
                raise ValueError("it has no line of that stage")
            records = self._records()
            kept = {"scores.jsonl": b"", "cost.jsonl": b""} | (sealed(records, seals[stage]) if stage >= 0 else {})
        except (ValueError, KeyError, TypeError) as error:
            raise UserMistake(
                f"{self.path}: {SEALS} does not fit stage {stage}, the last finished one ({error}); "
                "restore the records, or remove the directory to begin anew"
            ) from error
        if len(seals) < len(lines):
            log.warning("%s: no checkpoint of what was recorded after stage %d, which is done again", self.path, stage)
        items = [path.relative_to(self.path).as_posix() for path in sorted(self.path.glob("items/stage-*.npz"))]
        changed = [name for name in dict.fromkeys((*kept, *items)) if records.get(name) != kept.get(name)]
        if any(map(records.get, changed)):
            log.info("%s: what is beyond stage %d is cut off: %s", self.path, stage, ", ".join(changed))
        replace_file(path, "".join(json.dumps(one) + "\n" for one in seals.values()).encode())
        for name in changed:
            if name in kept:
                replace_file(self.path / name, kept[name])
            else:
                (self.path / name).unlink()
        for left_by_a_kill in [*self.path.rglob("*.tmp"), *(self.path / "checkpoint").glob(".tmp*")]:
            left_by_a_kill.unlink()
        within = self.load_within()
        if within is not None and within.stage != stage + 1:
            (self.path / "checkpoint" / WITHIN).unlink()

    def _lines(self, name: str, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(_null_nan(row)) + "\n" for row in rows)
        with writing(self.path / name), (self.path / name).open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def _status_after(error: BaseException | None) -> str:
    if error is None:
        return COMPLETE
    if isinstance(error, Diverged):
        return f"{DIVERGED}: {error}"
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED


def status_of(path: Path, manifest: Mapping[str, Any], *, resume: str) -> str:
    """How far the run at `path` is: "" where it is not begun, else one word (running, complete, failed, interrupted, diverged).

    Raises UserMistake where `resume` does not allow what is there, or where the run was begun on other data or another model than `manifest`.
    """
    if not (path / "manifest.json").is_file():
        if left := [name for name in (f"checkpoint/{STAGE}", "scores.jsonl", SEALS) if (path / name).exists()]:
            raise UserMistake(
                f"{path} has {', '.join(left)}, but no manifest.json; restore it, or remove the directory"
            )
        if resume == "must":
            raise UserMistake(f"resume=must, but there is no run at {path}; use resume=auto to start it")
        return ""
    status = read_status(path).partition(":")[0] if (path / "status").is_file() else RUNNING
    if resume == "never":
        raise UserMistake(f"resume=never, but {path} holds this very run ({status}); remove it, or use resume=auto")
    before = read_manifest(path)
    for key in ("data", "probe_data", "model_fingerprint"):
        then, now = before.get(key), json.loads(json.dumps(manifest[key]))
        if then != now:
            changed = [key]
            if isinstance(then, dict) and isinstance(now, dict):
                changed = sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k))
            raise UserMistake(
                f"{path} was begun on other data or weights ({key} differs: {', '.join(changed)}); restore them, or remove the directory"
            )
    return status


def read_status(path: Path) -> str:
    """What the run at `path` says of itself; bytes that are no text as "\ufffd"."""
    return (path / "status").read_text(encoding="utf-8", errors="replace").strip()


def mark_interrupted(path: Path) -> None:
    """Records at `path` that a run's processes ended before it was complete; for the parent that outlived them."""
    status = path / "status"
    if status.is_file() and not read_status(path).startswith((COMPLETE, DIVERGED)):
        replace_file(status, f"{INTERRUPTED}\n".encode())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the run at `path` as it was begun; raises UserMistake where that was by a version that wrote another format."""
    try:
        before = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        is_of_ours = before["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        is_of_ours = False
    if not is_of_ours:
        raise UserMistake(
            f"{path / 'manifest.json'} is damaged, or of another version of clbench (this one writes format {FORMAT}); "
            "restore it, finish the run with that version, or remove the directory"
        )
    return before


def _write(path: Path, checkpoint: Checkpoint, *, run: str) -> None:
    """Tensors under `weights/`, `state/` and `moments/`, all else and the hash of both as metadata; the rename makes it count."""
    parts = {"weights": checkpoint.weights, "state": checkpoint.state, "moments": checkpoint.moments}
    tensors = {
        f"{part}/{name}": value.detach().cpu().contiguous()
        for part, values in parts.items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }
    facts = {
        **{"run": run, "stage": checkpoint.stage, "step": checkpoint.step, "seconds": checkpoint.seconds},
        "state": {name: value for name, value in checkpoint.state.items() if not isinstance(value, torch.Tensor)},
    }
    facts = json.loads(json.dumps(facts))  # as it will be read
    text = json.dumps({"sha256": of_json([facts, of_tensors(tensors)]), "facts": facts})
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={FACTS: text})


def read_checkpoint(path: Path, *, run: str) -> Checkpoint:
    """The checkpoint of `run` at `path`; raises UserMistake where it is not as it was written."""
    parts: dict[str, dict[str, Any]] = {"weights": {}, "state": {}, "moments": {}}
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})[FACTS])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        facts = record["facts"]
        if record["sha256"] != of_json([facts, of_tensors(tensors)]):
            raise ValueError("it is not what was written")
        if facts["run"] != run:
            raise ValueError(f"it is of {facts['run']}")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserMistake(
            f"{path} is damaged ({error}); remove it, and the run continues from what was finished before"
        ) from error
    parts["state"] |= facts["state"]
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    return Checkpoint(stage=facts["stage"], step=facts["step"], seconds=facts["seconds"], **parts)


def _null_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
