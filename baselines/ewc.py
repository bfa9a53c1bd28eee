"""EWC: elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796).

Weights that mattered for past tasks are held by a quadratic penalty (eq. 3 of the paper, summed over past tasks s)

    L(theta) = CE_t(theta) + sum_s strength/2 * sum_i F_s,i (theta_i - theta*_s,i)^2 .

F_s is the diagonal of the empirical Fisher information at theta*_s: the mean over examples of the *squared per-example gradient* of log p(answer).
The sum of quadratics is kept as one, exactly: importance F = sum_s F_s, centre mu = sum_s F_s theta*_s / F, gradient strength * F (theta - mu).

Deviations: F_s is scaled to mean 1 over the adapter, so that `strength` means the same on every model (the raw mean is kept in `raw_means`).
Released LLM ports are not followed: they square batch means (F too small by the batch size), include the penalty's own gradient,
read gradients after they were cleared (F = 0), or detach the penalty (no gradient at all).
With `decay` set it is online EWC (arXiv 1805.06370): F <- decay * F + F_t, centre the latest theta*.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from clbench.adapters import Lora
from clbench.data import generator
from clbench.loss import answer_loss
from clbench.protocols import Engine, Method
from clbench.types import Batch, Stage


def combine(importance: Tensor, centre: Tensor, fisher: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """One quadratic for two: (F + F_t, their weighted centre), all of one shape. Where both F are 0 the centre is the anchor."""
    total = importance + fisher
    return total, torch.where(total > 0, (importance * centre + fisher * anchor) / total.clamp_min(torch.finfo(total.dtype).tiny), anchor)


def penalty_gradient(theta: Tensor, importance: Tensor, centre: Tensor, strength: float) -> Tensor:
    """d penalty / d theta = strength * F * (theta - mu)."""
    return strength * importance * (theta - centre)


def penalty_value(theta: Tensor, importance: Tensor, centre: Tensor, strength: float) -> Tensor:
    """strength / 2 * sum F (theta - mu)^2, in nats; the separate form's constant is left out."""
    return 0.5 * strength * (importance * (theta - centre).square()).sum()


@dataclass(kw_only=True)
class Ewc(Method):
    """Quadratic penalty of `strength`; Fisher from `fisher_examples` examples per task; `decay` None: exact sum over tasks."""

    lora: Lora
    seed: int
    strength: float
    fisher_examples: int
    decay: float | None
    importance: dict[str, Tensor] = field(default_factory=dict)
    centre: dict[str, Tensor] = field(default_factory=dict)
    raw_means: list[float] = field(default_factory=list)

    def wrap(self, model: Module) -> Module:
        """Adds the one adapter that all stages train."""
        return self.lora.add(model, seed=self.seed)

    def loss(self, model: Module, batch: Batch) -> Tensor:
        """Cross-entropy on the current task's answers; the penalty enters as a gradient."""
        return answer_loss(model, batch)

    def correct_gradients(self, engine: Engine) -> Tensor | float:
        """Adds the penalty's gradient; returns its value in nats."""
        if not self.importance or self.strength == 0:
            return 0.0
        value = 0.0
        for shard in engine.shards():
            quadratic = (shard.value, self.importance[shard.name], self.centre[shard.name], self.strength)
            shard.grad += penalty_gradient(*quadratic)
            value = value + penalty_value(*quadratic)
        return engine.total(value)

    def end_stage(self, stage: Stage, engine: Engine) -> None:
        """Adds this task's Fisher, taken at its final weights, to the quadratic."""
        fisher = self.fisher(stage, engine)
        for shard in engine.shards():
            anchor = shard.value.clone()
            if shard.name not in self.importance:
                self.importance[shard.name], self.centre[shard.name] = fisher[shard.name], anchor
            elif self.decay is not None:
                self.importance[shard.name] = self.decay * self.importance[shard.name] + fisher[shard.name]
                self.centre[shard.name] = anchor
            else:
                merged = combine(self.importance[shard.name], self.centre[shard.name], fisher[shard.name], anchor)
                self.importance[shard.name], self.centre[shard.name] = merged

    def fisher(self, stage: Stage, engine: Engine) -> dict[str, Tensor]:
        """Mean over examples of the squared gradient of the sum of log p over the answer's tokens, scaled to mean 1."""
        count = min(self.fisher_examples, len(stage.train))
        picked = torch.randperm(len(stage.train), generator=generator(self.seed, "fisher", stage.index))[:count].tolist()
        squares = {shard.name: torch.zeros_like(shard.value) for shard in engine.shards()}
        engine.model.eval()
        for index in picked:
            batch = stage.collate([stage.train[index]])
            tokens = (batch.labels[:, 1:] >= 0).sum()
            engine.backward(answer_loss(engine.model, batch) * tokens)
            for shard in engine.shards():
                squares[shard.name] += shard.grad.square() / count
            engine.clear()
        total = engine.total(sum(square.sum() for square in squares.values()))
        size = engine.total(torch.tensor(float(sum(square.numel() for square in squares.values()))))
        mean = float(total / size)
        self.raw_means.append(mean)
        return {name: square / mean if mean > 0 else square for name, square in squares.items()}

    def state_dict(self) -> dict[str, Any]:
        """Importance and centre of every trainable tensor."""
        tensors = {f"importance/{name}": value for name, value in self.importance.items()}
        return tensors | {f"centre/{name}": value for name, value in self.centre.items()} | {"raw_means": self.raw_means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the quadratic back."""
        parts = {key: value for key, value in state.items() if "/" in key}
        self.importance = {key.removeprefix("importance/"): value for key, value in parts.items() if key.startswith("importance/")}
        self.centre = {key.removeprefix("centre/"): value for key, value in parts.items() if key.startswith("centre/")}
        self.raw_means = list(state["raw_means"])
