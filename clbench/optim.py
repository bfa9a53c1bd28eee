"""AdamW and its learning-rate schedule, with every number stated: the same for every engine."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch.nn import Parameter
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from clbench.config import TrainConfig


def optimizer(parameters: Iterable[Parameter], config: TrainConfig) -> AdamW:
    """AdamW with decoupled weight decay on every trainable tensor (arXiv 1711.05101)."""
    return AdamW(
        list(parameters),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=1e-8,
        weight_decay=config.weight_decay,
        fused=True,
    )


def schedule(optimizer: AdamW, config: TrainConfig, *, steps: int) -> LambdaLR:
    """Learning-rate factor per step: linear rise over `config.warmup * steps`, then `config.schedule`."""
    rise = max(1, math.ceil(config.warmup * steps))

    def factor(step: int) -> float:
        """The factor of optimizer step `step` (from 0)."""
        if config.warmup > 0 and step < rise:
            return (step + 1) / rise
        progress = (step - rise) / max(1, steps - rise)
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return max(0.0, 1.0 - progress)

    return LambdaLR(optimizer, factor)
