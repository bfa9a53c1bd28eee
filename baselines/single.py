"""Single: one model per task. Before every task the adapter goes back to its initial values.

What one task's data alone can teach the pretrained model: the bound of learning without forgetting or transfer. Only the diagonal counts, the
score on task t after stage t ("learning accuracy"); what stage t scores on other tasks is that of a model made for task t. "SingleFT" of TRACE
(arXiv 2310.06762), "PerTaskFT" of O-LoRA (arXiv 2310.14152). The initial values are the same for every task. No official code, no deviation.

Card:
- paper: arXiv 2310.06762 (SingleFT), 2310.14152 (PerTaskFT)
- trainable: rank (in + out) per layer
- memory: 1 adapter
- compute: none
- deviations: none; only the diagonal counts
"""

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import Module

from baselines.seq import Seq
from clbench.models.weights import load_trainable_state, trainable
from clbench.protocols import Stage


@dataclass(kw_only=True)
class Single(Seq):
    """Fine-tuning of one LoRA on each task from the same start."""

    initial: dict[str, Tensor] = field(default_factory=dict)

    def wrap(self, model: Module) -> Module:
        """Adds the adapter and remembers its initial values, which `seed` decides (no part of a checkpoint)."""
        wrapped = super().wrap(model)
        self.initial = {name: tensor.detach().clone() for name, tensor in trainable(wrapped).items()}
        return wrapped

    def begin_stage(self, stage: Stage, model: Module) -> None:
        load_trainable_state(model, self.initial)
