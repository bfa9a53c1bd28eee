"""Where rows come from: `data_dir/<name>/<split>.jsonl` when `data_dir` is set, else the hub at a stated revision, with the same columns."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clbench.types import UserMistake


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Where a dataset's rows are: `name` is its folder under `data_dir`, the rest its address on the hub.

    `splits` maps our split names to the hub's; a split that is not listed has the same name on both sides. `data_files` names the one file
    of each of our splits in a hub repository that holds many datasets (Super-NaturalInstructions: a file per task and split).
    """

    name: str
    hub: str
    config: str | None = None
    revision: str | None = None
    splits: dict[str, str] = field(default_factory=dict)
    data_files: dict[str, str] = field(default_factory=dict)


def load_rows(spec: DatasetSpec, *, split: str, data_dir: str | None) -> list[dict[str, Any]]:
    """The rows of one split, in file order; raises UserMistake when they cannot be had."""
    if data_dir is None:
        return _hub_rows(spec, split)
    path = Path(data_dir) / spec.name / f"{split}.jsonl"
    if not path.is_file():
        raise UserMistake(
            f"data_dir={data_dir!r} has no {spec.name}/{split}.jsonl, which {spec.hub!r} needs; point data_dir at it"
        )
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _hub_rows(spec: DatasetSpec, split: str) -> list[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        if spec.data_files:
            files = {split: spec.data_files[spec.splits.get(split, split)]}
            rows = load_dataset(spec.hub, data_files=files, split=split, revision=spec.revision)
        else:
            rows = load_dataset(spec.hub, spec.config, split=spec.splits.get(split, split), revision=spec.revision)
    except (OSError, DatasetNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise UserMistake(
            f"dataset {spec.hub!r} could not be loaded from the hub ({reason}); offline, set data_dir=DIR with DIR/{spec.name}/{split}.jsonl"
        ) from error
    return [dict(row) for row in rows]


def fingerprint(rows: Sequence[Any]) -> str:
    """SHA-256, in hexadecimal, of rows that JSON can write (dataclasses by their fields)."""
    digest = hashlib.sha256()
    for row in rows:
        plain = row if isinstance(row, (dict, list, str)) else vars(row)
        digest.update(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode())
        digest.update(b"\n")
    return digest.hexdigest()
