"""SLAO: one adapter merged over tasks, without data. Each task starts in the directions of the last one, and its B enters a running average.

Before task i > 1 the rows of A are made orthonormal, and B goes on as it is; after it the merged B follows by 1/sqrt(i):

    A_i starts as Q^T of the thin QR of A_{i-1}^T,    B_i as B_{i-1},    B_m <- B_m + (B_i - B_m) / sqrt(i),    examined: scale * B_m A_i.

Paper: arXiv 2512.23017. No official code is known to us: this follows its equations. After the first task B_m = B_1, so the merged pair is the
trained one. Interpretations: the sign of a column of Q, which QR leaves open, is chosen so that the diagonal of R is not negative; learning
rate and optimizer as everywhere here. No setting makes it SEQ.

Card:
- paper: arXiv 2512.23017
- trainable: rank (in + out) per layer
- memory: rank out per layer
- compute: one QR per layer and task
- deviations: from the equations, no code known
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from baselines.seq import SeqPairs
from clbench.models.pairs import holding
from clbench.protocols import Stage


def orthonormal_rows(a: Tensor) -> Tensor:
    """Q^T of A^T = Q R with a diagonal of R that is not negative: orthonormal rows [rank, in] that span those of A [rank, in]."""
    q, r = torch.linalg.qr(a.T)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    return (q * signs).T


@dataclass(kw_only=True)
class Slao(SeqPairs):
    """One LoRA, examined with the merged B of all tasks so far."""

    stages: int = 0
    merged: dict[str, Tensor] = field(default_factory=dict)

    def wrap(self, model: Module) -> Module:
        wrapped = super().wrap(model)
        self.merged = {pair.B: torch.zeros_like(pair.live()[pair.B]) for pair in self.pairs}
        return wrapped

    def begin_stage(self, stage: Stage, model: Module) -> None:
        if self.stages:
            for pair in self.pairs:
                pair.live()[pair.A].copy_(orthonormal_rows(pair.live()[pair.A]))

    def consolidate(self, model: Module) -> None:
        self.stages += 1
        for pair in self.pairs:
            self.merged[pair.B] += (pair.live()[pair.B] - self.merged[pair.B]) / sqrt(self.stages)

    def views(self, model: Module) -> dict[str, AbstractContextManager]:
        return {
            "merged": holding(self.pairs, {pair.A: pair.live()[pair.A].clone() for pair in self.pairs} | self.merged)
        }

    def state_dict(self) -> dict[str, Any]:
        return {"stages": self.stages, **self.merged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stages = state["stages"]
        self.merged = {name: state[name].to(value) for name, value in self.merged.items()}
