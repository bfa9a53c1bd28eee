"""I-LoRA: interpolation-based LoRA. A slow adapter averages the fast one's path and steadies it on replayed examples.

Paper: I-LoRA (arXiv 2402.18865). The fast factors w train on the current task and on a memory M of past ones, the slow factors l follow:

    loss = (CE_current + CE_memory) / 2 + consistency * mean over layers, tokens of M, width of (h_w(x) - h_l(x))^2
    l <- decay_k l + (1 - decay_k) w     after optimizer step k, factor by factor;  decay_k = min(decay, 1 - 1/(k+1)).

The slow adapter is the one examined first ("slow"), the fast one beside it ("fast"): which of them the paper deploys is not known to us. In the
first stage there is no memory, hence neither replay nor consistency; the average runs from the first step. Memory as in ER.

Official code: which47/LLMCL. Its moving average looks the slow factors up under the fast ones' names and so never moves them; its "slow learner"
is the base model, and its consistency a one-sided pull to it that counts padding. Not followed. Deviations: the slow adapter starts as a copy of
the fast one (theirs: an independent draw), the consistency is two-sided (`one_sided` restores relu(h_l - h_w)^2), padding is masked, the slow
forward runs without dropout, the slow adapter is never reset at a boundary, memory holds each example once. Interpretations: the two
cross-entropies are averaged as means of their own; hidden states of all layers, embeddings included, as in the release (`all_layers: false` takes
the last only); `warm_up: false` keeps decay constant; decay is not stated by the paper reachable to us.

Card:
- paper: arXiv 2402.18865
- trainable: rank (in + out) per layer (fast)
- memory: 1 adapter and the replay memory
- compute: 2 x rows per step and one forward of the slow adapter
- deviations: slow adapter moves; two-sided consistency; padding masked
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor
from torch.nn import Module

from baselines.er import Er
from clbench.models.loss import answer_loss, indices_of, pack, read, rows_of, weighted_nll
from clbench.models.pairs import Pair, holding, lora_pairs, using
from clbench.protocols import Engine
from clbench.types import Batch


def ema(slow: Tensor, fast: Tensor, decay: float) -> Tensor:
    """decay * slow + (1 - decay) * fast, of any shape."""
    return decay * slow + (1 - decay) * fast


def consistency(
    hidden_fast: Sequence[Tensor],
    hidden_slow: Sequence[Tensor],
    attention_mask: Tensor,
    *,
    tokens: int | None = None,
    one_sided: bool = False,
) -> Tensor:
    """Mean squared difference of hidden states over layers, attended tokens and width.

    One [..., width] per layer; `attention_mask` [...] is 1 where a token counts. Where the tokens are part of a larger batch, `tokens` is
    how many that batch has.
    """
    total = torch.zeros((), device=attention_mask.device)
    for fast, slow in zip(hidden_fast, hidden_slow, strict=True):
        wide = torch.promote_types(fast.dtype, torch.float32)
        difference = slow.to(wide) - fast.to(wide)
        difference = difference.relu() if one_sided else difference
        total = total + (difference.square().mean(-1) * attention_mask).sum()
    return total / len(hidden_fast) / (attention_mask.sum() if tokens is None else tokens)


def total_loss(cross_entropy: Tensor, disagreement: Tensor, strength: float) -> Tensor:
    """Loss in nats per answer token: cross-entropy, averaged over current and memory, plus the weighted consistency."""
    return cross_entropy + strength * disagreement


@dataclass(kw_only=True)
class Ilora(Er):
    """Fast and slow LoRA beside the memory of ER."""

    keeps = False

    decay: Annotated[float, Field(ge=0, le=1)]
    warm_up: bool
    consistency: NonNegativeFloat
    all_layers: bool
    one_sided: bool
    slow: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    pairs: tuple[Pair, ...] = ()

    def wrap(self, model: Module) -> Module:
        """Adds the fast adapter and copies it as the slow one."""
        wrapped = super().wrap(model)
        self.pairs = lora_pairs(wrapped)
        self.slow = {name: factor.clone() for pair in self.pairs for name, factor in pair.live().items()}
        return wrapped

    def loss(self, model: Module, batch: Batch) -> Tensor:
        """(CE_current + CE_memory) / 2 + consistency on the memory's rows, in nats per answer token."""
        if self.consistency == 0 or len(batch.source_tokens) == 1:
            return answer_loss(model, batch)
        picked = indices_of(batch, 1)
        packed, memory = pack(batch), pack(rows_of(batch, picked))
        with using(model, self.pairs, self.slow):
            _, hidden_slow = read(model, memory, hidden_states=True)
        logits, hidden_fast = read(model, packed, hidden_states=True)
        both = torch.isin(packed.rows, picked)
        first = 0 if self.all_layers else -1
        disagreement = consistency(
            [layer[both] for layer in hidden_fast[first:]],
            hidden_slow[first:],
            (batch.sources[picked] == 1)[memory.rows],
            tokens=batch.source_tokens[1],
            one_sided=self.one_sided,
        )
        return total_loss(weighted_nll(logits, packed, batch), disagreement, self.consistency)

    def after_step(self, engine: Engine) -> None:
        """Moves the slow factors towards the fast ones; whole tensors, so that every rank holds the slow adapter."""
        self.steps += 1
        decay = min(self.decay, 1 - 1 / (self.steps + 1)) if self.warm_up else self.decay
        for tensor in engine.tensors(self.slow):
            self.slow[tensor.name] = ema(self.slow[tensor.name], tensor.value, decay)

    def views(self, model: Module) -> dict[str, AbstractContextManager]:
        return {"slow": holding(self.pairs, self.slow), "fast": nullcontext()}

    def state_dict(self) -> dict[str, Any]:
        """Slow factors by name, steps taken, and the memory."""
        slow = {f"slow/{name}": value for name, value in self.slow.items()}
        return super().state_dict() | slow | {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.slow = {name: state[f"slow/{name}"].to(value) for name, value in self.slow.items()}
        self.steps = state["steps"]
