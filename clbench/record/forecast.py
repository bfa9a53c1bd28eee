"""How long a run will take on the machine at hand.

It follows from what the untouched model's examination took, and from what training took: a short trial, and later the first stage.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from heapq import nlargest
from operator import itemgetter

from clbench.config import is_due
from clbench.progress import spoken
from clbench.types import Score

Asked = tuple[str, str]
"""A probe and one of its tasks."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds: `training` of each stage in their order, `examining` once.

    `cadence` as in ProbeConfig; each of a model's `views` is examined. `left_out` says what is not counted.
    """

    training: tuple[float, ...] = ()
    examining: Mapping[Asked, float] = field(default_factory=dict)
    cadence: Mapping[str, str] = field(default_factory=dict)
    views: int = 1
    left_out: str = ""

    def due(self, stage: int) -> dict[Asked, float]:
        """Seconds of what is examined after a stage, on one view."""
        last = len(self.training)
        return {
            asked: seconds
            for asked, seconds in self.examining.items()
            if is_due(self.cadence.get(asked[0], "all"), stage, last)
        }

    def examination(self, stage: int) -> float:
        return self.views * sum(self.due(stage).values())

    def until(self, stage: int) -> float:
        """Seconds from the first stage's beginning to the end of stage `stage`."""
        return sum(self.training[:stage]) + sum(map(self.examination, range(1, stage + 1)))

    def spoken(self, *, done: int) -> str:
        """One line: how long the stages after the `done` first take, and where the time goes."""
        stages = range(done + 1, len(self.training) + 1)
        training, examining = sum(self.training[done:]), sum(map(self.examination, stages))
        spent: dict[Asked, float] = defaultdict(float)
        for stage in stages:
            for asked, seconds in self.due(stage).items():
                spent[asked] += self.views * seconds
        most = nlargest(3, spent.items(), key=itemgetter(1)) if examining else []
        named = ", ".join(f"{' '.join(asked)} {spoken(seconds)}" for asked, seconds in most)
        each = (
            f"{len(stages)} stages, {spoken(training / len(stages))} each on average" if stages else "no stage is left"
        )
        rest = f"; {self.left_out} on top" if self.left_out else ""
        return (
            f"about {spoken(training + examining)} to go on this machine: training {spoken(training)} ({each}), "
            f"examining {spoken(examining)}{f' (most of it: {named})' if named else ''}{rest}"
        )


def seconds_of(scores: Iterable[Score]) -> Mapping[Asked, float]:
    """What each probe's tasks took together, by what their scores say."""
    found: dict[Asked, float] = defaultdict(float)
    for score in scores:
        found[score.probe, score.task] += score.seconds
    return found
