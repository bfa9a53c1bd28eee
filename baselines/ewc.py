"""EWC: elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796).

Weights that mattered for past tasks are held by a quadratic penalty (eq. 3 of the paper, summed over past tasks s)

    L(theta) = CE_t(theta) + sum_s strength/2 * sum_i F_s,i (theta_i - theta*_s,i)^2 .

F_s is the diagonal of the empirical Fisher information at theta*_s: the mean over examples of the *squared per-example gradient* of log p(answer).
The sum of quadratics is kept as one, exactly: importance F = sum_s F_s, centre mu = sum_s F_s theta*_s / F, gradient strength * F (theta - mu).

Deviations: F_s is scaled to mean 1 over the adapter, so that `strength` means the same on every model (the raw mean is kept in `raw_means`).
Released LLM ports are not followed: they square batch means (F too small by the batch size), include the penalty's own gradient,
read gradients after they were cleared (F = 0), or detach the penalty (no gradient at all).
With `decay` set it is online EWC (arXiv 1805.06370): F <- decay * F + F_t, centre the latest theta*.

Card:
- paper: arXiv 1612.00796; 1805.06370 (online)
- trainable: rank (in + out) per layer
- memory: 2 x adapter
- compute: fisher_examples backward passes per task
- deviations: Fisher scaled to mean 1, on adapter factors
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from baselines.seq import Seq
from clbench.data.sampling import generator
from clbench.models.loss import answer_loss
from clbench.protocols import Engine, Stage
from clbench.types import IGNORED, Example


def combine(importance: Tensor, centre: Tensor, fisher: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two quadratics as one, all of one shape: F + F_t, their weighted centre, and the scalar by which the sum of the two exceeds it.

    F (x - a)^2 + G (x - b)^2 = (F + G)(x - c)^2 + F G / (F + G) (a - b)^2 with c = (F a + G b) / (F + G). Where both are 0, c is the anchor.
    """
    total = importance + fisher
    divisor = total.clamp_min(torch.finfo(total.dtype).tiny)
    joint_centre = torch.where(total > 0, (importance * centre + fisher * anchor) / divisor, anchor)
    return total, joint_centre, (importance * fisher / divisor * (centre - anchor).square()).sum()


def penalty_gradient(theta: Tensor, importance: Tensor, centre: Tensor, strength: float) -> Tensor:
    """d penalty / d theta = strength * F * (theta - mu)."""
    return strength * importance * (theta - centre)


def penalty_value(theta: Tensor, importance: Tensor, centre: Tensor, strength: float) -> Tensor:
    """strength / 2 * sum F (theta - mu)^2, in nats."""
    return 0.5 * strength * (importance * (theta - centre).square()).sum()


def squared_gradients(engine: Engine, losses: Sequence[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Mean over `losses` of the squared gradient of each, by trainable tensor: the diagonal empirical Fisher information (nats^2).

    One backward per loss, so that squares are taken before any averaging. Every rank passes all losses, and gradients add up over ranks, so
    each gives its share.
    """
    squares: dict[str, Tensor] = {}
    for loss in losses:
        engine.backward(loss() / engine.world_size)
        for tensor in engine.tensors():
            square = tensor.grad.square() / len(losses)
            squares[tensor.name] = squares[tensor.name] + square if tensor.name in squares else square
        engine.clear()
    return squares


@dataclass(kw_only=True)
class Ewc(Seq):
    """Quadratic penalty of `strength`; Fisher from `fisher_examples` examples per task; `decay` None: exact sum over tasks."""

    strength: NonNegativeFloat
    fisher_examples: PositiveInt
    decay: Annotated[float, Field(ge=0, le=1)] | None
    importance: dict[str, Tensor] = field(default_factory=dict)
    centre: dict[str, Tensor] = field(default_factory=dict)
    excess: float = 0.0
    raw_means: list[float] = field(default_factory=list)

    def correct_gradients(self, engine: Engine) -> Tensor | float:
        """Adds the penalty's gradient; returns its value in nats."""
        if not self.importance or self.strength == 0:
            return 0.0
        value: Tensor | float = 0.5 * self.strength * self.excess
        for tensor in engine.tensors():
            quadratic = (tensor.value, self.importance[tensor.name], self.centre[tensor.name], self.strength)
            tensor.grad += penalty_gradient(*quadratic)
            value = value + penalty_value(*quadratic)
        return value

    def end_stage(self, stage: Stage, engine: Engine) -> None:
        """Adds this task's Fisher, taken at its final weights, to the quadratic."""
        fisher = self.fisher(stage, engine)
        for tensor in engine.tensors():
            name, anchor = tensor.name, tensor.value.clone()
            if name not in self.importance:
                self.importance[name], self.centre[name] = fisher[name], anchor
            elif self.decay is not None:
                self.importance[name], self.centre[name] = self.decay * self.importance[name] + fisher[name], anchor
            else:
                past = self.importance[name], self.centre[name]
                self.importance[name], self.centre[name], excess = combine(*past, fisher[name], anchor)
                self.excess += float(excess)

    def fisher(self, stage: Stage, engine: Engine) -> dict[str, Tensor]:
        """Fisher of this task on `fisher_examples` of its examples, of the sum of log p over each answer's tokens, scaled to mean 1."""
        order = torch.randperm(len(stage.train), generator=generator(self.seed, "fisher", stage.index))
        picked = order[: self.fisher_examples].tolist()

        def nll(example: Example) -> Tensor:
            batch = stage.collate([example])
            return answer_loss(engine.model, batch) * (batch.labels[:, 1:] != IGNORED).sum()

        engine.model.eval()
        squares = squared_gradients(engine, [partial(nll, stage.train[index]) for index in picked])
        total = torch.stack([square.sum() for square in squares.values()]).sum()
        self.raw_means.append(float(total) / sum(square.numel() for square in squares.values()))
        return {name: square / self.raw_means[-1] for name, square in squares.items()}

    def state_dict(self) -> dict[str, Any]:
        tensors = {f"importance/{name}": value for name, value in self.importance.items()}
        tensors |= {f"centre/{name}": value for name, value in self.centre.items()}
        return tensors | {"raw_means": self.raw_means, "excess": self.excess}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the quadratic back."""
        self.importance, self.centre = (
            {key.removeprefix(part): value for key, value in state.items() if key.startswith(part)}
            for part in ("importance/", "centre/")
        )
        self.raw_means, self.excess = list(state["raw_means"]), state["excess"]
