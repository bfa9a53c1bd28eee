"""The processes that run one experiment together: who this one is, what ranks tell each other, and waiting for each other.

One process is a world of its own and talks to nobody. Not here: gradients and weights (the engine's), starting processes (`launch`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import distributed

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """`size` processes, of which this one is number `rank`; rank 0 alone writes and prints."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
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

    def wait(self) -> None:
        """Returns once every rank has come here."""
        if self.size > 1:
            distributed.barrier()
