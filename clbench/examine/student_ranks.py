"""A student of many processes: each rank answers its part of the requests, and every rank gets all answers.

Probes run on every rank alike, in lock-step; what they ask for is dealt out here. Requests that share a context stay together, as a context is read
once for all of them. Where ranks hold slices of the weights (`sharding`), one that has answered its part helps the others to gather theirs. Not here:
how a request is answered (`student`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from clbench.data.encoder import Encoder
from clbench.examine.student import Ids, Student
from clbench.models.sharding import serve
from clbench.train.ranks import World

T, R = TypeVar("T"), TypeVar("R")


class RankStudent(Student):
    """`Student` among the ranks of `world`; every rank makes the same calls. `tokens_scored` counts this rank's part."""

    def __init__(self, model: Module, encoder: Encoder, *, world: World) -> None:
        super().__init__(model, encoder)
        self.world = world
        self._is_sharing = False

    def log_likelihoods(
        self, requests: Sequence[tuple[Ids, Ids]], *, max_length: int | None = None
    ) -> list[tuple[float, bool]]:
        """As one process gives them, up to what a batch's shape changes in rounding."""
        work = partial(super().log_likelihoods, max_length=max_length)
        return self.share(work, requests, by=[context for context, _ in requests])

    def generate(self, prompts: Sequence[Ids], *, max_new_tokens: int) -> list[str]:
        """As one process gives them."""
        return self.share(partial(super().generate, max_new_tokens=max_new_tokens), prompts, by=prompts)

    def write(
        self,
        prompts: Sequence[Ids],
        *,
        max_new_tokens: int,
        has_ended: Callable[[list[list[int]]], list[bool]] | None = None,
    ) -> list[list[int]]:
        """As one process gives them."""
        work = partial(super().write, max_new_tokens=max_new_tokens, has_ended=has_ended)
        return self.share(work, prompts, by=prompts)

    def next_log_probs(self, contexts: Sequence[Ids]) -> Tensor:
        """As one process gives them, up to what a batch's shape changes in rounding."""
        read = super().next_log_probs
        # Cloned: a row that is a view would be sent with all the others behind it.
        rows = self.share(lambda mine: [row.clone() for row in read(mine).cpu()], contexts, by=contexts)
        return torch.stack(rows).to(self.encoder.device)

    def share(self, work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T], *, by: Sequence[Ids]) -> list[R]:
        """The results of `work` for all items, in their order: each rank works on its part. What `work` asks of this student is its own."""
        if self._is_sharing:
            return list(work(items))
        parts = dealt(by, size=self.world.size)
        mine = [items[index] for index in parts[self.world.rank]]
        self._is_sharing = True
        try:
            found = list(work(mine)) if mine else []
        finally:
            self._is_sharing = False
        serve(self.model)
        together = {
            index: result
            for part, results in zip(parts, self.world.gather(found), strict=True)
            for index, result in zip(part, results, strict=True)
        }
        return [together[index] for index in range(len(items))]


def dealt(keys: Sequence[Ids], *, size: int) -> list[list[int]]:
    """The indices of `keys` in `size` parts: equal keys in one part, long and short ones evenly, each part in ascending order.

    >>> dealt([(1, 2), (3,), (1, 2), (4,)], size=2)
    [[0, 2, 3], [1]]
    """
    members: dict[Ids, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    longest_first = sorted(members, key=len, reverse=True)
    return [sorted(index for key in longest_first[rank::size] for index in members[key]) for rank in range(size)]
