"""KL to the base: fine-tuning whose predictions on the current task are held to those of the untouched model.

    loss = CE + strength * mean over answer tokens of KL( p_base(. | x, y_<t) || p_theta(. | x, y_<t) ),      whole vocabulary, nats.

p_base is the same model with its adapter off, without dropout or gradient, so nothing is kept of it. With `tokens` "all" the mean is over what
follows every token that is read, those of the prompt and EOS, too. At the first step the adapter adds nothing, and the penalty and its gradient
are 0.

Official code: hiyouga/LlamaFactory (Apache-2.0), train/trainer_utils.py, `asft`, there with strengths of 0.05 to 0.1; paper: arXiv 2509.23753, which
reweights the cross-entropy besides: not followed, so that strength 0 is plain fine-tuning. Deviation: the divergence is (base || model) as in
that code; the vocabulary is read in slices.

Card:
- paper: arXiv 2509.23753 (its anchor alone)
- trainable: rank (in + out) per layer
- memory: none
- compute: one forward without adapter per step
- deviations: cross-entropy is not reweighted
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.nn import Module

from baselines.seq import Seq
from clbench.models.loss import answer_loss, pack
from clbench.models.outputs import divergence, nll, states, untouched
from clbench.types import Batch


@dataclass(kw_only=True)
class KlBase(Seq):
    """LoRA with `strength` times the divergence of the untouched model's predictions from its own at `tokens`."""

    strength: NonNegativeFloat
    tokens: Literal["answers", "all"]

    def loss(self, model: Module, batch: Batch) -> Tensor:
        """CE + strength * KL in nats, this micro-batch's share."""
        if self.strength == 0:
            return answer_loss(model, batch)
        packed, reference = pack(batch), partial(untouched, model)
        with reference():
            before = states(model, packed)
        now = states(model, packed)
        of_row = batch.weights[packed.rows]
        if self.tokens == "all":
            weights = (of_row > 0) / batch.source_tokens[0]
        else:
            weights = torch.zeros_like(of_row).index_copy(0, packed.places, of_row[packed.places])
        kl = divergence(model, now, before, weights, reference=reference)
        return nll(model, now, packed, of_row[packed.places]) + self.strength * kl
