"""The untouched model's scores, measured once per model, stream and probes, and copied into the ledgers of other runs.

What is kept is a file in `cache_dir`, named by everything that the scores depend on, the source of the program included.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import clbench
from clbench.config.checks import writing
from clbench.hashes import of_json
from clbench.record.runs import remove_left, replace_file
from clbench.types import Score

log = logging.getLogger("clbench")


@dataclass(frozen=True, kw_only=True)
class Untouched:
    """`scores` of stage 0 with their items, by the name of their probe, the tokens that they took, and the run that measured them."""

    run: str
    tokens: int
    scores: Mapping[str, tuple[Score, ...]]

    def rows(self) -> list[Score]:
        return [score for scores in self.scores.values() for score in scores]


def kept_at(cache_dir: Path, depends_on: Mapping[str, Any]) -> Path:
    """Where the scores are kept that depend on these JSON values."""
    return cache_dir / "untouched" / f"{of_json(depends_on)[:32]}.json"


def find(path: Path) -> Untouched | None:
    """What is kept there; None where nothing is, or not what was."""
    remove_left(path.parent)
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["sha256"] != of_json([path.stem, kept := record["kept"]]):
            raise ValueError("its hash is another")
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s): the untouched model is measured again", path, error)
        return None
    scores = {
        probe: tuple(Score(**{**score, "items": tuple(score["items"])}) for score in found)
        for probe, found in kept["scores"].items()
    }
    return Untouched(run=kept["run"], tokens=kept["tokens"], scores=scores)


def keep(path: Path, untouched: Untouched) -> None:
    """Writes it whole or not at all, whoever else does."""
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    kept = asdict(untouched)
    replace_file(path, json.dumps({"sha256": of_json([path.stem, kept]), "kept": kept}).encode())


def source_hash(parts: Iterable[object]) -> str:
    """SHA-256, in hexadecimal, of every source file of clbench and of those that define the classes of `parts`."""
    modules = (sys.modules[type(part).__module__] for part in parts)
    files = {Path(str(module.__file__)) for module in modules} | set(Path(clbench.__file__).parent.rglob("*.py"))
    return of_json(sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files))
