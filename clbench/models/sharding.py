"""A base model that no rank holds whole: each keeps a slice of every frozen weight, from the moment it is loaded (`train.zero.born_sharded`).

While an engine is open it gathers weights where they are used. Between stages, forwards work inside `gathering`, and a layer's weights are read and
written inside `whole`. Gathering takes all ranks, so all of them make the same forwards. Ordinary weights are left as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, distributed
from torch.nn import Module, ModuleList, Parameter

from clbench.models.loss import causal_lm


class Sliced(Parameter):
    """A parameter as DeepSpeed makes it of one that it slices. Nothing here is of this class but for type checkers."""

    ds_numel: int
    ds_shape: torch.Size
    ds_tensor: Tensor
    all_gather: Callable[..., object]
    partition: Callable[..., object]


def is_sharded(parameter: Tensor) -> TypeGuard[Sliced]:
    """Whether this rank keeps a slice of it."""
    return hasattr(parameter, "ds_tensor")


def entries(parameter: Tensor) -> int:
    """How many numbers a parameter has, all ranks together."""
    return parameter.ds_numel if is_sharded(parameter) else parameter.numel()


def shape(parameter: Tensor) -> tuple[int, ...]:
    """The parameter's shape, all ranks together."""
    return tuple(parameter.ds_shape if is_sharded(parameter) else parameter.shape)


def stored(parameter: Tensor) -> Tensor:
    """What this rank keeps of a parameter: its slice, flat and padded, or all of it. Writing to it writes to the parameter, unless it is `whole`."""
    return parameter.ds_tensor if is_sharded(parameter) else parameter.detach()


@contextmanager
def whole(part: Module | Parameter, *, writing: bool = False) -> Iterator[None]:
    """A parameter, or a layer's own ones, are whole inside; with `writing` the ranks keep what they wrote, each the same.

    What an engine has gathered already stays as it is.
    """
    parameters = part.parameters(recurse=False) if isinstance(part, Module) else [part]
    slices = [parameter for parameter in parameters if is_sharded(parameter) and not parameter.numel()]
    gather(slices)
    try:
        yield
    finally:
        release(slices, writing=writing)


def copied(parameter: Parameter) -> Tensor:
    """A copy on the CPU; of slices the first rank alone gets one, the others a tensor without storage."""
    with whole(parameter):
        keeps = is_first() or not is_sharded(parameter)
        return parameter.detach().to("cpu" if keeps else "meta", copy=True)


def is_first() -> bool:
    """Whether this process is the only one or the first rank."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


@contextmanager
def gathering(model: Module) -> Iterator[None]:
    """Forwards work inside, the same on every rank, without an engine: each unit of the model is whole while it runs."""
    with ExitStack() as undo:
        for unit in units(causal_lm(model)):
            if slices := [parameter for parameter in unit.parameters() if is_sharded(parameter)]:
                undo.callback(unit.register_forward_pre_hook(lambda *_, slices=slices: gather(slices)).remove)
                undo.callback(unit.register_forward_hook(lambda *_, slices=slices: release(slices)).remove)
        yield


def units(module: Module) -> Iterator[Module]:
    """What is gathered at once: members of lists of modules, and whatever else has weights of its own."""
    for child in module.children():
        if isinstance(module, ModuleList) or list(child.parameters(recurse=False)):
            yield child
        else:
            yield from units(child)


# Tensors made for inference could not be trained on later.
@torch.inference_mode(False)
@torch.no_grad()
def gather(slices: Sequence[Sliced]) -> None:
    """Makes slices whole; the same ones on every rank."""
    if slices:
        slices[0].all_gather(slices)


@torch.inference_mode(False)
@torch.no_grad()
def release(slices: Sequence[Sliced], *, writing: bool = False) -> None:
    """Back to slices: as they were, or with `writing` of what is there now."""
    if slices:
        slices[0].partition(slices, has_been_updated=writing)
