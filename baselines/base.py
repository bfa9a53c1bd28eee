"""base: the untouched model. Trains nothing; every stage shows what the pretrained weights give.

The reference of base-knowledge retention (1 by definition) and of what a task's prompt alone brings out.

Card:
- paper: none
- trainable: 0
- memory: none
- compute: none
- deviations: none
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Module

from clbench.models.loss import answer_loss
from clbench.protocols import Method
from clbench.types import Batch, Source, Stage


@dataclass(kw_only=True)
class Base(Method):
    """No training."""

    def wrap(self, model: Module) -> Module:
        """Freezes all weights."""
        return model.requires_grad_(False)

    def training_set(self, stage: Stage) -> Sequence[Source]:
        """Nothing."""
        return ()

    def loss(self, model: Module, batch: Batch) -> Tensor:
        """Cross-entropy on the current task's answers, in nats per answer token; nothing minimises it."""
        return answer_loss(model, batch)
