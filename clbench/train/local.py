"""The engine of one process: torch autograd, one optimizer, one schedule, gradients clipped over all trainable tensors together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from clbench.models.weights import trainable
from clbench.protocols import Engine, Shard
from clbench.train.optimizer import moments_of, set_moments


class ParameterShard(Shard):
    """A whole parameter as a shard: reads and writes go to the parameter and its gradient (zeros where it has none)."""

    def __init__(self, name: str, parameter: Parameter) -> None:
        self.name = name
        self._parameter = parameter

    @property
    def value(self) -> Tensor:
        """The parameter's values; in-place edits reach the model."""
        return self._parameter.detach()

    @value.setter
    def value(self, value: Tensor) -> None:
        self._parameter.detach().copy_(value)

    @property
    def grad(self) -> Tensor:
        """The parameter's gradient; in-place edits reach the optimizer."""
        if self._parameter.grad is None:
            self._parameter.grad = torch.zeros_like(self._parameter)
        return self._parameter.grad

    @grad.setter
    def grad(self, grad: Tensor) -> None:
        if grad is not self._parameter.grad:
            self.grad.copy_(grad)

    def part(self, whole: Tensor) -> Tensor:
        """All of it."""
        return whole


class LocalEngine(Engine):
    """One process. `clip` bounds the global gradient norm; 0 switches clipping off. Without an optimizer nothing trains.

    `moments` is the state that the optimizer starts from.
    """

    rank = 0
    world_size = 1

    def __init__(
        self,
        model: Module,
        *,
        optimizer: Optimizer | None,
        schedule: LRScheduler | None,
        clip: float,
        moments: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.clip = clip
        self._parameters = trainable(model)
        if moments:
            set_moments(optimizer, self._parameters, moments)

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of `loss`."""
        loss.backward()

    def step(self) -> None:
        """Clips, steps, clears."""
        assert self.optimizer is not None and self.schedule is not None, "a step without trainable tensors"
        if self.clip > 0:
            torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.clear()

    def clear(self) -> None:
        """Drops the gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def shards(self) -> Iterator[Shard]:
        """Every trainable tensor, whole."""
        return (ParameterShard(name, parameter) for name, parameter in self._parameters.items())

    def matrices(self, names: Iterable[str]) -> Iterator[Shard]:
        """The named trainable tensors, whole."""
        return (ParameterShard(name, self._parameters[name]) for name in names)

    def whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts themselves: they are whole."""
        return dict(parts)

    def total(self, value: Tensor | float) -> Tensor | float:
        """`value` itself: there is one rank."""
        return value

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state; none where nothing trains."""
        return moments_of(self.optimizer, self._parameters) if self.optimizer else {}

    def gathered(self) -> AbstractContextManager:
        """They always are."""
        return nullcontext()

    def close(self) -> None:
        """Nothing is held beyond the optimizer."""
        self.clear()
