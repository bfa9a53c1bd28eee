"""What stages of a run gave on other probes, examined when the run was over: a file for each examination beside the run's own records.

A line for each stage, then the seal of them all, in the form of seals.jsonl. The run's own seals know nothing of it, so damage to an examination
costs its own numbers and no others. In tables its probes are named EXAMINATION/PROBE, and nothing is ranked by them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import PurePosixPath
from typing import Any

from clbench.record.seals import seal, sealed
from clbench.types import Score

FOLDER = "examined"
EXAMINED = f"{FOLDER}/*.jsonl"
FIELDS = {field.name for field in fields(Score)}

Line = dict[str, Any]
"""One stage: `run`, `stage`, `asked` (what was examined, and with what), and the fields of its `scores`, items included."""


def line(scores: Iterable[Score], *, run: str, stage: int, asked: Mapping[str, Any]) -> Line:
    """A stage as it is read back; as in the ledger, NaN is null."""
    found = {"run": run, "stage": stage, "asked": asked, "scores": [asdict(one) for one in scores]}
    return json.loads(json.dumps(found), parse_constant=lambda name: None if name == "NaN" else float(name))


def written(lines: Sequence[Line], *, file: str) -> bytes:
    """The content of `file`, a path below the run's directory."""
    body = "".join(json.dumps(one) + "\n" for one in lines).encode()
    return body + json.dumps(seal({file: body}, stage=lines[-1]["stage"])).encode() + b"\n"


def read(files: Mapping[str, bytes], *, file: str, run: str) -> list[Line]:
    """The stages in `file`; raises ValueError, KeyError or TypeError where they are not what was written, or another run's."""
    *lines, last = files[file].splitlines(keepends=True)
    if sealed(files, json.loads(last)) != {file: b"".join(lines)}:
        raise ValueError(f"{file} holds more than was sealed")
    stages = [json.loads(one) for one in lines]
    if other := {one["run"] for one in stages} - {run}:
        raise ValueError(f"{file} is of {', '.join(sorted(other))}")
    if any({*score} != FIELDS for one in stages for score in one["scores"]):
        raise ValueError(f"{file} has scores of another form")
    return stages


def rows(stages: Iterable[Line], *, file: str) -> Iterator[dict[str, Any]]:
    """Their scores under the names that tables give them."""
    name = PurePosixPath(file).stem
    yield from (score | {"probe": f"{name}/{score['probe']}"} for one in stages for score in one["scores"])


def probe_of(name: str) -> str:
    """A probe's own name, without that of an examination and of a view.

    >>> probe_of("mini-3fa9c2d1/knowledge@fast")
    'knowledge'
    """
    return name.partition("@")[0].rpartition("/")[2]
