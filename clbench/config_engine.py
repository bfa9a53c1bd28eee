"""The engine's part of the configuration: where and in which precision to train, and what of it cannot be meant.

No torch here: the command line must answer at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from clbench.types import UserMistake

DTYPES = ("float32", "bfloat16")
ENGINES = ("local", "deepspeed")
GENERATIONS = ("local", "vllm")
OFFLOADS = {"none": 0, "optimizer": 1, "all": 3}
"""What can be kept in the host's memory, and the least ZeRO stage that can: the optimizer's state, master weights and gradients; weights too."""

MESSAGE = 50_000_000
"""Most entries of one message between ranks, and of the buffer for it, unless one tensor has more."""

# DeepSpeed's keys that decide a number, what a slice is or where it lies: stated by clbench alone.
OWNED_BY_US = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("prescale_gradients", "gradient_predivide_factor", "communication_data_type", "data_types", "sparse_gradients"),
    *("fp16", "bf16", "bfloat16", "amp", "torch_autocast", "optimizer", "scheduler", "gradient_accumulation_dtype"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "sequence_parallel_size", "tensor_parallel"),
    *("managed_gradient_accumulation", "activation_checkpointing", "data_efficiency", "compression_training"),
)
OWNED_BY_US_IN_ZERO = (
    *(
        "stage",
        "round_robin_gradients",
        "memory_efficient_linear",
        "offload_param",
        "offload_optimizer",
        "cpu_offload",
        "zenflow",
    ),
    *("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "zero_quantized_weights"),
    *("zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zero_hpz_partition_size", "mics_shard_size"),
)

# Of vLLM's arguments those that change no number but for rounding and take no further processes.
VLLM_ARGUMENTS = (
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "max_model_len", "max_num_seqs", "max_num_batched_tokens"),
    *("enforce_eager", "compilation_config", "block_size", "enable_prefix_caching", "enable_chunked_prefill"),
)

# What the engine does without changing a score.
NO_IDENTITY_ENGINE = (
    *("name", "processes", "zero_stage", "threads", "deepspeed", "vllm"),
    *("offload", "activation_checkpointing", "compile", "shard_base"),
)


@dataclass
class EngineConfig:
    """Where and in which precision to train. `deepspeed` holds further keys of DeepSpeed's own configuration; `offload` is one of OFFLOADS.

    With `shard_base` no process ever holds the whole base model. `generation` says what writes answers, `vllm` holds further arguments of vLLM's.
    """

    name: str = "local"
    processes: int = 1
    zero_stage: int = 0
    dtype: str = "float32"
    device: str = "auto"
    threads: int | None = None
    offload: str = "none"
    activation_checkpointing: bool = False
    compile: bool = False
    shard_base: bool = False
    generation: str = "local"
    deepspeed: dict[str, Any] = field(default_factory=dict)
    vllm: dict[str, Any] = field(default_factory=dict)


def check_engine(engine: EngineConfig) -> None:
    """Raises UserMistake where the engine cannot do what is asked of it."""
    one_of("engine.name", engine.name, ENGINES)
    one_of("engine.dtype", engine.dtype, DTYPES)
    for key, value in (("engine.processes", engine.processes), ("engine.threads", engine.threads)):
        if value is not None and value < 1:
            raise UserMistake(f"{key}={value} is too small; the least allowed is 1")
    if engine.name == "local" and (engine.processes, engine.zero_stage, engine.deepspeed) != (1, 0, {}):
        raise UserMistake(
            f"engine=local with engine.processes={engine.processes}, engine.zero_stage={engine.zero_stage}, engine.deepspeed={engine.deepspeed}: "
            "it is one process and shards nothing; choose engine=deepspeed"
        )
    if engine.zero_stage not in range(4):
        raise UserMistake(f"engine.zero_stage={engine.zero_stage} is unknown; choose one of 0, 1, 2, 3")
    one_of("engine.offload", engine.offload, OFFLOADS)
    if engine.offload != "none" and (engine.name == "local" or engine.zero_stage < OFFLOADS[engine.offload]):
        raise UserMistake(
            f"engine.offload={engine.offload} with engine={engine.name}, engine.zero_stage={engine.zero_stage}: "
            "optimizer needs engine=deepspeed and engine.zero_stage 1 to 3, all needs 3"
        )
    if engine.compile and engine.name != "local":
        raise UserMistake(f"engine.compile=true with engine={engine.name} is not supported; choose engine=local")
    if engine.shard_base and (engine.name == "local" or engine.zero_stage < 3 or engine.processes < 2):
        raise UserMistake(
            f"engine.shard_base=true with engine={engine.name}, engine.zero_stage={engine.zero_stage}, engine.processes={engine.processes}: "
            "it needs engine=deepspeed, engine.zero_stage=3 and at least 2 processes"
        )
    one_of("engine.generation", engine.generation, GENERATIONS)
    if engine.generation == "vllm" and engine.name != "local":
        raise UserMistake(f"engine.generation=vllm with engine={engine.name} is not supported; choose engine=local")
    if engine.vllm and engine.generation != "vllm":
        raise UserMistake(
            f"engine.vllm={engine.vllm} with engine.generation={engine.generation} does nothing; choose engine.generation=vllm"
        )
    for key in engine.vllm:
        one_of("engine.vllm, of which a key", key, VLLM_ARGUMENTS)
    zero = engine.deepspeed.get("zero_optimization", {})
    owned = [key for key in engine.deepspeed if key in OWNED_BY_US]
    owned += [f"zero_optimization.{key}" for key in zero if key in OWNED_BY_US_IN_ZERO]
    if owned:
        raise UserMistake(
            f"engine.deepspeed.{owned[0]} is set by clbench, so that every engine gives the same numbers; use the keys of train and engine instead"
        )


def one_of(key: str, value: str, allowed: Iterable[str]) -> None:
    """Raises UserMistake where `value` is not among the allowed."""
    if value not in allowed:
        raise UserMistake(f"{key}={value!r} is unknown; choose one of {', '.join(allowed)}")
