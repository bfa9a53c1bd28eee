"""The engine of many processes: DeepSpeed, ZeRO stages 0 to 3, with the numbers of `LocalEngine`.

Every rank computes its part of the global batch's loss, and the parts add up. DeepSpeed averages gradients over ranks, so a loss is first multiplied
by their number (exact for powers of two). Micro-batches add up on each rank, and the ranks are added once per step. Trainable tensors are float32, so
DeepSpeed's master copy of one and the copy that the model computes with hold the same numbers, and a write goes to both.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed import utils
from peft.tuners.osf import OSFLayer
from torch import Tensor, distributed
from torch.nn import Module, ParameterList
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from clbench.config import MESSAGE, Config
from clbench.models.cur import CurLinear
from clbench.models.sharding import is_sharded, stored
from clbench.models.weights import trainable
from clbench.protocols import Engine, Trainable
from clbench.train import deepspeed_patches as patches
from clbench.train.optimizer import AVERAGES, moments_of, set_moments


def deepspeed_settings(*, zero_stage: int, clip: float, bucket: int, offload: str) -> dict[str, Any]:
    """DeepSpeed's configuration: whatever touches a number is stated here. `bucket`: elements per message."""
    numbers = {"gradient_clipping": clip, "prescale_gradients": False, "gradient_predivide_factor": 1.0}
    numbers |= {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    numbers |= {precision: {"enabled": False} for precision in ("fp16", "bf16", "torch_autocast")}
    ours = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    ours |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "steps_per_print": None}
    zero = {"stage": zero_stage, "overlap_comm": False, "contiguous_gradients": True, "round_robin_gradients": False}
    zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket, "stage3_prefetch_bucket_size": bucket}
    # Weights are whole while they are used and no longer; a group's moments are one piece (`begin_moments`).
    zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "sub_group_size": 10**15}
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero |= {"offload_optimizer": host} if offload != "none" else {}
    zero |= {"offload_param": host} if offload == "all" else {}
    return numbers | ours | {"zero_optimization": zero}


@contextmanager
def born_sharded(dtype: torch.dtype, *, offload: str) -> Iterator[HfDeepSpeedConfig]:
    """A model of transformers that is loaded inside, in `dtype`, is slices from the start; the first rank alone reads the files. A collective."""
    config = deepspeed_settings(zero_stage=3, clip=0.0, bucket=MESSAGE, offload=offload)
    # transformers and PEFT look for it in a weak reference.
    held = HfDeepSpeedConfig(config | {"bf16": {"enabled": dtype == torch.bfloat16}})
    try:
        yield held
    finally:
        unset_hf_deepspeed_config()
        patches.multiply(keep_weights=True)


class Whole(Trainable):
    """One trainable tensor, whole: fetched from all ranks when it is read, and written by each rank where it keeps its part."""

    @property
    def value(self) -> Tensor:
        return utils.safe_get_full_fp32_param(self.parameter) if is_sharded(self.parameter) else stored(self.parameter)

    @value.setter
    def value(self, value: Tensor) -> None:
        part = self._write(value, utils.safe_set_full_fp32_param, utils.safe_set_local_fp32_param)
        stored(self.parameter).copy_(part)

    @property
    def grad(self) -> Tensor:
        return utils.safe_get_full_grad(self.parameter)

    @grad.setter
    def grad(self, grad: Tensor) -> None:
        self._write(grad, utils.safe_set_full_grad, utils.safe_set_local_grad)

    def set_moment(self, key: str, value: Tensor) -> None:
        self._write(value, utils.safe_set_full_optimizer_state, utils.safe_set_local_optimizer_state, key)

    def _write(self, whole: Tensor, full: Callable, local: Callable, *key: str) -> Tensor:
        """Writes by DeepSpeed's function for whole tensors or, at stage 3, by the one for slices; gives what this rank keeps."""
        if not is_sharded(self.parameter):
            full(self.parameter, whole, *key)
            return whole
        # Equal parts, the last one filled up; where one has to be, the function for whole tensors fails.
        length = stored(self.parameter).numel()
        filled = torch.nn.functional.pad(whole.flatten(), (0, length * distributed.get_world_size() - whole.numel()))
        part = filled[length * distributed.get_rank() :][:length]
        local(self.parameter, part, *key)
        return part


class DeepSpeedEngine(Engine):
    """Many processes, as `config.engine` says. `moments` is the state that the optimizer starts from."""

    def __init__(
        self, model: Module, *, optimizer: AdamW, schedule: LRScheduler, config: Config, moments: Mapping[str, Tensor]
    ) -> None:
        self.model = model
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self._stage, offload = config.engine.zero_stage, config.engine.offload
        self._needs_help = offload != "none" and self._stage < 3
        self._parameters, self._optimizer = trainable(model), optimizer
        assert {p.dtype for p in self._parameters.values()} == {torch.float32}, "trainable tensors are float32"
        self._known = patches.attributes(model)
        self._micro_batches: AbstractContextManager | None = None
        self._steps = {name: float(moments[f"step/{name}"]) for name in self._parameters if f"step/{name}" in moments}
        sizes = [parameter.numel() for parameter in self._parameters.values()]
        bucket = max(*sizes, min(sum(sizes), MESSAGE))
        # Below stage 3 DeepSpeed needs to know of nothing but what trains.
        self._engine, *_ = deepspeed.initialize(
            model=model if self._stage == 3 else ParameterList(self._parameters.values()),
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=deepspeed_settings(zero_stage=self._stage, clip=config.train.clip, bucket=bucket, offload=offload),
        )
        if self._stage == 3:
            patches.multiply(keep_weights=False)
            # Layers whose forward reads parameters of layers inside them.
            for layer in model.modules():
                inner = [layer.base.weight] if isinstance(layer, CurLinear) else []
                inner += layer.osf_svd_params.parameters() if isinstance(layer, OSFLayer) else []
                for parameter in inner:
                    deepspeed.zero.register_external_parameter(layer, parameter)
        if self._stage == 0:
            set_moments(optimizer, self._parameters, moments)
        elif moments:
            patches.begin_moments(self._engine.optimizer)
            for tensor in self.tensors(self._steps):
                for key in AVERAGES:
                    tensor.set_moment(key, moments[f"{key}/{tensor.name}"])

    def backward(self, loss: Tensor) -> None:
        """Adds this rank's gradient of `loss`; ranks are added when the gradients are asked for, or in `step`."""
        if self._micro_batches is None:
            micro_batches = self._engine.coalesce_grad_reduction() if self._stage else self._engine.no_sync()
            micro_batches.__enter__()
            self._micro_batches = micro_batches
        self._engine.backward(loss * self.world_size)

    def _reduce(self) -> None:
        """Completes the gradients: adds the ranks' parts."""
        if self._micro_batches is None:
            return
        unused = [name for name, parameter in self._parameters.items() if parameter.grad is None]
        assert not unused, f"no gradient: {unused}"
        self._micro_batches.__exit__(None, None, None)
        self._micro_batches = None
        if self._stage == 0:
            self._engine.allreduce_gradients()

    def step(self) -> None:
        """Clips, steps, clears."""
        self._reduce()
        if self._needs_help:
            patches.renew_norms(self._engine.optimizer, self._parameters.values())
        self._engine.step()
        self._steps = {name: self._steps.get(name, 0.0) + 1 for name in self._parameters}

    def clear(self) -> None:
        """Drops the gradients."""
        self._reduce()
        self._engine.optimizer.zero_grad()
        if self._needs_help:
            patches.forget_offloaded(self._engine.optimizer)

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[Whole]:
        """The named trainable tensors; all without names. Each is fetched when it is read, by all ranks."""
        self._reduce()
        if self._stage == 3:
            # What a forward has left whole would not see what is written to the slices.
            self._engine.optimizer.empty_partition_cache()
        return (Whole(name, self._parameters[name]) for name in (self._parameters if names is None else names))

    def total(self, value: Tensor) -> Tensor:
        total = torch.as_tensor(value, dtype=torch.float32, device=self._engine.device).clone()
        distributed.all_reduce(total)
        return total

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state, fetched one tensor at a time."""
        if self._stage == 0:
            return moments_of(self._optimizer, self._parameters)
        found = {f"step/{name}": torch.tensor(count) for name, count in self._steps.items()}
        for name in self._steps:
            for key in AVERAGES:
                found[f"{key}/{name}"] = utils.safe_get_full_optimizer_state(self._parameters[name], key).cpu()
        return found

    def close(self) -> None:
        """Gathers the weights that were whole, releases DeepSpeed's engine and takes back all that it attached to the model."""
        self.clear()
        # Those of a sliced base stay slices.
        parameters = self.model.parameters() if self._stage == 3 else self._parameters.values()
        own = [parameter for parameter in parameters if "ds_tensor" not in self._known[parameter]]
        self._engine.empty_partition_cache()
        with deepspeed.zero.GatheredParameters(own):
            whole = [parameter.detach().clone() for parameter in own]
        self._engine.destroy()
        patches.detach(self.model, self._known)
        patches.multiply(keep_weights=True)
        for parameter, value in zip(own, whole, strict=True):
            parameter.data = value
        del self._engine, self._optimizer
        gc.collect()
