"""A student of many processes: each rank answers its part of the requests, and every rank gets all answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from clbench.data.encoder import Encoder
from clbench.examine.student import Ids, Student
from clbench.train.ranks import Ranks, shared

T, R = TypeVar("T"), TypeVar("R")


class RankStudent(Student):
    """`Student` among `ranks`; every rank makes the same calls. `tokens_scored` counts this rank's part."""

    def __init__(self, model: Module, encoder: Encoder, *, ranks: Ranks) -> None:
        super().__init__(model, encoder)
        self.ranks = ranks
        self._is_sharing = False

    def log_likelihoods(self, requests: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        """As one process gives them, up to what a batch's shape changes in rounding."""
        return self.share(super().log_likelihoods, requests, by=[context for context, _ in requests])

    def generate(self, prompts: Sequence[Ids], *, max_new_tokens: int) -> list[str]:
        """As one process gives them."""
        return self.share(partial(super().generate, max_new_tokens=max_new_tokens), prompts, by=prompts)

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
        self._is_sharing = True
        try:
            return shared(self.ranks, work, items, by=by)
        finally:
            self._is_sharing = False
