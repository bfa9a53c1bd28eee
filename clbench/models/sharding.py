"""A base model that no rank holds whole: each keeps a slice of every frozen weight, which is gathered for as long as it is used.

Weights are slices from the moment they are loaded (`engine_deepspeed.born_sharded`). While an engine is open it gathers them; at all other times
the model's units do it themselves: its embedding, each decoder block, its last norm, its output embedding. A unit is whole during its forward.
Single layers that are read or written come through `whole`, `stored` and `copied`, which leave ordinary weights as they are.

A gather takes all ranks, and ranks that share out requests need not make the same forwards. So before each gather the ranks agree on a unit, the one
furthest along that any of them waits for; the others help and wait, until their own comes up. Ranks that read alike are thereby soon in step again,
and one that is done helps on until all are (`serve`). It is the gathers that are equal on every rank; forwards may differ in number and shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed
from torch.nn import Module, ModuleList, Parameter
from torch.utils.hooks import RemovableHandle

from clbench.models.loss import causal_lm

NONE = -1
"""What a rank waits for that is done."""


def is_sharded(parameter: Tensor) -> bool:
    """Whether this rank keeps a slice of it."""
    return hasattr(parameter, "ds_tensor")


def entries(parameter: Tensor) -> int:
    """How many numbers a parameter has, all ranks together."""
    return parameter.ds_numel if is_sharded(parameter) else parameter.numel()


def stored(parameter: Tensor) -> Tensor:
    """What this rank keeps of a parameter: its slice, flat and padded, or all of it. Writing to it writes to the parameter, unless it is `whole`."""
    return parameter.ds_tensor if is_sharded(parameter) else parameter.detach()


def whole(layer: Module, *, writing: bool = False) -> AbstractContextManager[None]:
    """The layer's own weights are whole inside; a collective where they are slices. With `writing` the ranks keep what they wrote, each the same."""
    return gathered(layer.parameters(recurse=False), writing=writing)


def copied(parameter: Tensor) -> Tensor:
    """A copy on the CPU; of slices the first rank alone gets one, the others a tensor without storage. A collective where they are slices."""
    if not is_sharded(parameter):
        return parameter.detach().to("cpu", copy=True)
    with gathered([parameter]):
        return parameter.detach().to("cpu" if is_first() else "meta", copy=True)


@contextmanager
def gathered(parameters: Iterable[Parameter], *, writing: bool = False) -> Iterator[None]:
    """As `whole`. What an engine has gathered already stays as it is."""
    slices = [parameter for parameter in sharded(parameters) if not parameter.numel()]
    gather(slices)
    try:
        yield
    finally:
        release(slices, writing=writing)


def is_first() -> bool:
    """Whether this process is the only one or the first rank."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def sharded(parameters: Iterable[Parameter]) -> list[Parameter]:
    """Those of which this rank keeps a slice."""
    return [parameter for parameter in parameters if is_sharded(parameter)]


def gather(parameters: Sequence[Parameter]) -> None:
    """Makes slices whole; the same ones on every rank, none of them whole already."""
    # Tensors made for inference could not be trained on later.
    with torch.inference_mode(False), torch.no_grad():
        assert not any(parameter.numel() for parameter in parameters), "gathered twice"
        if parameters:
            parameters[0].all_gather(param_list=list(parameters))


def release(parameters: Sequence[Parameter], *, writing: bool = False) -> None:
    """Back to slices: as they were, or with `writing` of what is there now."""
    with torch.inference_mode(False), torch.no_grad():
        for parameter in parameters:
            parameter.partition(has_been_updated=writing)


class LockStep:
    """The units of a model without an open engine, each gathered before its forward and released after it, in step with all ranks."""

    def __init__(self, model: Module) -> None:
        self.units = list(units(causal_lm(model)))
        self.device = next(model.parameters()).device
        self.handles: list[RemovableHandle] = []

    def start(self) -> None:
        """From now on."""
        for number, unit in enumerate(self.units):
            self.handles.append(unit.register_forward_pre_hook(lambda *_, number=number: self.take(number)))
            self.handles.append(unit.register_forward_hook(lambda *_, number=number: self.let_go(number)))

    def stop(self) -> None:
        """Until the next start."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def take(self, number: int) -> None:
        """Returns with unit `number` whole."""
        while self.turn(number) != number:
            pass

    def let_go(self, number: int) -> None:
        """Back to slices."""
        release(sharded(self.units[number].parameters()))

    def turn(self, wanted: int) -> int:
        """Gathers, with all ranks, the unit furthest along that one of them waits for, and keeps it if it is `wanted`; gives its number."""
        told = torch.tensor(wanted, device=self.device)
        distributed.all_reduce(told, op=distributed.ReduceOp.MAX)
        number = int(told)
        if number != NONE:
            gather(sharded(self.units[number].parameters()))
            if number != wanted:
                self.let_go(number)
        return number


def units(module: Module) -> Iterator[Module]:
    """What is gathered at once, in the order of a forward: members of lists of modules, and whatever else has weights of its own."""
    for child in module.children():
        if isinstance(module, ModuleList) or list(child.parameters(recurse=False)):
            yield child
        else:
            yield from units(child)


_in_step: WeakKeyDictionary[Module, LockStep] = WeakKeyDictionary()


def start(model: Module) -> None:
    """Has the units of a model gather themselves from now on; nothing where its weights are whole."""
    if sharded(model.parameters()):
        _in_step.setdefault(causal_lm(model), LockStep(model)).start()


def stop(model: Module) -> None:
    """Leaves gathering to an engine."""
    if causal_lm(model) in _in_step:
        _in_step[causal_lm(model)].stop()


def serve(model: Module) -> None:
    """Helps the other ranks with their gathers until all of them have come here; nothing where weights are whole."""
    if causal_lm(model) in _in_step:
        while _in_step[causal_lm(model)].turn(NONE) != NONE:
            pass
