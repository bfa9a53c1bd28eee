"""The engine of many processes: DeepSpeed, ZeRO stage 0 to 3, with the numbers of `LocalEngine`.

Every rank computes its part of the global batch's loss and the parts add up. DeepSpeed averages gradients over ranks, so a loss is first
multiplied by their number (exact for powers of two). Micro-batches add up on each rank, and ranks are added once per step.

Who owns what is `engine_zero`'s to know; methods see only `engine_shards`.
"""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor
from torch.nn import Module, Parameter, ParameterList
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from clbench.config import MESSAGE
from clbench.models import sharding
from clbench.models.cur import CurLinear
from clbench.models.weights import trainable
from clbench.protocols import Engine, Shard
from clbench.train.engine_shards import Matrix, Slice
from clbench.train.engine_zero import STORAGES, assembled, release
from clbench.train.optimizer import AVERAGES
from clbench.train.ranks import Ranks

PATIENCE = timedelta(days=1)
"""How long a rank waits for another, which may be pretraining or loading. A rank that died is the launcher's to notice, not a timeout's."""
LINEAR = torch.nn.functional.linear
"""Torch's own; stage 3 puts one in its place, for the whole process, that keeps no gathered weights for the backward pass."""
HOOKED = "_output_capturing_hooks_installed"
"""Set by transformers when it first gives out hidden states, beside hooks that stay; without it there would be more of them each stage."""


def join() -> Ranks:
    """Makes this process a rank of the world that its environment names (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        # Saves 20 to 90 s: DeepSpeed would compile an operation here that only its inference uses.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=PATIENCE, verbose=False)
    return Ranks(rank=comm.get_rank(), size=comm.get_world_size())


def leave() -> None:
    """Ends what `join` began; torch's own function would leave DeepSpeed's groups behind."""
    comm.destroy_process_group()


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
        torch.nn.functional.linear = LINEAR
        del held


class DeepSpeedEngine(Engine):
    """Many processes. `clip` bounds the global gradient norm, 0 switches it off.

    `moments` is the state that the optimizer starts from; `offload` says what lies in the host's memory (`config_engine`).
    """

    def __init__(
        self,
        model: Module,
        *,
        optimizer: Optimizer,
        schedule: LRScheduler,
        clip: float,
        zero_stage: int,
        offload: str = "none",
        moments: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()
        self._schedule = schedule
        self._zero_stage = zero_stage
        self._parameters = trainable(model)
        assert {tensor.dtype for tensor in self._parameters.values()} == {torch.float32}, (
            "trainable tensors are float32"
        )
        sharding.stop(model)
        self._known = attributes(model)
        sizes = [tensor.numel() for tensor in self._parameters.values()]
        bucket = max(*sizes, min(sum(sizes), MESSAGE))
        config = settings(zero_stage=zero_stage, clip=clip, bucket=bucket, offload=offload)
        # Below stage 3 DeepSpeed needs to know of nothing but what trains.
        module = model if zero_stage == 3 else ParameterList(self._parameters.values())
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self._storage = STORAGES[zero_stage](self._engine)
        self._reduction: AbstractContextManager | None = None
        for name, parameter in self._parameters.items():
            if moments and f"step/{name}" in moments:
                whole = {key: moments[f"{key}/{name}"] for key in ("step", *AVERAGES)}
                self._storage.set_moments(parameter, whole)
        if zero_stage == 3:
            # Set where DeepSpeed makes slices, which those of the base may have been before.
            torch.nn.functional.linear = zero3_linear_wrap
            for layer in model.modules():
                if isinstance(layer, CurLinear):
                    deepspeed.zero.register_external_parameter(layer, layer.base.weight)

    def backward(self, loss: Tensor) -> None:
        """Adds this rank's gradient of `loss`; ranks are added when the gradients are asked for, or in `step`."""
        if self._reduction is None:
            self._reduction = self._storage.gather_later()
            self._reduction.__enter__()
        self._engine.backward(loss * self.world_size)
        if self._zero_stage == 3:
            self._engine.optimizer.parameter_offload.get_param_coordinator().reset_step()

    def step(self) -> None:
        """Clips, steps, clears."""
        self._reduce()
        self._storage.before_step(self._parameters.values())
        self._engine.step()
        self._schedule.step()
        self._storage.clear()

    def clear(self) -> None:
        """Drops the gradients."""
        self._reduce()
        self._storage.clear()

    def shards(self) -> Iterator[Shard]:
        """This rank's slices. Iterate to the end: what was assigned is then made known to the other ranks."""
        self._reduce()
        return self._slices()

    def _slices(self) -> Iterator[Shard]:
        written: set[str] = set()
        for name, parameter in self._parameters.items():
            first, last = self._storage.span(parameter)
            if last > first:
                yield Slice(name, parameter, self._storage, written.add)
        flags = torch.tensor([float(key in written) for key in ("values", "grads")], device=self._engine.device)
        values, grads = (count > 0 for count in self.total(flags).tolist())
        self._storage.publish(self._parameters.values(), values=values, grads=grads)

    def matrices(self, names: Iterable[str]) -> Iterator[Shard]:
        """The named tensors whole, on every rank; a collective per tensor that is read."""
        self._reduce()
        return (Matrix(name, self._parameters[name], self._storage) for name in names)

    def whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, on every rank, from each rank's slices."""
        wholes = {}
        for name, parameter in self._parameters.items():
            wholes[name] = assembled(parts.get(name), self._storage.span(parameter), parameter)
        return wholes

    def total(self, value: Tensor | float) -> Tensor:
        """Sum of `value` over ranks."""
        total = torch.as_tensor(value, dtype=torch.float32, device=self._engine.device).clone()
        comm.all_reduce(total)
        return total

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state, one tensor at a time."""
        own = {name: self._storage.moments(parameter) for name, parameter in self._parameters.items()}
        # A rank that owns nothing of a tensor does not know its step count.
        steps = torch.tensor([float(own[name].get("step", 0.0)) for name in own], device=self._engine.device)
        comm.all_reduce(steps, op=comm.ReduceOp.MAX)
        found: dict[str, Tensor] = {}
        for (name, parameter), step in zip(self._parameters.items(), steps.cpu(), strict=True):
            for key in AVERAGES if step > 0 else ():
                whole = assembled(own[name].get(key), self._storage.span(parameter), parameter)
                found |= {f"step/{name}": step.clone(), f"{key}/{name}": whole.cpu()}
        return found

    def gathered(self) -> AbstractContextManager:
        """A collective for every weight at stage 3, but for those that are slices between stages, too."""
        if self._zero_stage < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters([p for p in self.model.parameters() if not self._stays_sharded(p)])

    def close(self) -> None:
        """Gathers the weights that were whole, releases DeepSpeed's engine and takes back all that it attached to the model."""
        self.clear()
        whole = {}
        for parameter in self.model.parameters():
            if self._zero_stage == 3:
                release(parameter)
            if self._stays_sharded(parameter):
                continue
            if self._zero_stage == 3:
                parameter.all_gather()
            if self._zero_stage == 3 or parameter.requires_grad:
                whole[parameter] = parameter.data.clone()
        self._engine.destroy()
        detach(self.model, self._known)
        for parameter, value in whole.items():
            parameter.data = value
        parameter_offload.FWD_MODULE_STACK.clear()
        torch.nn.functional.linear = LINEAR
        del self._engine, self._storage, self._schedule
        gc.collect()
        sharding.start(self.model)

    def _stays_sharded(self, parameter: Parameter) -> bool:
        """Whether it was slices before the engine was opened."""
        return "ds_tensor" in self._known[parameter]

    def _reduce(self) -> None:
        """Completes the gradients: adds the ranks' parts."""
        if self._reduction is None:
            return
        unused = [name for name, parameter in self._parameters.items() if parameter.grad is None]
        assert not unused, f"no gradient: {unused}"
        self._reduction.__exit__(None, None, None)
        self._reduction = None
        if self._zero_stage == 0:
            self._engine.allreduce_gradients()


def attributes(model: Module) -> dict[Any, set[str]]:
    """The names in every module's and parameter's own dictionary."""
    return {part: set(vars(part)) for part in (*model.modules(), *model.parameters())}


def detach(model: Module, known: Mapping[Any, set[str]]) -> None:
    """Removes what is attached to modules and parameters beyond `known`, and the dictionaries that stage 3 put in place of theirs.

    What stays would speak for an engine that is gone: hooks of its, slices of its buffers.
    """
    for part in (*model.modules(), *model.parameters()):
        for name in vars(part).keys() - known[part] - {HOOKED}:
            del vars(part)[name]
    for module in model.modules():
        vars(module)["_parameters"] = dict(module._parameters.items())
