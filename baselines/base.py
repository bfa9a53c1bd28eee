"""base: the untouched model. Trains nothing; every stage shows what the pretrained weights give.

The reference of base-knowledge retention (1 by definition) and of what a task's prompt alone brings out.

Card:
- paper: none
- trainable: 0
- memory: none
- compute: none
- deviations: none
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.nn import Module

from clbench.protocols import Method, Stage
from clbench.types import Source


@dataclass(kw_only=True)
class Base(Method):
    """No training."""

    def wrap(self, model: Module) -> Module:
        return model.requires_grad_(False)

    def training_set(self, stage: Stage) -> Sequence[Source]:
        return ()
