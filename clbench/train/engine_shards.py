"""What methods see of trainable tensors that many processes share: each rank's slices, or one tensor whole at a time.

Writes go through to where the ZeRO stage keeps the tensor (`engine_zero`); the engine makes them known to other ranks.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import Parameter

from clbench.protocols import Shard
from clbench.train.engine_zero import Storage, assembled


class Slice(Shard):
    """This rank's flat part of one trainable tensor; `report` hears of each assignment."""

    def __init__(self, name: str, parameter: Parameter, storage: Storage, report: Callable[[str], None]) -> None:
        self.name = name
        self._parameter = parameter
        self._storage = storage
        self._report = report

    @property
    def value(self) -> Tensor:
        """Flat [owned]; a copy where it lies in the host's memory and the model does not."""
        return self._storage.value(self._parameter).to(self._storage.engine.device)

    @value.setter
    def value(self, value: Tensor) -> None:
        self._report("values")
        write(value, self._storage.value(self._parameter))

    @property
    def grad(self) -> Tensor:
        """Flat [owned]; a copy where it lies in the host's memory and the model does not."""
        return self._storage.grad(self._parameter).to(self._storage.engine.device)

    @grad.setter
    def grad(self, grad: Tensor) -> None:
        self._report("grads")
        write(grad, self._storage.grad(self._parameter))

    def part(self, whole: Tensor) -> Tensor:
        """The entries of `whole` that lie where this slice lies."""
        first, last = self._storage.span(self._parameter)
        return whole.reshape(-1)[first:last]


def write(value: Tensor, place: Tensor) -> None:
    """Copies `value` to `place`, unless an edit in place has brought it there."""
    if value.data_ptr() != place.data_ptr():
        place.copy_(value)


class Matrix(Shard):
    """One trainable tensor whole, fetched when first read; what is assigned must be the same on every rank."""

    def __init__(self, name: str, parameter: Parameter, storage: Storage) -> None:
        self.name = name
        self._parameter = parameter
        self._storage = storage
        self._fetched: dict[str, Tensor] = {}

    def _whole(self, read: Callable[[Parameter], Tensor]) -> Tensor:
        if read.__name__ not in self._fetched:
            first, last = span = self._storage.span(self._parameter)
            part = read(self._parameter) if last > first else None
            self._fetched[read.__name__] = assembled(part, span, self._parameter)
        return self._fetched[read.__name__]

    @property
    def value(self) -> Tensor:
        """The tensor's own shape."""
        return self._whole(self._storage.value)

    @value.setter
    def value(self, value: Tensor) -> None:
        self._fetched["value"] = value
        self._storage.set_whole_value(self._parameter, value)

    @property
    def grad(self) -> Tensor:
        """The tensor's own shape."""
        return self._whole(self._storage.grad)

    @grad.setter
    def grad(self, grad: Tensor) -> None:
        self._fetched["grad"] = grad
        self._storage.set_whole_grad(self._parameter, grad)

    def part(self, whole: Tensor) -> Tensor:
        """All of it."""
        return whole
