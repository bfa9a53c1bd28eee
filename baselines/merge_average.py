"""Merge-average: SEQ, examined at the average of its own trajectory. Training is sequential fine-tuning, bit for bit.

After stage t the examined weights are the running average of the updates that the stages left behind,

    W_examined = W_0 + 1/t * sum_{s<=t} (alpha/r) B_s A_s            (the mean of products, not of factors),

while the next stage goes on from the un-averaged ones. So it costs no training and shows how much of forgetting a free average undoes. Model
averaging along fine-tuning: model soups (arXiv 2203.05482), task arithmetic (arXiv 2212.04089), magnitude merging for continual learning (MagMax,
arXiv 2407.06322); no one paper's method and no official code. Interpretation: the average is over stages, uniform, and only a view. Memory: rank
(in + out) numbers per layer and task.

Card:
- paper: arXiv 2203.05482, 2212.04089 (relatives)
- trainable: rank (in + out) per layer
- memory: rank (in + out) per layer and task
- compute: one merge per examination
- deviations: not one paper's method
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import Module

from baselines.seq import SeqPairs
from clbench.models.pairs import Pair, stack


@contextmanager
def averaged(pairs: tuple[Pair, ...], stacks: dict[str, Tensor]) -> Iterator[None]:
    """The weights hold the mean of the stacked updates, the live adapter nothing; bitwise restored on exit."""
    stacked = pairs if stacks else ()
    touched = [tensor for pair in stacked for tensor in (pair.stored, pair.live()[pair.B])]
    kept = [tensor.clone() for tensor in touched]
    for pair in stacked:
        stages = stacks[pair.A].shape[0] // pair.rank
        with pair.whole(writing=True):
            pair.weight.add_(pair.update(stacks) / stages)
        pair.live()[pair.B].zero_()
    try:
        yield
    finally:
        for tensor, before in zip(touched, kept, strict=True):
            tensor.copy_(before)


@dataclass(kw_only=True)
class MergeAverage(SeqPairs):
    """Sequential fine-tuning of one LoRA, examined at the mean of its updates after each stage so far."""

    writing = True

    stacks: dict[str, Tensor] = field(default_factory=dict)

    def consolidate(self, model: Module) -> None:
        self.stacks = stack(self.pairs, self.stacks)

    def views(self, model: Module) -> dict[str, AbstractContextManager]:
        """The average alone; the un-averaged weights are those of SEQ."""
        return {"average": averaged(self.pairs, self.stacks)}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.stacks)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stacks = dict(state)
