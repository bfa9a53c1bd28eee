"""How a benchmark is run: the same work by ours and by its peers in turn, results compared before any time counts."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

REPETITIONS = 5


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A row of results/benchmarks.csv. `ours` and `peer` are medians in `unit`, `spread` half the range of each over its median.

    `ratio` is how many times less ours takes; for a figure without a peer it is what the figure itself says (a share, seconds).
    `wanted` is the target of the ratio, `kind` says whether at least or at most. `difference` is the largest one between the results.
    """

    benchmark: str
    case: str
    peer: str
    unit: str
    ours: float
    ours_spread: float
    theirs: float
    theirs_spread: float
    ratio: float
    wanted: str
    difference: str


def race(
    ours: Callable[[], Any],
    peers: Mapping[str, Callable[[], Any]],
    *,
    same: Callable[[Any, Any], float],
    repetitions: int = REPETITIONS,
    clock: Callable[[], float] = time.process_time,
) -> tuple[list[float], dict[str, list[float]], float]:
    """Seconds of every repetition, ours and each peer's by turns, and the largest difference `same` found (it raises where that is too much)."""
    taken: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in peers}
    largest = 0.0
    for _ in range(repetitions):
        seconds, found = timed(ours, clock)
        taken.append(seconds)
        for name, peer in peers.items():
            seconds, expected = timed(peer, clock)
            theirs[name].append(seconds)
            largest = max(largest, same(found, expected))
    return taken, theirs, largest


def fastest(peers: Mapping[str, Callable[[], Any]], *, clock: Callable[[], float] = time.process_time) -> str:
    """The peer that takes the least time, each tried once."""
    return min(peers, key=lambda name: timed(peers[name], clock)[0])


def timed(work: Callable[[], Any], clock: Callable[[], float]) -> tuple[float, Any]:
    """Seconds that `work` took, and what it gave."""
    started = clock()
    result = work()
    return clock() - started, result


def figure(
    benchmark: str, case: str, *, raced: tuple[list[float], dict[str, list[float]], float], wanted: str, unit: str
) -> Figure:
    """The row of a race: against the fastest peer."""
    ours, peers, difference = raced
    best = min(peers, key=lambda name: statistics.median(peers[name]))
    return Figure(
        benchmark=benchmark,
        case=case,
        peer=best,
        unit=unit,
        ours=statistics.median(ours),
        ours_spread=spread(ours),
        theirs=statistics.median(peers[best]),
        theirs_spread=spread(peers[best]),
        ratio=statistics.median(peers[best]) / statistics.median(ours),
        wanted=wanted,
        difference=f"{difference:.1e}",
    )


def value(benchmark: str, case: str, *, peer: str, unit: str, value: float, wanted: str) -> Figure:
    """The row of a figure that no time is behind."""
    return Figure(
        benchmark=benchmark,
        case=case,
        peer=peer,
        unit=unit,
        ours=math.nan,
        ours_spread=math.nan,
        theirs=math.nan,
        theirs_spread=math.nan,
        ratio=value,
        wanted=wanted,
        difference="",
    )


def spread(seconds: list[float]) -> float:
    """Half the range over the median."""
    return (max(seconds) - min(seconds)) / 2 / statistics.median(seconds)
