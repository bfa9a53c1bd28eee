"""The configuration's shape: typed, checked once at the edge, plain values from there on.

Hydra composes `conf/` onto these classes, which refuses unknown keys and wrong types; `check` refuses impossible values. The groups `method`,
`model` and each entry of `tasks` and `probe.probes` are free-form: they name a class (`_target_`) whose fields are their schema.
No torch here: the command line must answer at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from clbench.types import UserMistake

DTYPES = ("float32", "bfloat16")
ENGINES = ("local", "deepspeed")
OFFLOADS = {"none": 0, "optimizer": 1, "all": 3}
"""What can be kept in the host's memory, and the least ZeRO stage that can: the optimizer's state, master weights and gradients; weights too."""

MESSAGE = 50_000_000
"""Most entries of one message between ranks, and of the buffer for it, unless one tensor has more."""

# What the engine does without changing a score.
NO_IDENTITY_ENGINE = (
    *("name", "processes", "zero_stage", "threads"),
    *("offload", "activation_checkpointing", "shard_base"),
)
RESUME = ("auto", "never", "must")
SCHEDULES = ("linear", "cosine", "constant")
ORDER = r"default|reversed|latin:\d+|random:\d+"
CADENCE = r"all|quarters|ends|every:[1-9]\d*"

# What a run's scores do not depend on, or what names a place on one machine: no part of a run's identity.
NO_IDENTITY = ("results_dir", "cache_dir", "data_dir", "resume", "tracking")
NO_IDENTITY_TRAIN = ("micro_batch_tokens", "checkpoint_steps")
PLACES = ("results_dir", "cache_dir", "data_dir")
SEEDS = ("seed", "method.seed")
"""What a method's replicates differ in."""


@dataclass
class EngineConfig:
    """Where and in which precision to train. `offload` is one of OFFLOADS.

    With `shard_base` no process ever holds the whole base model.
    """

    name: str = "local"
    processes: int = 1
    zero_stage: int = 0
    dtype: str = "float32"
    device: str = "auto"
    threads: int | None = None
    offload: str = "none"
    activation_checkpointing: bool = False
    shard_base: bool = False


@dataclass
class TrainConfig:
    """How one stage is trained; equal for all methods unless a method's yaml states its own."""

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    micro_batch_tokens: int | None = None
    max_length: int = 512
    lr: float = 1e-3
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0
    carry_optimizer: bool = False
    checkpoint_steps: int | None = None


@dataclass
class StreamConfig:
    """Which tasks, how many of them and of their rows."""

    name: str = ""
    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    train_rows: int | None = None
    test_rows: int | None = None


@dataclass
class ProbeConfig:
    """What is measured, and when: `probes` by name; `tasks` and `limit` are read by the lm-eval probe.

    `cadence` says of a probe after which stages it measures (`all` unless listed): all, quarters, ends, every:K. The untouched model and
    the last stage are always measured. `allow_overlap` lets a probe measure a dataset that the stream trains on; the row is flagged.
    """

    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    probes: dict[str, Any] = field(default_factory=dict)
    cadence: dict[str, str] = field(default_factory=dict)
    allow_overlap: bool = False


@dataclass
class TrackingConfig:
    """What a person sees while it runs."""

    progress: bool = True
    wandb: str = "disabled"
    project: str = "clbench"


@dataclass
class Config:
    """One run, whole. `tasks` holds each stream task's own configuration; the command line fills it from `conf/task/`."""

    method: Any = None
    model: Any = None
    stream: StreamConfig = field(default_factory=StreamConfig)
    order: str = "default"
    engine: EngineConfig = field(default_factory=EngineConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = 0
    results_dir: str = "results"
    data_dir: str | None = None
    cache_dir: str = ""
    resume: str = "auto"
    experiment: str = ""
    tasks: dict[str, Any] = field(default_factory=dict)


GROUPS = {
    "stream": StreamConfig,
    "engine": EngineConfig,
    "probe": ProbeConfig,
    "train": TrainConfig,
    "tracking": TrackingConfig,
}


def from_plain(plain: dict[str, Any]) -> Config:
    """The typed configuration from the plain values that Hydra composed (or that a frozen JSON file holds)."""
    for prefix, shape, values in (
        ("", Config, plain),
        *((f"{key}.", shape, plain[key]) for key, shape in GROUPS.items()),
    ):
        unknown = sorted(values.keys() - {field.name for field in fields(shape)})
        if unknown:
            allowed = ", ".join(field.name for field in fields(shape))
            raise UserMistake(f"{prefix}{unknown[0]} is no key of the configuration; allowed there: {allowed}")
    return Config(**{**plain, **{key: shape(**plain[key]) for key, shape in GROUPS.items()}})


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every value that decides a run's scores, by dotted key, of a configuration as nested values.

    Left out are places on one machine and what changes no score; a path that stands inside another value reads "<path>". The ZeRO stage counts
    below float32, where it changes the numbers.
    """
    dropped = {f"engine.{key}" for key in NO_IDENTITY_ENGINE} | {f"train.{key}" for key in NO_IDENTITY_TRAIN}
    leaves = dict(_leaves(config))
    if leaves.get("engine.dtype", "float32") != "float32":
        dropped -= {"engine.name", "engine.zero_stage"}
    places = {leaves.get(key) for key in PLACES} - {None, ""}
    return {
        key: "<path>" if isinstance(value, str) and value in places else value
        for key, value in leaves.items()
        if key not in dropped and key.partition(".")[0] not in NO_IDENTITY
    }


def run_hash(config: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of a run's identity."""
    return _sha256(identity(config))


def variant(config: Mapping[str, Any]) -> str:
    """Eight digits of the SHA-256 of what a method's seeds have in common: its runs are one row of the leaderboard."""
    return _sha256({key: value for key, value in identity(config).items() if key not in SEEDS})[:8]


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def run_name(config: Config) -> str:
    """The run's directory name: `<experiment>-<method>-s<seed>-<hash8>`."""
    return f"{config.experiment}-{config.method['name']}-s{config.seed}-{run_hash(asdict(config))[:8]}"


def run_directory(config: Config) -> Path:
    """Where the run of this configuration is recorded."""
    return Path(config.results_dir) / "runs" / run_name(config)


def check(config: Config) -> None:
    """Raises UserMistake, in one line, for the first value that cannot be meant."""
    train, stream = config.train, config.stream
    if not re.fullmatch(ORDER, config.order):
        raise UserMistake(
            f"order={config.order!r} is unknown; choose one of default, reversed, latin:K (rotated by K places), random:SEED"
        )
    check_engine(config.engine)
    for name, cadence in config.probe.cadence.items():
        if name not in config.probe.probes or not re.fullmatch(CADENCE, str(cadence)):
            raise UserMistake(
                f"probe.cadence.{name}={cadence!r}: name a probe ({', '.join(config.probe.probes)}) and give all, quarters, ends or every:K"
            )
    one_of("resume", config.resume, RESUME)
    one_of("train.schedule", train.schedule, SCHEDULES)
    if (train.steps is None) == (train.epochs is None):
        raise UserMistake(
            f"train.steps={train.steps} and train.epochs={train.epochs}: give exactly one, the other is null (conf/train)"
        )
    for key, value, least in (
        ("train.steps", train.steps, 0),
        ("train.epochs", train.epochs, 0),
        ("train.batch_size", train.batch_size, 1),
        ("train.micro_batch_size", train.micro_batch_size, 1),
        ("train.micro_batch_tokens", train.micro_batch_tokens, 1),
        ("train.max_length", train.max_length, 8),
        ("train.lr", train.lr, 0),
        ("train.warmup", train.warmup, 0),
        ("train.weight_decay", train.weight_decay, 0),
        ("train.clip", train.clip, 0),
        ("train.checkpoint_steps", train.checkpoint_steps, 1),
        ("stream.limit", stream.limit, 1),
        ("stream.train_rows", stream.train_rows, 1),
        ("stream.test_rows", stream.test_rows, 1),
        ("probe.limit", config.probe.limit, 1),
        ("seed", config.seed, 0),
    ):
        if value is not None and value < least:
            raise UserMistake(f"{key}={value} is too small; the least allowed is {least}")
    if not stream.tasks:
        raise UserMistake("stream.tasks is empty; name at least one task of conf/task")
    if config.data_dir is not None and not Path(config.data_dir).is_dir():
        raise UserMistake(
            f"data_dir={config.data_dir!r} is not a directory; give the folder that holds <dataset>/<split>.jsonl"
        )
    for key, value in (("results_dir", config.results_dir), ("cache_dir", config.cache_dir)):
        writable(key, value)


def check_engine(engine: EngineConfig) -> None:
    """Raises UserMistake where the engine cannot do what is asked of it."""
    one_of("engine.name", engine.name, ENGINES)
    one_of("engine.dtype", engine.dtype, DTYPES)
    for key, value in (("engine.processes", engine.processes), ("engine.threads", engine.threads)):
        if value is not None and value < 1:
            raise UserMistake(f"{key}={value} is too small; the least allowed is 1")
    if engine.name == "local" and (engine.processes, engine.zero_stage) != (1, 0):
        raise UserMistake(
            f"engine=local with engine.processes={engine.processes}, engine.zero_stage={engine.zero_stage}: "
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
    if engine.shard_base and (engine.name == "local" or engine.zero_stage < 3 or engine.processes < 2):
        raise UserMistake(
            f"engine.shard_base=true with engine={engine.name}, engine.zero_stage={engine.zero_stage}, engine.processes={engine.processes}: "
            "it needs engine=deepspeed, engine.zero_stage=3 and at least 2 processes"
        )


def one_of(key: str, value: str, allowed: Iterable[str]) -> None:
    """Raises UserMistake where `value` is not among the allowed."""
    if value not in allowed:
        raise UserMistake(f"{key}={value!r} is unknown; choose one of {', '.join(allowed)}")


def is_due(cadence: str, stage: int, last: int) -> bool:
    """Whether a probe of this cadence measures after `stage` of `last`: always the untouched model and the last stage.

    >>> [stage for stage in range(17) if is_due("quarters", stage, 16)]
    [0, 4, 8, 12, 16]
    """
    if stage in (0, last) or cadence == "all":
        return True
    kind, _, number = cadence.partition(":")
    if kind == "quarters":
        return stage in {round(last * quarter / 4) for quarter in (1, 2, 3)}
    return kind == "every" and stage % int(number) == 0


def writable(key: str, value: str) -> None:
    """Makes the folder; raises UserMistake when it cannot be made or written to."""
    try:
        Path(value).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserMistake(
            f"{key}={value!r} cannot be made ({error.strerror}); give a folder that you may write to"
        ) from error
    if not os.access(value, os.W_OK):
        raise UserMistake(f"{key}={value!r} cannot be written to; give a folder that you may write to")
