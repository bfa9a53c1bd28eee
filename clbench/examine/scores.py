"""From what a probe found in one task to the rows of the ledger."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from clbench.protocols import Stream
from clbench.types import Score


@dataclass(frozen=True)
class Found:
    """A metric's `value` over `n` items; `stderr` and `items` as in Score."""

    value: float
    n: int
    stderr: float = math.nan
    items: tuple[float, ...] = ()


def mean(outcomes: Sequence[float]) -> Found:
    """The mean of per-item outcomes with its standard error (sample deviation over the root of n)."""
    n = len(outcomes)
    stderr = float(np.std(outcomes, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return Found(float(np.mean(outcomes)), n, stderr, tuple(float(outcome) for outcome in outcomes))


def scores(
    found: Mapping[str, Found], *, stream: Stream, stage: int, probe: str, task: str, seconds: float
) -> Iterator[Score]:
    """One Score a metric of `found`; the first carries the `seconds` that all of them took together."""
    where = {"stage": stage, "stage_name": stream.stage_name(stage), "probe": probe, "task": task}
    for metric, one in found.items():
        yield Score(**where, metric=metric, seconds=seconds, **asdict(one))
        seconds = 0.0
