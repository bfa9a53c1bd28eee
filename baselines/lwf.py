"""LwF: learning without forgetting. On the current task's rows, predictions are held to those of the model before the task.

    loss = CE + strength * T^2 * mean over answer tokens of KL( softmax(z_previous / T) || softmax(z / T) ),      T = 2, whole vocabulary, nats.

The previous model is the adapter as it stood when the stage began, so the first stage is held to the untouched model; no row of an earlier task is
kept. Paper: arXiv 1606.09282 (eqs. 2-4, where the targets are an old task's own outputs on new images: a language model has one output for all
tasks). No official code for language models. Released ports keep no previous model, or take the divergence over padding; not followed. Without a
warm-up of new outputs, as there are none.

Card:
- paper: arXiv 1606.09282
- trainable: rank (in + out) per layer
- memory: 1 adapter
- compute: one forward of the previous adapter per step
- deviations: one output for all tasks
"""

from dataclasses import dataclass, field
from functools import partial

from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import Module

from baselines.seq import SeqPairs
from clbench.models.loss import answer_loss, pack
from clbench.models.outputs import divergence, nll, states
from clbench.models.pairs import using
from clbench.protocols import Stage
from clbench.types import Batch


@dataclass(kw_only=True)
class Lwf(SeqPairs):
    """LoRA with `strength` times the divergence of the previous model's predictions from its own, both softened by `temperature`."""

    strength: NonNegativeFloat
    temperature: PositiveFloat
    previous: dict[str, Tensor] = field(default_factory=dict)

    def begin_stage(self, stage: Stage, model: Module) -> None:
        """Keeps the adapter as it is; a run that continues within the stage does so before the stage's own weights are put back."""
        self.previous = {name: factor.clone() for pair in self.pairs for name, factor in pair.live().items()}

    def loss(self, model: Module, batch: Batch) -> Tensor:
        """CE + strength * T^2 KL in nats, this micro-batch's share."""
        if self.strength == 0:
            return answer_loss(model, batch)
        packed, reference = pack(batch), partial(using, model, self.pairs, self.previous)
        with reference():
            before = states(model, packed)
        now = states(model, packed)
        weights = batch.weights[packed.rows[packed.places]]
        hidden = now[packed.places], before[packed.places]
        kl = divergence(model, *hidden, weights, reference=reference, temperature=self.temperature)
        return nll(model, now, packed, weights) + self.strength * kl
