"""LiNeS: SEQ, examined with the update of each block scaled by its depth. Training is sequential fine-tuning, bit for bit.

    the update of block l of L is scaled by   alpha + beta (l - 1) / (L - 1)          after every stage, one view for each (alpha, beta)

Shallow blocks, which hold what is general, move least. Paper: LiNeS (arXiv 2410.17146), there once after one fine-tuning, with beta = 1 - alpha;
official code: wang-kee/LiNeS (MIT). An adapted layer that belongs to no block moves by alpha.

Card:
- paper: arXiv 2410.17146
- trainable: rank (in + out) per layer
- memory: none
- compute: one examination per (alpha, beta)
- deviations: after every stage, while training goes on from the whole update
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch.nn import Module

from baselines.base_interpolation import Shrunk


def block_of(name: str) -> int:
    """The number of the block that a parameter is of, from 0; 0 where it is of none.

    >>> block_of("base_model.model.model.layers.11.mlp.up_proj.lora_A.default.weight")
    11
    """
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else 0


@dataclass(kw_only=True)
class Lines(Shrunk):
    """SEQ, examined with each of the `scalings` of its update, pairs of alpha and beta; the first is the primary view."""

    scalings: list[list[float]]

    def views(self, model: Module) -> dict[str, AbstractContextManager]:
        depths = [block_of(pair.A) for pair in self.pairs]
        last = max(1, *depths)
        return {
            f"{alpha:g}+{beta:g}": self.view([alpha + beta * depth / last for depth in depths])
            for alpha, beta in self.scalings
        }

    def still(self) -> Sequence[str]:
        """The untouched model."""
        return [f"{alpha:g}+{beta:g}" for alpha, beta in self.scalings if alpha == beta == 0]
