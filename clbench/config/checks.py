"""What a configuration may say: refused here, in one line, is every value that cannot be meant. What a class that it names says of its own
fields is checked where that is imported (`build`).
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from clbench.config import OFFLOADS, Config, EngineConfig, keys, leaves
from clbench.config.names import suggestion
from clbench.types import NotWritten, UserMistake

ORDER = r"default|reversed|latin:\d+|random:\d+"
CADENCE = r"all|quarters|ends|every:[1-9]\d*"
PLAIN_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}"
"""What becomes a part of a path, a cell of a table or a column."""

PLUGINS = {
    **{"hydra/launcher/joblib": "sweep", "hydra/sweeper/optuna": "sweep", "hydra/launcher/ray": "ray"},
    **{"hydra/launcher/submitit_local": "slurm", "hydra/launcher/submitit_slurm": "slurm"},
}
"""What plugins of Hydra bring, with the extra of clbench that installs each."""


def check(config: Config) -> None:
    """Raises UserMistake, in one line, for the first value that cannot be meant."""
    train, stream = config.train, config.stream
    values = dict(leaves(asdict(config)))
    for name, value in values.items():
        check_finite(name, value)
    for name, facts in keys().items():
        if facts.get("among"):
            one_of(name, values[name], facts["among"])
        if isinstance(values.get(name), (int, float)):
            check_range(name, values[name], facts)
    check_names(config)
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
    if (train.steps is None) == (train.epochs is None):
        raise UserMistake(
            f"train.steps={train.steps} and train.epochs={train.epochs}: give exactly one, the other is null (conf/train)"
        )
    if not stream.tasks:
        raise UserMistake("stream.tasks is empty; name at least one task of conf/task")
    folders = {"data_dir": "that holds <dataset>/<split>.jsonl", "probe.include_path": "of your lm-eval yamls"}
    for name, what in folders.items():
        if values[name] is not None and not Path(values[name]).is_dir():
            raise UserMistake(f"{name}={values[name]!r} is not a directory; give the folder {what}")
    for name in ("results_dir", "cache_dir"):
        writable(name, values[name])


def check_range(name: str, value: float, facts: Mapping[str, Any]) -> None:
    """Raises UserMistake where a number is outside the range that `config.key` states for it."""
    least, most, below = (facts.get(bound, math.nan) for bound in ("least", "most", "below"))
    if value < least:
        raise UserMistake(f"{name}={value} is too small; the least allowed is {least}")
    if value > most or value >= below:
        raise UserMistake(
            f"{name}={value} is too large; allowed is {f'less than {below}' if value >= below else f'{most} at most'}"
        )


def check_finite(name: str, value: Any) -> None:
    """Raises UserMistake for a number that is not finite, also within lists."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            check_finite(name, inner)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserMistake(f"{name}={value} is no finite number; give one")


def check_names(config: Config) -> None:
    """Raises UserMistake for a name of the user's that could not be a part of a path, a cell of a table and a column."""
    groups = {
        **{"method": config.method, "model": config.model},
        **{f"tasks.{name}": value for name, value in config.tasks.items()},
        **{f"probe.probes.{name}": value for name, value in config.probe.probes.items()},
    }
    for group, value in groups.items():
        if not isinstance(value, dict):
            raise UserMistake(f"{group}={value!r} is no group of settings; see conf/{group.partition('.')[0]} for some")
    names = {
        "experiment": config.experiment,
        "method.name": config.method.get("name", ""),
        "model.label": config.model.get("label", ""),
        "stream.name": config.stream.name,
        **{f"stream.tasks[{number}]": name for number, name in enumerate(config.stream.tasks)},
        **{f"probe.probes.{name}": name for name in config.probe.probes},
    }
    for key, name in names.items():
        if not re.fullmatch(PLAIN_NAME, str(name)):
            raise UserMistake(
                f"{key}={name!r} is no plain name; allowed are at most 64 of A-Z a-z 0-9 _ . + -, the first a letter, digit or _"
            )


def check_engine(engine: EngineConfig) -> None:
    """Raises UserMistake where the engine cannot do what is asked of it."""
    is_local, given = engine.name == "local", f"engine={engine.name} with engine.zero_stage={engine.zero_stage}"
    if engine.zero_stage not in range(4):
        raise UserMistake(f"engine.zero_stage={engine.zero_stage} is unknown; choose one of 0, 1, 2, 3")
    if is_local and (engine.processes, engine.zero_stage) != (1, 0):
        raise UserMistake(
            f"{given}, engine.processes={engine.processes}: it is one process and shards nothing; choose engine=deepspeed"
        )
    if engine.offload != "none" and (is_local or engine.zero_stage < OFFLOADS[engine.offload]):
        raise UserMistake(
            f"{given}, engine.offload={engine.offload}: "
            "optimizer needs engine=deepspeed and engine.zero_stage 1 to 3, all needs 3"
        )
    if engine.shard_base and (is_local or engine.zero_stage < 3 or engine.processes < 2):
        raise UserMistake(
            f"{given}, engine.processes={engine.processes}, engine.shard_base=true: "
            "it needs engine=deepspeed, engine.zero_stage=3 and at least 2 processes"
        )


def check_extras(config: Config) -> None:
    """Raises UserMistake where what is asked for comes with an extra of clbench that is not installed."""
    asked = {
        "deepspeed": ("engine=deepspeed", config.engine.name == "deepspeed"),
        "wandb": (f"tracking.wandb={config.tracking.wandb}", config.tracking.wandb != "disabled"),
        "tensorboard": ("tracking.tensorboard=true", config.tracking.tensorboard),
    }
    for package, (given, is_asked) in asked.items():
        spec = find_spec(package) if is_asked else None
        # A folder of that name, such as W&B's own, is no package of it.
        if is_asked and not (spec and spec.has_location):
            raise UserMistake(f"{given} needs {package}, which is not installed; pip install 'clbench[{package}]'")


def one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raises UserMistake where `value` is not among the allowed."""
    if value not in allowed:
        raise UserMistake(f"{name}={value!r} is unknown; {suggestion(value, allowed)}")


def given(words: Sequence[str], *, among: Iterable[str]) -> dict[str, str]:
    """The key=value words of a side command, by key; raises UserMistake for any other word."""
    found = {key: value for key, _, value in (word.partition("=") for word in words)}
    for key, value in found.items():
        if key not in among or not value:
            raise UserMistake(
                f"{key}={value} is not to be given here; allowed are {', '.join(f'{one}=...' for one in among)}"
            )
    return found


def whole_number(name: str, value: str | None) -> int | None:
    """The number that was given, None where none was."""
    if value is not None and not value.isdecimal():
        raise UserMistake(f"{name}={value!r} is no whole number; give one from 0 on")
    return None if value is None else int(value)


def writable(name: str, value: str) -> None:
    """Makes the folder; raises UserMistake when it cannot be made or written to."""
    try:
        Path(value).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserMistake(
            f"{name}={value!r} cannot be made ({error.strerror}); give a folder that you may write to"
        ) from error
    if not os.access(value, os.W_OK):
        raise UserMistake(f"{name}={value!r} cannot be written to; give a folder that you may write to")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises NotWritten, in one line, where what is done inside at `path` finds no room, no permission, or something else in its place."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise NotWritten(
            f"{path} cannot be written ({why}); make room there, or name another folder: what was finished is kept"
        ) from error
