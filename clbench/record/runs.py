"""Run directories read back: what the ledger wrote of all runs, as tables.

Reads results_dir/runs/*/ and results_dir/runs.tar.xz, which `pack` makes of them; a run that is in both is read from its
directory. Not here: what the numbers amount to (report).
"""

import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from io import BytesIO
from lzma import LZMAError
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clbench.config.checks import writing
from clbench.record import examined
from clbench.record.seals import SEALED, SEALS, Seal, sealed
from clbench.types import Cost, Score, UserMistake

log = logging.getLogger("clbench")
ARCHIVE, LOG = "runs.tar.xz", "run.log"
FILES = (*SEALED, SEALS, "status", examined.EXAMINED)
"""What is read of a run's directory and what the archive holds of it: no checkpoint and no lock."""

CANARIES, FAILED = "canaries", "failed"
"""The probe that says how far a run's fast forwards are from plain ones, and its metric that is 1 where that is too far."""
NEEDED = ("stream", "order", "model", "method", "seed", "variant", "config", "config_hash", "git", "tasks", "metrics")
OPTIONAL = {"stream_hash": "", "command": "", "data": "", "model_fingerprint": "", "trained_probes": (), "unusable": ()}
SCORE = {field.name: str(field.type) for field in fields(Score) if field.name != "items"}
COST = {field.name: "float" for field in fields(Cost)}
"""The fields of a line of scores.jsonl and of cost.jsonl, and the type that each is read as."""


@dataclass(frozen=True, kw_only=True)
class Records:
    """What all runs of a results directory recorded. The column `run` is the name of a run's directory.

    `runs`: one row per run, by name: `state` (its status, or "unreadable"), `problem` (why it cannot be read, or may not be ranked
    although it is complete, or where it diverged), `commit`, `dirty`, and of its manifest NEEDED and OPTIONAL; all but the first three are empty
    where it cannot be read. `scores` and `costs`: one row per Score and Cost, as written. `files`: FILES of each run.
    """

    runs: pd.DataFrame
    scores: pd.DataFrame
    costs: pd.DataFrame
    files: Mapping[str, Mapping[str, bytes]]

    def by_view(self) -> "Records":
        """The same records, in which what a run measured of a secondary view of its weights (I-LoRA's fast adapter, a shrunk update) is a run
        RUN@VIEW of the method METHOD@VIEW, at the costs of RUN."""
        if not self.scores["probe"].str.contains("@").any():
            return self
        probes = self.scores["probe"].str.partition("@")
        pairs = self.scores[["run"]].assign(view=probes[2])[probes[1] == "@"].drop_duplicates()
        runs, costs = pairs.merge(self.runs, on="run"), pairs.merge(self.costs, on="run")
        runs["method"] += "@" + runs["view"]
        runs["run"] += "@" + runs["view"]
        costs["run"] += "@" + costs["view"]
        return replace(
            self,
            runs=pd.concat([self.runs, runs[self.runs.columns]], ignore_index=True),
            scores=self.scores.assign(probe=probes[0], run=self.scores["run"] + probes[1] + probes[2]),
            costs=pd.concat([self.costs, costs[self.costs.columns]], ignore_index=True),
        )

    def outcomes(self, run: str, *, stage: int, of: str) -> dict[str, np.ndarray]:
        """Per-item outcomes that `run` measured after `stage`, by those "probe|task|metric" that begin with `of`; empty where none were kept.

        `run` may be RUN@VIEW: then of that view of its weights.
        """
        run, _, view = run.partition("@")
        name, found = f"items/stage-{stage:02d}.npz", {}
        if name in self.files[run]:
            with np.load(BytesIO(self.files[run][name])) as archive:
                wanted = ((key, _seen_as(key, view=view)) for key in archive.files)
                found = {own: archive[key].astype(np.float64) for key, own in wanted if own and own.startswith(of)}
        if not of or "/" in of:  # else of no examination, which are long
            for row in _examined(self.files[run], run=run):
                own = _seen_as("{probe}|{task}|{metric}".format(**row), view=view)
                if row["stage"] == stage and row["items"] and own and own.startswith(of):
                    found[own] = np.array(row["items"], dtype=np.float64)
        return found


def _seen_as(key: str, *, view: str) -> str:
    """A "probe|task|metric" without its view; "" where it is of another one."""
    probe, task, metric = key.split("|", 2)
    probe, _, seen = probe.partition("@")
    return f"{probe}|{task}|{metric}" if seen == view else ""


def _examined(files: Mapping[str, bytes], *, run: str) -> Iterator[dict[str, Any]]:
    """The scores, items included, of every examination that is whole; of the others a warning."""
    for file in files:
        if file.startswith(examined.FOLDER):
            try:
                yield from examined.rows(examined.read(files, file=file, run=run), file=file)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                log.warning("%s: its numbers are left out, as %s; remove it, or restore it", run, error)


def read_runs(results_dir: Path, *, only: str | None = None) -> Records:
    """Every run of `results_dir`, or `only` the one of that name, which has a directory; one that cannot be read says so in its state."""
    files, runs, scores, costs = _files(results_dir) if only is None else _of_directories(results_dir, only), [], [], []
    for run in files:
        try:
            own = files[run] = _whole(files[run])
            row, measured, paid = _manifest(own), _lines(own, "scores.jsonl", SCORE), _lines(own, "cost.jsonl", COST)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            row, measured, paid = {"state": "unreadable", "problem": f"{type(error).__name__}: {error}"}, [], []
            files[run] = {}
        if row["state"] == "complete" and (off := _off_plain_forwards(measured)):
            row["problem"] = "; ".join(filter(None, [row["problem"], off]))
        last = max((stage for stage, *_ in measured), default=-1)
        later = (one for one in _examined(files[run], run=run) if one["stage"] <= last)
        measured += [tuple(one[name] for name in SCORE) for one in later]
        runs.append(row | {"run": run})
        scores += [(run, *line) for line in measured]
        costs += [(run, *line) for line in paid]
    columns = ["run", "state", "problem", "commit", "dirty", *NEEDED, *OPTIONAL]
    return Records(
        runs=pd.DataFrame(runs, columns=columns, dtype=object).fillna(""),
        scores=_table(scores, SCORE),
        costs=_table(costs, COST),
        files=files,
    )


def pack(results_dir: Path) -> None:
    """Writes the records of every run of `results_dir` to its runs.tar.xz; equal records give equal bytes."""
    content = BytesIO()
    with tarfile.open(fileobj=content, mode="w:xz", preset=9) as archive:
        for run, files in _files(results_dir).items():
            if not files:  # which the archive may hold whole
                raise UserMistake(
                    f"runs/{run} of {results_dir} cannot be packed, as nothing in it can be read; remove it"
                )
            for name, record in sorted(files.items()):
                member = tarfile.TarInfo(f"runs/{run}/{name}")  # of no time and of nobody
                member.size = len(record)
                archive.addfile(member, BytesIO(record))
    replace_file(results_dir / ARCHIVE, content.getvalue())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """What is written inside to the path that this gives takes the place of a file, whole or not at all.

    The temporary name is this machine's and process's own, as runs end side by side.
    """
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    with writing(path):
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def remove_left(folder: Path) -> None:
    """Removes what `replace_file` or a sweep on this machine left in a folder when its process was killed."""
    machine = os.uname().nodename
    for path in [*folder.glob(f".*.{machine}-*.tmp"), *folder.glob(f".sweep-{machine}-*.jsonl")]:
        process = re.split("[.-]", path.stem)[-1]
        if process.isdecimal() and _is_gone(int(process)):
            path.unlink(missing_ok=True)


def _is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)  # which asks, and sends nothing
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # somebody else's
    return False


def read_lines(content: bytes) -> list[dict[str, Any]]:
    """The records of a .jsonl file; a last line without its newline was being written and does not count."""
    return [json.loads(line) for line in content.decode().split("\n")[:-1]]


def _files(results_dir: Path) -> dict[str, dict[str, bytes]]:
    """The content of FILES of every run, in the order of their names; a directory goes before what the archive has."""
    if not results_dir.is_dir():
        raise UserMistake(f"results_dir={str(results_dir)!r} is not a directory; give the one that holds runs/")
    found: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(results_dir / ARCHIVE, "r:xz") as archive:
            for member in archive:
                _, run, name = member.name.split("/", 2)
                if (file := archive.extractfile(member)) is None:
                    raise ValueError(f"{member.name} is no file")
                found.setdefault(run, {})[name] = file.read()
    except FileNotFoundError:
        pass  # all runs are directories
    except (tarfile.TarError, LZMAError, EOFError, ValueError) as error:
        raise UserMistake(f"{results_dir / ARCHIVE} is damaged ({error}); restore it, or remove it") from error
    found |= _of_directories(results_dir, "*")
    return dict(sorted(found.items()))


def _of_directories(results_dir: Path, names: str) -> dict[str, dict[str, bytes]]:
    """The content of FILES of the runs whose directories have such names."""
    found: dict[str, dict[str, bytes]] = {}
    for directory in (results_dir / "runs").glob(f"{names}/"):
        paths = [path for pattern in FILES for path in directory.glob(pattern)]
        if not paths and (directory / LOG).is_file():
            continue  # nothing is recorded yet: the untouched model is being measured
        try:
            found[directory.name] = {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}
        except OSError:
            found[directory.name] = {}  # may not be read, or is being removed
    return found


def _manifest(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What Records.runs say of a run that can be read."""
    if missing := {"manifest.json", "status"} - {*files}:
        raise ValueError(f"no readable {', '.join(sorted(missing))}")
    manifest = json.loads(files["manifest.json"])
    state, _, where = files["status"].decode(errors="replace").strip().partition(": ")
    if missing := {*NEEDED} - {*manifest} | {*manifest["tasks"]} - {*manifest["metrics"]}:
        raise ValueError(f"manifest.json lacks {', '.join(sorted(missing))}")
    if state == "complete" and (last := _seals(files)[-1]["stage"]) != len(manifest["tasks"]):
        raise ValueError(f"its records end with stage {last} of {len(manifest['tasks'])}, yet its status is complete")
    problem = "" if "canaries" in manifest else "no canaries in its manifest"
    if failed := manifest.get("canaries", {}).get("failed"):
        problem = f"failed canaries: {', '.join(failed)}"
    git = manifest["git"] or {}
    known = {"state": state, "commit": git.get("commit") or "", "dirty": bool(git.get("dirty"))}
    return OPTIONAL | manifest | known | {"problem": problem if state == "complete" else where}


def _whole(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The records as they were when the last stage was finished; raises ValueError where they were touched since.

    Examinations came later and have their own seals: they are as they are.
    """
    is_complete, seals = files.get("status", b"").strip() == b"complete", _seals(files)
    unsealed = {name: files[name] for name in files if name in ("status", SEALS) or name.startswith(examined.FOLDER)}
    if not seals and is_complete:
        raise ValueError(f"no readable {SEALS}")
    if not seals:
        return {name: files[name] for name in files if name in unsealed or name == "manifest.json"}
    kept = sealed(files, seals[-1]) | unsealed
    if is_complete and kept != files:
        raise ValueError("it has records beyond its last finished stage")
    return kept


def _seals(files: Mapping[str, bytes]) -> list[Seal]:
    try:
        return read_lines(files.get(SEALS, b""))
    except ValueError as error:
        raise ValueError(f"{SEALS} cannot be read ({error})") from error


def _off_plain_forwards(scores: Iterable[tuple[Any, ...]]) -> str:
    """Which of the canaries on a run's own model failed, "" where none did."""
    failed = {
        f"{task} after stage {stage}"
        for stage, _, probe, task, metric, value, *_ in scores
        if (probe, metric) == (CANARIES, FAILED) and value
    }
    return f"failed canaries on its own model: {', '.join(sorted(failed))}" if failed else ""


def _lines(files: Mapping[str, bytes], name: str, kind: Mapping[str, str]) -> list[tuple[Any, ...]]:
    """The fields in `kind` of each record of a .jsonl file, of none where there is no file yet."""
    return list(map(itemgetter(*kind), read_lines(files.get(name, b""))))


def _table(lines: list[tuple[Any, ...]], kind: Mapping[str, str]) -> pd.DataFrame:
    """Lines of all runs; null is NaN."""
    return pd.DataFrame(lines, columns=["run", *kind]).astype(kind)
