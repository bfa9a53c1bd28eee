"""The processes that run one experiment together: who this one is, what ranks tell each other, and waiting for each other.

One process is a rank of its own and talks to nobody. Not here: gradients and weights (the engine's), starting and ending processes (`launch`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import distributed

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """`size` processes, of which this one is number `rank`; rank 0 alone writes and prints."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, value: T) -> T:
        """Rank 0's `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        distributed.all_gather_object(values, value)
        return values

    def in_turn(self, work: Callable[[], T]) -> T:
        """What `work` gives, done by the first rank before the others, who may find on disk what it made."""
        if not self.is_first:
            self.wait()
        found = work()
        if self.is_first:
            self.wait()
        return found

    def wait(self) -> None:
        if self.size > 1:
            distributed.barrier()

    def shared(
        self, work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T], *, by: Sequence[tuple[object, ...]]
    ) -> list[R]:
        """The results of `work` for all items, in their order, on every rank; each works on a part, and items of equal keys `by` stay together."""
        if self.size == 1:
            return list(work(items))
        parts = dealt(by, size=self.size)
        mine = [items[index] for index in parts[self.rank]]
        found = list(work(mine)) if mine else []
        together = {
            index: result
            for part, results in zip(parts, self.gather(found), strict=True)
            for index, result in zip(part, results, strict=True)
        }
        return [together[index] for index in range(len(items))]


def dealt(keys: Sequence[tuple[object, ...]], *, size: int) -> list[list[int]]:
    """The indices of `keys` in `size` parts: equal keys in one part, long and short ones evenly, each part in ascending order.

    >>> dealt([(1, 2), (3,), (1, 2), (4,)], size=2)
    [[0, 2, 3], [1]]
    """
    members: dict[tuple[object, ...], list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    longest_first = sorted(members, key=len, reverse=True)
    return [sorted(index for key in longest_first[rank::size] for index in members[key]) for rank in range(size)]
