"""The engine of one process: torch autograd, one optimizer, one schedule, gradients clipped over all trainable tensors together."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from clbench.models.weights import trainable
from clbench.protocols import Engine, Trainable
from clbench.train.optimizer import moments_of, set_moments


class Local(Trainable):
    """A parameter and its gradient (zeros where it has none) themselves: edits in place reach the model and the optimizer."""

    @property
    def value(self) -> Tensor:
        return self.parameter.detach()

    @value.setter
    def value(self, value: Tensor) -> None:
        self.parameter.detach().copy_(value)

    @property
    def grad(self) -> Tensor:
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        return self.parameter.grad

    @grad.setter
    def grad(self, grad: Tensor) -> None:
        if grad is not self.parameter.grad:
            self.grad.copy_(grad)


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
        optimizer: AdamW | None,
        schedule: LRScheduler | None,
        clip: float,
        moments: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.clip = clip
        self._parameters = trainable(model)
        if optimizer is not None and moments:
            set_moments(optimizer, self._parameters, moments)

    def backward(self, loss: Tensor) -> None:
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
        for parameter in self._parameters.values():
            parameter.grad = None

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[Trainable]:
        return (Local(name, self._parameters[name]) for name in (self._parameters if names is None else names))

    def total(self, value: Tensor) -> Tensor:
        return value

    def moments(self) -> dict[str, Tensor]:
        return moments_of(self.optimizer, self._parameters) if self.optimizer else {}

    def close(self) -> None:
        self.clear()
