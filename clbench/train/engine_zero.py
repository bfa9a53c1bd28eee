"""Where DeepSpeed's ZeRO stages keep trainable tensors, their gradients and the optimizer's moments.

At stage 0 every rank holds everything and answers for an equal slice of each tensor; at stages 1 and 2 it owns a run of all trainable
tensors laid end to end; at stage 3 a slice of each tensor, the frozen ones included. Trainable tensors are float32, so a master copy and its
working copy hold the same numbers, and every write goes to both. Not here: what methods see of it (`engine_shards`), when gradients are
complete, and steps (`engine_deepspeed`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import Parameter

from clbench.models.sharding import is_sharded
from clbench.train.optimizer import AVERAGES

Span = tuple[int, int]
"""First and last + 1 of the entries of a flattened tensor."""


class Storage(ABC):
    """Where one ZeRO stage keeps trainable tensors and their gradients. Slices are flat; writing to them is local."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer

    @abstractmethod
    def gather_later(self) -> AbstractContextManager:
        """While it lasts, gradients add up on each rank; on leaving they are reduced over ranks."""

    @abstractmethod
    def span(self, parameter: Parameter) -> Span:
        """The entries of `parameter` that this rank owns; empty where it owns none."""

    @abstractmethod
    def grad(self, parameter: Parameter) -> Tensor:
        """This rank's slice of the gradient, once it is complete."""

    @abstractmethod
    def stepped(self, parameter: Parameter) -> tuple[Tensor, int]:
        """The tensor that the optimizer itself steps with and keeps state of, and where in it this rank's slice begins."""

    def value(self, parameter: Parameter) -> Tensor:
        """This rank's slice of the values that the optimizer steps with; a view, which may lie in the host's memory."""
        first, last = self.span(parameter)
        tensor, start = self.stepped(parameter)
        return tensor.data.view(-1)[start : start + last - first]

    def before_step(self, parameters: Iterable[Parameter]) -> None:
        """Tells an optimizer in the host's memory the gradients' norms, which it took for clipping when they came, before they were edited."""
        for parameter in parameters if self.is_offloaded else ():
            first, last = self.span(parameter)
            if last > first:
                self.optimizer.norm_for_param_grads[self.optimizer.get_param_id(parameter)] = self.grad(
                    parameter
                ).norm()

    @property
    def is_offloaded(self) -> bool:
        """Whether gradients and what the optimizer steps with lie in the host's memory."""
        return self.engine.zero_offload_optimizer() is not None

    @property
    def states(self) -> Mapping[Tensor, dict[str, Tensor]]:
        """The state of torch's own optimizer, by the tensors that it steps with."""
        return self.optimizer.optimizer.state

    def moments(self, parameter: Parameter) -> dict[str, Tensor]:
        """This rank's slices of the moments, and the step count; empty where it owns none or no step was taken."""
        first, last = self.span(parameter)
        if first == last:
            return {}
        tensor, start = self.stepped(parameter)
        state = self.states.get(tensor, {})
        return {
            key: value if key == "step" else value.view(-1)[start : start + last - first]
            for key, value in state.items()
        }

    def set_moments(self, parameter: Parameter, whole: Mapping[str, Tensor]) -> None:
        """Takes this rank's slices of the moments, and the step count, which all of a group share."""
        first, last = self.span(parameter)
        if first == last:
            return
        tensor, start = self.stepped(parameter)
        state = self.states[tensor]
        if not state:
            state["step"] = whole["step"].to(tensor.device, copy=True)
            state |= {key: torch.zeros_like(tensor) for key in AVERAGES}
        for key in AVERAGES:
            state[key].view(-1)[start : start + last - first].copy_(whole[key].flatten()[first:last])

    @abstractmethod
    def clear(self) -> None:
        """Drops all gradients."""

    @abstractmethod
    def publish(self, parameters: Iterable[Parameter], *, values: bool, grads: bool) -> None:
        """Makes what ranks wrote to their slices known wherever it is used."""

    def set_whole_value(self, parameter: Parameter, whole: Tensor) -> None:
        """Writes a tensor that every rank holds."""
        first, last = self.span(parameter)
        parameter.data.copy_(whole)
        if last > first:
            self.value(parameter).copy_(whole.flatten()[first:last])

    def set_whole_grad(self, parameter: Parameter, whole: Tensor) -> None:
        """Writes a gradient that every rank holds."""
        first, last = self.span(parameter)
        if last > first:
            self.grad(parameter).copy_(whole.flatten()[first:last])


class Replicated(Storage):
    """Stage 0: everything is everywhere."""

    def gather_later(self) -> AbstractContextManager:
        """DeepSpeed's own; the reduction is asked for by `reduce`."""
        return self.engine.no_sync()

    def span(self, parameter: Parameter) -> Span:
        """Equal parts, the last one shorter."""
        return equal_part(parameter.numel())

    def grad(self, parameter: Parameter) -> Tensor:
        """A view."""
        first, last = self.span(parameter)
        return parameter.grad.view(-1)[first:last]

    def set_whole_grad(self, parameter: Parameter, whole: Tensor) -> None:
        """All of it, as every rank steps with all of it."""
        parameter.grad.copy_(whole)

    def stepped(self, parameter: Parameter) -> tuple[Tensor, int]:
        """The parameter itself."""
        return parameter, self.span(parameter)[0]

    @property
    def states(self) -> Mapping[Tensor, dict[str, Tensor]]:
        """There is no optimizer around torch's."""
        return self.optimizer.state

    def set_moments(self, parameter: Parameter, whole: Mapping[str, Tensor]) -> None:
        """All of them."""
        self.states[parameter] = {key: value.to(parameter.device, copy=True) for key, value in whole.items()}

    def clear(self) -> None:
        """In DeepSpeed's way."""
        self.engine.zero_grad()

    def publish(self, parameters: Iterable[Parameter], *, values: bool, grads: bool) -> None:
        """Every rank takes the others' slices."""
        for parameter in parameters:
            if values:
                parameter.data.copy_(assembled(self.value(parameter), self.span(parameter), parameter))
            if grads:
                parameter.grad.copy_(assembled(self.grad(parameter), self.span(parameter), parameter))


class Flat(Storage):
    """Stages 1 and 2: each rank owns a run of all trainable tensors laid end to end, so of some tensors nothing."""

    def gather_later(self) -> AbstractContextManager:
        """One reduction for all micro-batches."""
        return self.engine.coalesce_grad_reduction()

    def span(self, parameter: Parameter) -> Span:
        """What DeepSpeed's mapping says."""
        if parameter._hp_mapping is None:
            return 0, 0
        place = parameter._hp_mapping.lp_fragment_address
        return place.start, place.start + place.numel

    def grad(self, parameter: Parameter) -> Tensor:
        """A view of the reduced gradient."""
        return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)

    def stepped(self, parameter: Parameter) -> tuple[Tensor, int]:
        """The run of tensors of its group that this rank owns."""
        group = parameter._hp_mapping.param_group_index
        return self.optimizer.single_partition_of_fp32_groups[group], parameter._hp_mapping.hp_fragment_address.start

    def clear(self) -> None:
        """In place: slices hold on to the dictionary, so a new one would leave them with the old gradients."""
        for group in self.optimizer.averaged_gradients:
            self.optimizer.averaged_gradients[group] = None
            self.optimizer.all_grad_tensors[group] = None
        self.optimizer.zero_grad()
        self.optimizer.micro_step_id = -1

    def publish(self, parameters: Iterable[Parameter], *, values: bool, grads: bool) -> None:
        """Master copies to working copies; gradients are used where they lie."""
        if values:
            self.optimizer.update_lp_params()


class Sharded(Storage):
    """Stage 3: each rank owns a slice of every tensor; parameters are empty outside the forwards that use them."""

    def gather_later(self) -> AbstractContextManager:
        """One reduction for all micro-batches."""
        return self.engine.coalesce_grad_reduction()

    def span(self, parameter: Parameter) -> Span:
        """Equal parts; DeepSpeed pads the last one, which ends here where the tensor does."""
        return equal_part(parameter.ds_numel)

    def grad(self, parameter: Parameter) -> Tensor:
        """A view of the reduced gradient without its padding."""
        first, last = self.span(parameter)
        if self.is_offloaded:
            tensor, start = self.stepped(parameter)
            return tensor.grad[start : start + last - first]
        return self.optimizer.get_local_fp32_grad_for_param(parameter).detach().view(-1)[: last - first]

    def set_whole_value(self, parameter: Parameter, whole: Tensor) -> None:
        """Each rank its slice, to both copies."""
        first, last = self.span(parameter)
        self.value(parameter).copy_(whole.flatten()[first:last])
        self.publish([parameter], values=True, grads=False)

    def stepped(self, parameter: Parameter) -> tuple[Tensor, int]:
        """The slices of its group, end to end."""
        group, start, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        return self.optimizer.fp32_partitioned_groups_flat[group], start

    def clear(self) -> None:
        """As DeepSpeed does after a step: the next reduction then replaces instead of adding."""
        self.optimizer.zero_grad()

    def publish(self, parameters: Iterable[Parameter], *, values: bool, grads: bool) -> None:
        """Master copies to working copies; nothing to send."""
        for parameter in parameters if values else ():
            release(parameter)
            value = self.value(parameter)
            parameter.ds_tensor.data.view(-1)[: len(value)].copy_(value)


STORAGES = (Replicated, Flat, Flat, Sharded)


def equal_part(length: int) -> Span:
    """This rank's part of `length` entries in equal parts, the last ones shorter or empty."""
    part = -(-length // distributed.get_world_size())
    first = min(distributed.get_rank() * part, length)
    return first, min(first + part, length)


def assembled(part: Tensor | None, span: Span, like: Parameter) -> Tensor:
    """The whole tensor, of `like`'s shape, from every rank's part of it at `span`; a collective. Adding zeros is exact."""
    shape = like.ds_shape if is_sharded(like) else like.shape
    whole = torch.zeros(shape.numel(), dtype=torch.float32, device=like.device)
    if part is not None:
        whole[span[0] : span[1]] = part.reshape(-1)
    distributed.all_reduce(whole)
    return whole.view(shape)


def release(parameter: Parameter) -> None:
    """Back to slices, should the tensor be whole at the moment; what is gathered next is then up to date."""
    if parameter.ds_status.name == "AVAILABLE":
        parameter.partition()
