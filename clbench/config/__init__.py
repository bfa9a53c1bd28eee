"""The configuration's shape: typed, checked once at the edge, plain values from there on.

Hydra composes `conf/` onto these classes, which refuses unknown keys and wrong types; `checks` refuses impossible values. The groups `method`,
`model` and each entry of `tasks` and `probe.probes` are free-form: they name a class (`_target_`) whose fields are their schema (`build`).
No torch here: the command line must answer at once.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from clbench.config.names import suggestion
from clbench.config.secrets import masked
from clbench.types import UserMistake

OFFLOADS = {"none": 0, "optimizer": 1, "all": 3}
"""What can be kept in the host's memory, and the least ZeRO stage that can: the optimizer's state, master weights and gradients; weights too."""

MESSAGE = 50_000_000
"""Most entries of one message between ranks, and of the buffer for it, unless one tensor has more."""

PLACES = ("results_dir", "cache_dir", "data_dir", "include_path")
"""Keys that hold a path, wherever they stand."""
LATER = {"sources": {}, "prompt": "plain", "probe.probes.knowledge.include_path": None}
"""Keys that were added, each with the value that does what was done before: with it a run has the hash that it had."""
BLOCK_KEYS = ("order", "seed", "method.seed")
"""What a method's replicates, called blocks, differ in."""


def key(
    default: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    among: Iterable[str] = (),
    identity: bool = True,
) -> Any:
    """A key of the configuration: its range (`below` is no part of it), or all its values; without `identity` no score depends on it."""
    bounds = {"least": least, "most": most, "below": below}
    return field(default=default, metadata=bounds | {"among": tuple(among), "identity": identity})


@dataclass
class EngineConfig:
    """Where and in which precision to train. With `shard_base` no process ever holds the whole base model."""

    name: str = key("local", among=("local", "deepspeed"), identity=False)
    processes: int = key(1, least=1, identity=False)
    zero_stage: int = key(0, identity=False)
    dtype: str = key("float32", among=("float32", "bfloat16"))
    device: str = key("auto", among=("auto", "cpu", "cuda"))
    threads: int | None = key(None, least=1, most=1024, identity=False)
    offload: str = key("none", among=OFFLOADS, identity=False)
    activation_checkpointing: bool = key(False, identity=False)
    shard_base: bool = key(False, identity=False)


@dataclass
class TrainConfig:
    """How one stage is trained; equal for all methods unless a method's yaml states its own."""

    steps: int | None = key(None, least=0)
    epochs: float | None = key(None, least=0)
    batch_size: int = key(16, least=1)
    micro_batch_size: int | None = key(None, least=1)
    micro_batch_tokens: int | None = key(None, least=1, identity=False)
    max_length: int = key(512, least=8)
    cut: str = key("left", among=("left", "middle"))
    lr: float = key(1e-3, least=0)
    schedule: str = key("linear", among=("linear", "cosine", "constant"))
    warmup: float = key(0.1, least=0, most=1)
    weight_decay: float = key(0.0, least=0)
    beta1: float = key(0.9, least=0, below=1)
    beta2: float = key(0.999, least=0, below=1)
    clip: float = key(1.0, least=0)
    carry_optimizer: bool = False
    checkpoint: str = key("last", among=("last", "all"), identity=False)
    checkpoint_steps: int | None = key(None, least=1, identity=False)


@dataclass
class StreamConfig:
    """The tasks, of which only the first `limit` or the `last` so many are trained, and how many rows of each.

    `too_long` says what becomes of a row whose answer does not fit train.max_length.
    """

    name: str = ""
    tasks: list[str] = field(default_factory=list)
    limit: int | None = key(None, least=1)
    last: int | None = key(None, least=1)
    train_rows: int | None = key(None, least=1)
    test_rows: int | None = key(None, least=1)
    too_long: str = key("refuse", among=("refuse", "drop"))


@dataclass
class ProbeConfig:
    """What is measured, and when: `probes` by name; `tasks`, `limit`, `shots` (5, or {mmlu: 5}) and `include_path` (a folder with yamls of one's
    own, as lm-eval's option of that name) are read by the lm-eval probe, `text_tokens` (null: all) by that of text.

    `cadence` says of a probe after which stages it measures (`all` unless listed): all, quarters, ends, every:K. The untouched model and
    the last stage are always measured. `allow_overlap` lets a probe measure a dataset that the stream trains on; the row is flagged.
    """

    tasks: list[Any] = field(default_factory=list)
    limit: int | None = key(None, least=1)
    shots: Any = None
    include_path: str | None = key(None, identity=False)
    text_tokens: int | None = key(8192, least=64)
    probes: dict[str, Any] = field(default_factory=dict)
    cadence: dict[str, str] = field(default_factory=dict)
    allow_overlap: bool = False


@dataclass
class TrackingConfig:
    """What a person sees while it runs, with `tasks` after a stage a line about every task, too, and where its curves go besides."""

    progress: bool = key(True, identity=False)
    tasks: bool = key(False, identity=False)
    wandb: str = key("disabled", among=("disabled", "offline", "online"), identity=False)
    tensorboard: bool = key(False, identity=False)
    project: str = key("clbench", identity=False)


@dataclass
class Config:
    """One run, whole. `tasks` holds each stream task's own configuration; the command line fills it from `conf/task/`.

    `prompt`: how a question is put to the model, as it stands or in the tokenizer's own chat template (`data.chat`). `optimize`: the column of
    leaderboard.csv that a job returns to Hydra's sweeper, which looks for the best. `sources`: by module, the SHA-256 of the package of
    every class that the configuration names and that is not clbench's own, and that of the tasks in probe.include_path; the command line fills it.
    """

    method: Any = None
    model: Any = None
    stream: StreamConfig = field(default_factory=StreamConfig)
    order: str = "default"
    prompt: str = key("plain", among=("plain", "chat"))
    engine: EngineConfig = field(default_factory=EngineConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = key(0, least=0, below=2**63)
    results_dir: str = key("results", identity=False)
    data_dir: str | None = key(None, identity=False)
    cache_dir: str = key("", identity=False)
    resume: str = key("auto", among=("auto", "never", "must"), identity=False)
    experiment: str = ""
    optimize: str | None = key(None, identity=False)
    tasks: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


def groups() -> dict[str, Any]:
    """The classes of the groups that have a fixed shape, by name."""
    return {own.name: own.default_factory for own in fields(Config) if is_dataclass(own.default_factory)}


def keys() -> Mapping[str, Mapping[str, Any]]:
    """What `key` says of every key, by dotted name."""
    inner = {f"{name}.{own.name}": own.metadata for name, shape in groups().items() for own in fields(shape)}
    return {own.name: own.metadata for own in fields(Config)} | inner


def from_plain(plain: dict[str, Any]) -> Config:
    """The typed configuration from the plain values that Hydra composed (or that a frozen JSON file holds)."""
    inner = {name: (shape, plain[name]) for name, shape in groups().items()}
    for group, (shape, values) in {"": (Config, plain), **inner}.items():
        allowed = [own.name for own in fields(shape)]
        for name in sorted(values.keys() - set(allowed)):
            raise UserMistake(
                f"{f'{group}.{name}'.lstrip('.')} is no key of the configuration; {suggestion(name, allowed)}"
            )
    return Config(**plain | {name: shape(**values) for name, (shape, values) in inner.items()})


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every value that decides a run's scores, by dotted key, of a configuration as nested values.

    Left out are places on one machine and what changes no score; a path that stands elsewhere reads "<path>", a secret "***". The ZeRO stage counts
    below float32, where it changes the numbers.
    """
    values = dict(leaves(masked(config)))
    dropped = {name for name, facts in keys().items() if not facts.get("identity", True)}
    if values.get("engine.dtype", "float32") != "float32":
        dropped -= {"engine.name", "engine.zero_stage"}
    places = {name: v for name, v in values.items() if isinstance(v, str) and v and name.rpartition(".")[2] in PLACES}
    # Whole paths alone are known again elsewhere: "seq" may be a folder and a method.
    elsewhere = {place for place in places.values() if os.path.isabs(place)}
    return {
        name: "<path>" if name in places or (isinstance(value, str) and value in elsewhere) else value
        for name, value in values.items()
        if name not in dropped and (name not in LATER or value != LATER[name])
    }


def run_hash(config: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of a run's identity."""
    return _sha256(identity(config))


def variant(config: Mapping[str, Any]) -> str:
    """Eight digits of the SHA-256 of what a method's blocks have in common: its runs are one row of the leaderboard."""
    return _sha256({name: value for name, value in identity(config).items() if name not in BLOCK_KEYS})[:8]


def probe_hash(config: Mapping[str, Any]) -> str:
    """Eight digits of the SHA-256 of what the probes measure, on which items and by whose code."""
    own = {name: value for name, value in identity(config).items() if name.startswith(("probe.", "sources."))}
    return _sha256(own)[:8]


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested ones by dotted key; a list is a value."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def target_names(value: Any) -> Iterator[str]:
    """What every `_target_` within nested values names."""
    if isinstance(value, Mapping):
        yield from (str(inner) for key, inner in value.items() if key == "_target_")
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from target_names(inner)


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def run_name(config: Config) -> str:
    """The run's directory name."""
    return name_of(asdict(config))


def name_of(config: Mapping[str, Any]) -> str:
    """`<experiment>-<method>-s<seed>-<hash8>`, with the order behind the method where it is not the default one."""
    order = "" if config["order"] == "default" else f"-{config['order'].replace(':', '')}"
    return f"{config['experiment']}-{config['method']['name']}{order}-s{config['seed']}-{run_hash(config)[:8]}"


def model_label(config: Mapping[str, Any]) -> str:
    """What tables call the model: its label, with `+chat` where its chat template is used."""
    return config["model"]["label"] + ("+chat" if config.get("prompt") == "chat" else "")


def run_directory(config: Config) -> Path:
    """Where the run of this configuration is recorded."""
    return Path(config.results_dir) / "runs" / run_name(config)


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
