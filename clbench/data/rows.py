"""Where rows come from: `data_dir/<name>/<split>.jsonl` when `data_dir` is set, else the hub at a stated revision, with the same columns."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
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
    return [row for _, row in numbered_rows(_path(spec, split, data_dir))]


def place(spec: DatasetSpec, *, split: str, data_dir: str | None, row: int) -> str:
    """Where row number `row`, counted from 0, of a split stands: file and line, or hub address and row. For messages: the file is read again."""
    if data_dir is None:
        return f"{spec.hub}, split {split!r}, row {row}"
    path = _path(spec, split, data_dir)
    return f"{path}, line {numbered_rows(path)[row][0]}"


def kind_of(value: Any) -> str:
    """The type of a JSON value in words; "" of null and of what holds nothing else.

    >>> kind_of("a"), kind_of(0.5), kind_of(["a", None]), kind_of([])
    ('text', 'number', 'list of text', '')
    """
    if isinstance(value, list):
        kinds = sorted({kind_of(item) for item in value} - {""})
        return f"list of {' and '.join(kinds)}" if kinds else ""
    names = {bool: "true or false", int: "number", float: "number", str: "text", dict: "object"}
    return names.get(type(value), "")


def _path(spec: DatasetSpec, split: str, data_dir: str) -> Path:
    path = Path(data_dir) / spec.name / f"{split}.jsonl"
    if not path.is_file():
        raise UserMistake(
            f"data_dir={data_dir!r} has no {spec.name}/{split}.jsonl, which {spec.hub!r} needs; point data_dir at it"
        )
    return path


def numbered_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a .jsonl file with their line numbers, counted from 1; blank lines are none. Raises UserMistake for a line that holds no row."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserMistake(
            f"{path}, line {line}: byte {error.object[error.start]:#04x} is not UTF-8; save it so"
        ) from error
    # Not str.splitlines, which also ends a line at U+2028, as JSON does not.
    rows: list[tuple[int, dict[str, Any]]] = []
    first: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(StringIO(text, newline=None), start=1):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            row = _row(line, where=where)
            kinds = {column: kind_of(value) for column, value in row.items()}
        except RecursionError as error:
            raise UserMistake(
                f"{where}: lists or objects lie too deep within one another to be read; flatten them"
            ) from error
        for column, kind in kinds.items():
            known, other = first.setdefault(column, (kind, number)) if kind else ("", 0)
            if kind != known:
                raise UserMistake(
                    f"{where}: column {column!r} has the type {kind}, in line {other} it is {known}; one type in all rows is due"
                )
        rows.append((number, row))
    return rows


def _row(line: str, *, where: str) -> dict[str, Any]:
    """The object that a line holds; raises UserMistake where it holds none, or what no other reader of JSON takes."""
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise UserMistake(
            f"{where}, character {error.pos + 1}: no JSON ({error.msg}); a line must hold one whole object, {{...}}"
        ) from error
    if not isinstance(row, dict):
        raise UserMistake(f"{where}: no object, but {kind_of(row) or row!r}; a line must hold one object, {{...}}")
    if not _is_sound(row):
        column = next(column for column, value in row.items() if not _is_sound({column: value}))
        raise UserMistake(
            f"{where}: column {column!r} holds NaN, Infinity or half of a surrogate pair; allowed are finite numbers and whole characters"
        )
    return row


def _is_sound(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        return False
    return True


def _hub_rows(spec: DatasetSpec, split: str) -> list[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        if spec.data_files:
            files = {split: spec.data_files[spec.splits.get(split, split)]}
            rows = load_dataset(spec.hub, data_files=files, split=split, revision=spec.revision)
        else:
            rows = load_dataset(spec.hub, spec.config, split=spec.splits.get(split, split), revision=spec.revision)
    except (OSError, DatasetsError, ValueError, RuntimeError) as error:
        # ValueError: a configuration or split that there is not; RuntimeError: a loading script.
        reason = " ".join(str(error).split())
        raise UserMistake(
            f"dataset {spec.hub!r} could not be loaded from the hub ({reason}); see its configurations and splits there, name them under "
            f"dataset in conf/task, or set data_dir=DIR with DIR/{spec.name}/{split}.jsonl"
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
