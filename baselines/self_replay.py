"""Self-replay: text that the untouched model wrote is replayed, and predictions on it are held to the untouched model's. No data is needed.

    loss = CE(task) + strength * R,      R = mean over the tokens of replayed rows of KL(p_base || p_theta)   (`kl`, whole vocabulary, nats)
                                         or of -log p_theta(token)                                            (`ce`).

Before the first stage `rows` rows of `length` tokens are drawn from the untouched model at temperature 1, from BOS on, and not stopped at EOS. They
are kept as token ids with the method's state, so neither resuming nor the number of processes changes them. Each step draws `ratio` of them per
task row, with replacement. p_base is the same model with its adapter off; at the first step the `kl` form is 0.

Paper: arXiv 2605.26097 (only the abstract could be read); code: martin-marek/forgetting, without a licence, so only its equations are followed.
Deviation: one buffer for the whole stream, theirs is drawn anew; rows are `length` tokens as the yaml says (theirs: 512).

Card:
- paper: arXiv 2605.26097 (abstract)
- trainable: rank (in + out) per layer
- memory: rows * length token ids
- compute: 1 + ratio times the rows per step, and a forward of the replayed ones without adapter
- deviations: the buffer is drawn once
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.nn import Module

from baselines.seq import Seq
from clbench.data.sampling import generator
from clbench.models.loss import answer_loss, indices_of, pack, rows_of
from clbench.models.outputs import divergence, nll, states, untouched, written
from clbench.protocols import Stage
from clbench.types import Batch, Example, Source


@dataclass(kw_only=True)
class SelfReplay(Seq):
    """LoRA with `strength` times R on `rows` rows of `length` tokens that the untouched model wrote."""

    strength: NonNegativeFloat
    form: Literal["kl", "ce"]
    ratio: NonNegativeFloat
    rows: PositiveInt
    length: PositiveInt
    replay: tuple[Example, ...] = field(default=())

    def wrap(self, model: Module) -> Module:
        """Draws the rows, then adds the adapter. A run that continues takes the rows back from its checkpoint."""
        if self.strength:
            draws = generator(self.seed, "self replay")
            self.replay = as_examples(written(model, rows=self.rows, length=self.length, draws=draws))
        return super().wrap(model)

    def training_set(self, stage: Stage) -> Sequence[Source]:
        current = Source(examples=stage.train)
        if self.strength == 0 or self.ratio == 0:
            return (current,)
        return (current, Source(examples=self.replay, share=self.ratio, weight=self.strength))

    def loss(self, model: Module, batch: Batch) -> Tensor:
        """CE + strength * R in nats, this micro-batch's share; the batch's weights add to 1 over both, so they are stretched by 1 + strength."""
        if len(batch.source_tokens) == 1:
            return answer_loss(model, batch)
        if self.form == "ce":
            return (1 + self.strength) * answer_loss(model, batch)
        picked = indices_of(batch, 1)
        replayed = rows_of(batch, picked)
        packed, of_replayed, reference = pack(batch), pack(replayed), partial(untouched, model)
        with reference():
            before = states(model, of_replayed)
        now = states(model, packed)
        after, places = now[torch.isin(packed.rows, picked)], of_replayed.places
        weights = (replayed.weights * (replayed.sources == 1))[of_replayed.rows[places]]
        kl = divergence(model, after[places], before[places], weights, reference=reference)
        current = (batch.weights * (batch.sources == 0))[packed.rows[packed.places]]
        return (1 + self.strength) * (nll(model, now, packed, current) + kl)

    def state_dict(self) -> dict[str, Any]:
        return {"replay": torch.tensor([example.ids for example in self.replay])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.replay = as_examples(state["replay"])


def as_examples(ids: Tensor) -> tuple[Example, ...]:
    """Rows of token ids as examples, of which all but the first token are trained on."""
    return tuple(
        Example(id=f"self_replay/{number}", prompt="", answer="", ids=tuple(row))
        for number, row in enumerate(ids.tolist())
    )
