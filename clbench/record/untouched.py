"""The untouched model's scores, measured once per model, stream and probes, and copied into the ledgers of other runs.

What is kept is a file in `cache_dir`, named by everything that the scores depend on, the source of the program included.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import clbench
from clbench.record.runs import replace_file
from clbench.types import Score


@dataclass(frozen=True, kw_only=True)
class Untouched:
    """`scores` of stage 0 with their items, the tokens that they took, and the run that measured them."""

    run: str
    tokens: int
    scores: tuple[Score, ...]


def kept_at(cache_dir: Path, depends_on: Mapping[str, Any]) -> Path:
    """Where the scores are kept that depend on these JSON values."""
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return cache_dir / "untouched" / f"{digest[:32]}.json"


def find(path: Path) -> Untouched | None:
    """What is kept there; None where nothing is."""
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    scores = tuple(Score(**{**score, "items": tuple(score["items"])}) for score in kept["scores"])
    return Untouched(run=kept["run"], tokens=kept["tokens"], scores=scores)


def keep(path: Path, untouched: Untouched) -> None:
    """Writes it whole or not at all, whoever else does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(asdict(untouched)).encode())


def source_hash(parts: Iterable[object]) -> str:
    """SHA-256, in hexadecimal, of every source file of clbench and of those that define the classes of `parts`."""
    modules = (sys.modules[type(part).__module__] for part in parts)
    files = {Path(str(module.__file__)) for module in modules} | set(Path(clbench.__file__).parent.rglob("*.py"))
    contents = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return hashlib.sha256("".join(contents).encode()).hexdigest()
