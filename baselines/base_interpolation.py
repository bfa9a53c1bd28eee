"""Interpolation with the base: SEQ, examined with its update shrunk. Training is sequential fine-tuning, bit for bit.

    theta(alpha) = theta_0 + alpha (theta_T - theta_0)          after every stage, one view for each alpha

Idea: WiSE-FT (arXiv 2109.01903), which does it once after one fine-tuning. With LoRA the update is scale * B A, so that B is scaled. Each alpha is
a row of the leaderboard of its own; alpha 1 is SEQ, alpha 0 the untouched model, exactly. No official code for language models.

Card:
- paper: arXiv 2109.01903
- trainable: rank (in + out) per layer
- memory: none
- compute: one examination per alpha
- deviations: after every stage, while training goes on from the whole update
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Module

from baselines.seq import SeqPairs
from clbench.models.pairs import Pair, holding


def shrunk(pairs: Sequence[Pair], shares: Sequence[float]) -> dict[str, Tensor]:
    """The factors of updates of which `shares` are left, one a pair: A as it is, B scaled."""
    factors: dict[str, Tensor] = {}
    for pair, share in zip(pairs, shares, strict=True):
        live = pair.live()
        factors |= {pair.A: live[pair.A].clone(), pair.B: share * live[pair.B]}
    return factors


@dataclass(kw_only=True)
class Shrunk(SeqPairs):
    """Sequential fine-tuning of one LoRA that is examined with shares of its update."""

    keeps = False

    def view(self, shares: Sequence[float]) -> AbstractContextManager:
        """The model with such a share of each pair's update."""
        return holding(self.pairs, shrunk(self.pairs, shares))


@dataclass(kw_only=True)
class BaseInterpolation(Shrunk):
    """SEQ, examined with each of the `alphas` of its update; the first is the primary view."""

    alphas: list[float]

    def views(self, model: Module) -> dict[str, AbstractContextManager]:
        return {f"{alpha:g}": self.view([alpha] * len(self.pairs)) for alpha in self.alphas}

    def still(self) -> Sequence[str]:
        """The untouched model."""
        return [f"{alpha:g}" for alpha in self.alphas if alpha == 0]
