"""What shows that a run's records are whole: a line of seals.jsonl for every finished stage, with the length and SHA-256 of each record up to it."""

import hashlib
from collections.abc import Mapping
from typing import Any

SEALS = "seals.jsonl"
SEALED = ("manifest.json", "scores.jsonl", "cost.jsonl", "items/*.npz")
"""The records that a seal is about; of those that grow, what is there when the stage is finished."""

Seal = dict[str, Any]
"""`stage`, and `records`: by name, the length in bytes and the SHA-256 of that many of a record's first bytes."""


def seal(records: Mapping[str, bytes], *, stage: int) -> Seal:
    """The seal of a finished stage."""
    return {"stage": stage, "records": {name: [len(content), _sha256(content)] for name, content in records.items()}}


def sealed(records: Mapping[str, bytes], seal: Seal) -> dict[str, bytes]:
    """What the records held when they were sealed; raises ValueError where they no longer do."""
    kept = {name: records.get(name, b"")[:length] for name, (length, _) in seal["records"].items()}
    for name, content in kept.items():
        if [len(content), _sha256(content)] != seal["records"][name]:
            raise ValueError(f"{name} is not what it was when stage {seal['stage']} was finished")
    return kept


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
