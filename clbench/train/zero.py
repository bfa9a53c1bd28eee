"""The engine of many processes: DeepSpeed, ZeRO stages 0 to 3, with the numbers of `LocalEngine`.

Every rank computes its part of the global batch's loss, and the parts add up. DeepSpeed averages gradients over ranks, so a loss is first multiplied
by their number (exact for powers of two). Micro-batches add up on each rank, and the ranks are added once per step. Trainable tensors are float32, so
DeepSpeed's master copy of one and the copy that the model computes with hold the same numbers, and a write goes to both.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from torch import Tensor, distributed
from torch.nn import Module, Parameter, ParameterList
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from clbench.config import MESSAGE
from clbench.models.architecture import is_sharded
from clbench.models.cur import CurLinear
from clbench.models.weights import trainable
from clbench.protocols import Engine, Trainable
from clbench.train import deepspeed_patches as patches
from clbench.train.optimizer import AVERAGES, moments_of, set_moments


def settings(*, zero_stage: int, clip: float, bucket: int, offload: str) -> dict[str, Any]:
    """DeepSpeed's configuration: whatever touches a number is stated here. `bucket`: elements per message."""
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero = {
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage": zero_stage,
        "round_robin_gradients": False,
        "memory_efficient_linear": True,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        **({} if offload == "none" else {"offload_optimizer": host}),
        **({"offload_param": host} if offload == "all" else {}),
    }
    return {
        "steps_per_print": None,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


@contextmanager
def born_sharded(dtype: torch.dtype, *, offload: str) -> Iterator[None]:
    """A model of transformers that is loaded inside, in `dtype`, is slices from the start; the first rank alone reads the files. A collective."""
    config = settings(zero_stage=3, clip=0.0, bucket=MESSAGE, offload=offload)
    # transformers and PEFT look for it in a weak reference.
    held = HfDeepSpeedConfig(config | {"bf16": {"enabled": dtype == torch.bfloat16}})
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        patches.multiply(keep_weights=True)
        del held


class Whole(Trainable):
    """One trainable tensor, whole: fetched from all ranks when it is read, and written by each rank where it keeps its part."""

    def __init__(self, name: str, parameter: Parameter) -> None:
        self.name = name
        self._parameter = parameter

    @property
    def value(self) -> Tensor:
        """The parameter's values; at stage 3 a copy."""
        return safe_get_full_fp32_param(self._parameter) if is_sharded(self._parameter) else self._parameter.detach()

    @value.setter
    def value(self, value: Tensor) -> None:
        if is_sharded(self._parameter):
            part = own_part(self._parameter, value)
            safe_set_local_fp32_param(self._parameter, part)
            self._parameter.ds_tensor.copy_(part)
        else:
            self._parameter.detach().copy_(value)
            safe_set_full_fp32_param(self._parameter, value)

    @property
    def grad(self) -> Tensor:
        """The gradient; above stage 0 a copy."""
        return safe_get_full_grad(self._parameter)

    @grad.setter
    def grad(self, grad: Tensor) -> None:
        if is_sharded(self._parameter):
            safe_set_local_grad(self._parameter, own_part(self._parameter, grad))
        else:
            safe_set_full_grad(self._parameter, grad)


def own_part(parameter: Parameter, whole: Tensor) -> Tensor:
    """This rank's slice of `whole`, flat, as stage 3 cuts it: equal parts, the last one filled up with zeros.

    DeepSpeed's functions for whole tensors fail where it has to be filled up.
    """
    length = parameter.ds_tensor.numel()
    filled = F.pad(whole.flatten(), (0, length * distributed.get_world_size() - whole.numel()))
    return filled[length * distributed.get_rank() :][:length]


class DeepSpeedEngine(Engine):
    """Many processes. `clip` bounds the global gradient norm, 0 switches it off.

    `moments` is the state that the optimizer starts from; `offload` says what lies in the host's memory (`engine.offload`).
    """

    def __init__(
        self,
        model: Module,
        *,
        optimizer: AdamW,
        schedule: LRScheduler,
        clip: float,
        zero_stage: int,
        offload: str = "none",
        moments: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self._zero_stage = zero_stage
        self._is_offloaded = offload != "none"
        self._optimizer = optimizer
        self._parameters = trainable(model)
        assert {tensor.dtype for tensor in self._parameters.values()} == {torch.float32}, "trainable tensors are float32"
        self._known = patches.attributes(model)
        self._reduction = ExitStack()
        self._is_accumulating = False
        self._steps = {name: float((moments or {}).get(f"step/{name}", 0.0)) for name in self._parameters}
        groups = [[self._steps[name] for name, p in self._parameters.items() if p is group["params"][0]][0] for group in optimizer.param_groups]
        sizes = [tensor.numel() for tensor in self._parameters.values()]
        bucket = max(*sizes, min(sum(sizes), MESSAGE))
        config = settings(zero_stage=zero_stage, clip=clip, bucket=bucket, offload=offload)
        # Below stage 3 DeepSpeed needs to know of nothing but what trains.
        module = model if zero_stage == 3 else ParameterList(self._parameters.values())
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=schedule, config=config)
        if zero_stage == 3:
            patches.multiply(keep_weights=False)
            for layer in model.modules():
                if isinstance(layer, CurLinear):
                    deepspeed.zero.register_external_parameter(layer, layer.base.weight)
        if moments and zero_stage == 0:
            set_moments(optimizer, self._parameters, moments)
        elif moments:
            patches.begin_moments(self._engine.optimizer, groups)
            for name, parameter in self._parameters.items():
                for key in AVERAGES:
                    if f"{key}/{name}" in moments:
                        self._set_moment(parameter, key, moments[f"{key}/{name}"])

    def _set_moment(self, parameter: Parameter, key: str, value: Tensor) -> None:
        if self._zero_stage == 3:
            safe_set_local_optimizer_state(parameter, own_part(parameter, value), key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def backward(self, loss: Tensor) -> None:
        """Adds this rank's gradient of `loss`; ranks are added when the gradients are asked for, or in `step`."""
        if not self._is_accumulating:
            self._is_accumulating = True
            if self._zero_stage == 0:
                self._reduction.callback(self._engine.allreduce_gradients)
                self._reduction.enter_context(self._engine.no_sync())
            else:
                self._reduction.enter_context(self._engine.coalesce_grad_reduction())
        self._engine.backward(loss * self.world_size)

    def _reduce(self) -> None:
        """Completes the gradients: adds the ranks' parts."""
        if self._is_accumulating:
            unused = [name for name, parameter in self._parameters.items() if parameter.grad is None]
            assert not unused, f"no gradient: {unused}"
        self._reduction.close()
        self._is_accumulating = False

    def step(self) -> None:
        """Clips, steps, clears."""
        self._reduce()
        if self._is_offloaded and self._zero_stage < 3:
            patches.renew_norms(self._engine.optimizer, self._parameters.values())
        self._engine.step()
        self._steps = {name: count + 1 for name, count in self._steps.items()}

    def clear(self) -> None:
        """Drops the gradients."""
        self._reduce()
        self._engine.optimizer.zero_grad()
        if self._is_offloaded and self._zero_stage < 3:
            patches.forget_offloaded(self._engine.optimizer)

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[Trainable]:
        """The named trainable tensors; all without names. Each is fetched when it is read: a collective."""
        self._reduce()
        if self._zero_stage == 3:
            # What a forward has left whole would not see what is written to the slices.
            self._engine.optimizer.empty_partition_cache()
        return (Whole(name, self._parameters[name]) for name in (self._parameters if names is None else names))

    def total(self, value: Tensor | float) -> Tensor:
        """Sum of `value` over ranks."""
        total = torch.as_tensor(value, dtype=torch.float32, device=self._engine.device).clone()
        distributed.all_reduce(total)
        return total

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state, one tensor at a time."""
        if self._zero_stage == 0:
            return moments_of(self._optimizer, self._parameters)
        found: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            for key in AVERAGES if self._steps[name] else ():
                found[f"step/{name}"] = torch.tensor(self._steps[name])
                found[f"{key}/{name}"] = safe_get_full_optimizer_state(parameter, key).cpu()
        return found

    def close(self) -> None:
        """Gathers the weights that were whole, releases DeepSpeed's engine and takes back all that it attached to the model."""
        self.clear()
        parameters = list(self.model.parameters() if self._zero_stage == 3 else self._parameters.values())
        # Those of a sliced base stay slices.
        own = [parameter for parameter in parameters if "ds_tensor" not in self._known[parameter]]
        if self._zero_stage == 3:
            self._engine.optimizer.empty_partition_cache()
        with deepspeed.zero.GatheredParameters(own):
            whole = [parameter.detach().clone() for parameter in own]
        self._engine.destroy()
        patches.detach(self.model, self._known)
        for parameter, value in zip(own, whole, strict=True):
            parameter.data = value
        patches.multiply(keep_weights=True)
        del self._engine, self._optimizer
        gc.collect()
