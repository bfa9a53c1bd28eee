"""What DeepSpeed 0.19.8 does not do by itself. Each function says what and why, and has a test that fails once the library no longer needs it."""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.nn import Module, Parameter

from clbench.train.optimizer import AVERAGES


def skip_shared_memory_op() -> None:
    """On a CPU the first engine compiles, for 20 to 90 seconds, an operation that only DeepSpeed's inference uses."""
    vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None


def multiply(*, keep_weights: bool) -> None:
    """Stage 3 replaces torch.nn.functional.linear for the whole process and for good, and not at all where weights were slices before.

    Its own function keeps no gathered weight for the backward pass (`keep_weights` false); torch's does.
    """
    own = torch._C._nn.linear  # pyright: ignore[reportAttributeAccessIssue] (torch's stubs leave it out)
    torch.nn.functional.linear = own if keep_weights else zero3_linear_wrap


def attributes(model: Module) -> dict[Module | Parameter, set[str]]:
    """The names in every module's and parameter's own dictionary, for `detach`."""
    return {part: set(vars(part)) for part in (*model.modules(), *model.parameters())}


def detach(model: Module, known: Mapping[Module | Parameter, set[str]]) -> None:
    """An engine leaves its hooks' functions, slices and methods on the model, and the next one would use them: removes all that `known` lacks."""
    # What transformers sets when it first gives out hidden states stays, as the hooks stay that it speaks of.
    for part in (*model.modules(), *model.parameters()):
        for name in vars(part).keys() - known[part] - {"_output_capturing_hooks_installed"}:
            del vars(part)[name]
    for module in model.modules():
        vars(module)["_parameters"] = dict(module._parameters.items())
    parameter_offload.FWD_MODULE_STACK.clear()


def forget_offloaded(optimizer: Any) -> None:
    """With offloading, gradients at stages 1 and 2 are added to those before, dropped ones as well, until this counter says that a step begins."""
    optimizer.micro_step_id = -1


def renew_norms(optimizer: Any, parameters: Iterable[Any]) -> None:
    """With offloading, clipping at stages 1 and 2 goes by norms taken when the gradients came, before they were edited."""
    for parameter in parameters:
        if parameter._hp_mapping is not None:
            gradient = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
            optimizer.norm_for_param_grads[optimizer.get_param_id(parameter)] = gradient.norm()


def begin_moments(optimizer: Any) -> None:
    """The optimizer's state can be read and set only after a first step: makes it, zeros, with the `steps` that each group has behind it."""
    groups, is_sharded = optimizer.optimizer.param_groups, "fp32_partitioned_groups_flat" in vars(optimizer)
    flat = optimizer.fp32_partitioned_groups_flat if is_sharded else optimizer.single_partition_of_fp32_groups
    for tensor, group in zip(flat, groups, strict=True):
        averages = {key: torch.zeros_like(tensor) for key in AVERAGES}
        optimizer.optimizer.state[tensor] = {"step": torch.tensor(group["steps"], device=tensor.device)} | averages
    if not is_sharded:
        optimizer._lazy_init_hp_params_optimizer_state()
