"""From the command line to a typed configuration: Hydra composes `conf/`, and what a yaml leaves to others is filled in.

With `cli`, which starts what is composed here, the only place that sees a DictConfig.
"""

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from clbench.config import Config, ProbeConfig, from_plain, target_names
from clbench.config.checks import PLUGINS, check, writing
from clbench.config.names import suggestion
from clbench.config.secrets import masked
from clbench.types import UserMistake

_HERE = Path(__file__).resolve().parents[1]
OURS = ("clbench", "baselines", "tasks", "hydra")
"""Packages whose code the commit and the version in a manifest name."""
OF_WORLD = "model.world_seed"
"""What stands in the yaml of whatever asks about the embedded world."""
NO_NAME = r"(?i)\s*(null|true|false|[-+]?(inf|nan|(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[-+]?\d+)?))\s*"
"""What Hydra reads as a value that is no text."""
MISTAKES = (UserMistake, HydraException, OmegaConfBaseException, YAMLError)
"""What the user got wrong, by whom it is found."""
ADVICE = ("object_type", "reference_type", "Config search path", "Set the env")
CONF_DIR = next(path for path in (_HERE.parent / "conf", _HERE / "conf") if (path / "config.yaml").is_file())


@dataclass
class Composed(Config):
    """What Hydra composes: a run's configuration and values chosen per method, of which `resolve` takes those of the run's method."""

    settings: dict[str, Any] = field(default_factory=dict)


def register_schema() -> None:
    """Tells Hydra the configuration's shape, which `conf/config.yaml` names first."""
    ConfigStore.instance().store(name="schema", node=Composed)


def compose(overrides: Sequence[str], *, config_dir: Path | None = None) -> Config:
    """The checked configuration that `python -m clbench --config-dir <config_dir> <overrides>` would run; for tools and tests in this process."""
    with _composed(overrides, config_dir=config_dir) as composed:
        config = resolve(composed)
    check(config)
    return config


def with_probes(config: Config, overrides: Sequence[str], *, config_dir: Path | None = None) -> tuple[str, Config]:
    """`config` with the probes that `overrides` (probe=..., data_dir=...) name in place of its own, at every stage, and the name of their yaml."""
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    if wrong := [key for key in keys if key != "data_dir" and key.partition(".")[0] != "probe"]:
        raise UserMistake(
            f"{wrong[0]} is not to be given for an examination; allowed are probe, probe.KEY and data_dir"
        )
    if "probe" not in keys:
        raise UserMistake("name the probes to examine with, probe=NAME (conf/probe, or a yaml in --config-dir)")
    with _composed(overrides, config_dir=config_dir) as composed:
        choices = HydraConfig.get().runtime.choices
        data_dir = composed.data_dir if "data_dir" in keys else config.data_dir
        probes = OmegaConf.to_container(composed.probe, resolve=False)
        tree = OmegaConf.create(asdict(config) | {"tasks": {}, "probe": probes, "data_dir": data_dir})
        _check_world(tree)
        probe: Any = OmegaConf.to_container(tree.probe, resolve=True, throw_on_missing=True)
    group = ProbeConfig(**probe | {"cadence": {}})
    found = replace(config, probe=group, data_dir=data_dir, sources=_sources({"probe": probe}))
    check(found)
    return choices["probe"], found


@contextmanager
def _composed(overrides: Sequence[str], *, config_dir: Path | None) -> Iterator[DictConfig]:
    """What Hydra composes of conf/, and of the user's `config_dir`, with its own settings out of the way."""
    register_schema()
    if config_dir is not None and not config_dir.is_dir():
        raise UserMistake(f"--config-dir {config_dir} is no folder; give one that holds yamls as conf/ does")
    searched = [f"hydra.searchpath=['file://{config_dir.resolve()}']"] if config_dir else []
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        composed = hydra.compose("config", overrides=[*searched, *with_own_model(overrides)], return_hydra_config=True)
        HydraConfig.instance().set_config(composed)
        with open_dict(composed):
            del composed["hydra"]
        yield composed


def check_groups(arguments: Sequence[str]) -> None:
    """Raises UserMistake where a group is given what can be the name of none of its options, for which Hydra has a traceback."""
    for argument in arguments:
        group, _, options = argument.lstrip("+").partition("=")
        if (CONF_DIR / group).is_dir() and any(re.fullmatch(NO_NAME, one) for one in options.split(",")):
            raise UserMistake(f"{argument} names no option of {group}; give the name of a yaml in conf/{group}")


def mask_typed(folder: Path) -> None:
    """Takes the secrets out of what Hydra wrote of the command line: a sweep's multirun.yaml in its `folder`, and what a job asked for beside it."""
    job = HydraConfig.get() if HydraConfig.initialized() else None
    own = Path(job.runtime.output_dir, job.output_subdir).glob("*.yaml") if job and job.output_subdir else ()
    for path in (folder / "multirun.yaml", *own):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if masked(text) != text:
            with writing(path):
                path.write_text(masked(text), encoding="utf-8")


def with_own_model(arguments: Sequence[str]) -> list[str]:
    """The command line, with model=own where it names a model (model.name=...) and no yaml that describes one; see `check_groups`."""
    check_groups(arguments)
    given = [argument.lstrip("+").partition("=") for argument in arguments]
    keys = [key for key, _, _ in given]
    # A search takes any model; other experiments name theirs.
    experiments = [name for key, _, names in given if key == "experiment" for name in names.strip("[]").split(",")]
    if "model.name" not in keys or "model" in keys or any(not name.startswith("tune/") for name in experiments):
        return list(arguments)
    place = keys.index("model.name")
    return [*arguments[:place], "model=own", *arguments[place:]]


def resolve(composed: DictConfig) -> Config:
    """The typed configuration: the method's settings and the stream's tasks filled in, interpolations resolved."""
    choices, overridden = HydraConfig.get().runtime.choices, _overridden()
    for group, value in composed.items():
        # Hydra has merged a list of options into one.
        if isinstance(value, DictConfig) and group in overridden and group not in choices:
            raise UserMistake(
                f"{group} is not to be given so; name one option of conf/{group}, or with -m several runs"
            )
    with open_dict(composed):
        if composed.model.get("label") is None:
            name = Path(str(composed.model.name)).name
            composed.model.label = re.sub(r"[^A-Za-z0-9_.+-]+|^[^A-Za-z0-9_]+", "_", name)[-64:]
        if settings := composed.pop("settings"):
            _put_in(composed, settings, name=choices["settings"])
        changed: Any = OmegaConf.to_container(composed.tasks, resolve=False)
        composed.tasks = _tasks(composed.stream.tasks)
        for name in changed:
            if name not in composed.tasks:
                raise UserMistake(f"tasks.{name} is no task of the stream; {suggestion(name, composed.tasks)}")
        composed.tasks.merge_with(changed)
        _check_world(composed)
        if not composed.experiment:
            composed.experiment = (choices.get("experiment") or composed.stream.name).replace("/", "-")
        if "method._target_" in overridden and "method.name" not in overridden:
            raise UserMistake("method._target_ was given on the command line: give its label too, method.name=NAME")
    plain: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    return from_plain(plain | {"sources": _sources(plain)})


def _sources(plain: Any) -> dict[str, str]:
    """By module, the SHA-256 of the code of every class that a `_target_` names and that is not our own; what is nowhere is refused later.

    Also, as "probe.tasks", that of the tasks in the folder `probe.include_path`.
    """
    modules = {target.rpartition(".")[0] for target in target_names(plain)}
    files = {module: file_of(module, sys.path) for module in sorted(modules) if module.partition(".")[0] not in OURS}
    found = {module: _hash_of(_code(module, file)) for module, file in files.items() if file}
    if folder := plain["probe"]["include_path"]:
        found["probe.tasks"] = _hash_of(path for path in Path(folder).rglob("*") if path.suffix in (".yaml", ".py"))
    return found


def _code(module: str, file: Path) -> Iterable[Path]:
    """All of the package that a module is in, as it may use any of it; of a module in none its own file."""
    depth = module.count(".") - (file.name != "__init__.py")
    return filter(Path.is_file, file.parents[depth].rglob("*.py")) if depth >= 0 else [file]


def _hash_of(paths: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()


def file_of(module: str, folders: Iterable[str | Path]) -> Path | None:
    """Where in `folders` a module's code lies; found without importing the packages that it is in, which may fail, or take long."""
    path = module.replace(".", "/")
    places = (Path(folder, f"{path}{end}") for folder in folders for end in ("/__init__.py", ".py"))
    return next(filter(Path.is_file, places), None)


def _check_world(composed: DictConfig) -> None:
    """Raises UserMistake where what is asked about the embedded world would be asked of a model that was never told of it."""
    if "world_seed" in composed.model:
        return
    groups = {"stream": composed.tasks, "probe": composed.probe, "method": composed.method}
    wrong = [group for group, config in groups.items() if OF_WORLD in OmegaConf.to_yaml(config)]
    if wrong:
        options = GlobalHydra.instance().config_loader().get_group_options
        suited = {group: [name for name in options(group) if not _is_of_world(f"{group}/{name}")] for group in wrong}
        if "method" in wrong and "texts" in composed.method:
            suited["+texts"] = options("texts")  # merged into the method's own
        asked = " and ".join(f"{group}={HydraConfig.get().runtime.choices[group]}" for group in wrong)
        choose = "; ".join(f"{group}={', '.join(names)}" for group, names in suited.items())
        raise UserMistake(
            f"model {composed.model.label} was not told of the invented world behind {asked}; choose {choose}"
        )


def _is_of_world(option: str) -> bool:
    """Whether the yaml of an option, one that it inherits, or one of a stream's tasks asks about the embedded world. Composing all takes long."""
    folders = [Path(source.path) for source in HydraConfig.get().runtime.config_sources if source.schema == "file"]
    found = next(filter(Path.is_file, (folder / f"{option}.yaml" for folder in folders)), None)
    if found is None:
        return False
    own: Any = OmegaConf.load(found)
    group = option.partition("/")[0]
    used = [f"{group}/{name}" for name in own.get("defaults", ()) if isinstance(name, str)]
    used += [f"task/{name}" for name in own.get("tasks", ()) if group == "stream"]
    return OF_WORLD in OmegaConf.to_yaml(own) or any(map(_is_of_world, used))


def _put_in(composed: DictConfig, settings: DictConfig, *, name: str) -> None:
    """Merges what conf/settings/`name`.yaml says of the method; what the command line gives stays as given."""
    method = composed.method.name
    if method not in settings and "default" not in settings:
        raise UserMistake(
            f"conf/settings/{name}.yaml has no settings for method={method}; it has {', '.join(settings)}: "
            "add some, or give settings=none and the values themselves (train.lr=...)"
        )
    given = {key: OmegaConf.select(composed, key) for key in _overridden() if "." in key}
    composed.merge_with(settings.get(method, settings.get("default")))
    for key, value in given.items():
        OmegaConf.update(composed, key, value)


def _tasks(names: Sequence[str]) -> DictConfig:
    """`conf/task/<name>.yaml` of every name, wherever Hydra's search path finds it."""
    loader = GlobalHydra.instance().config_loader()
    # A searchpath that an override gave, as `_composed` does, holds for what is composed with it alone.
    searched = [f"hydra.searchpath={[*HydraConfig.get().searchpath]}"]
    known = loader.get_group_options("task", overrides=searched)
    for number, name in enumerate(names):
        if name not in known or name in names[:number]:
            wrong = "which has no yaml in conf/task" if name not in known else "more than once"
            raise UserMistake(f"stream.tasks names {name!r}, {wrong}; {suggestion(name, sorted(known))}")
    together = [*searched, *(f"+task@{name}={name}" for name in names)]
    loaded = loader.load_configuration(None, overrides=together, run_mode=RunMode.RUN)
    return OmegaConf.create({name: OmegaConf.to_container(loaded[name], resolve=False) for name in names})


def _overridden() -> set[str]:
    """The keys that the command line gives a value; those that it takes out (~key) have none."""
    given = [override.lstrip("+").split("=", 1)[0] for override in HydraConfig.get().overrides.task]
    return {key for key in given if not key.startswith("~")}


def one_line(error: Exception) -> str:
    """What went wrong, in one line without secrets."""
    return masked(" ".join(_message(error).split()))


def _message(error: Exception) -> str:
    """What went wrong, without Hydra's advice on debugging. A UserMistake inside a constructor speaks for itself."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for inner in chain:
        if isinstance(inner, UserMistake):
            return str(inner)
        if isinstance(inner, (ConfigKeyError, ConfigAttributeError)) and inner.parent_node is not None:
            allowed = sorted(str(key) for key in inner.parent_node if key != "experiment")
            return f"{inner.full_key} is no key of the configuration; {suggestion(str(inner.key), allowed)}"
    if isinstance(error, MissingConfigException) and (extra := PLUGINS.get(f"{error.missing_cfg_file}")):
        return f"{error.missing_cfg_file} comes with a plugin that is not installed; pip install 'clbench[{extra}]'"
    if isinstance(error, MissingConfigException) and error.options:
        name = f"{error.missing_cfg_file}".rpartition("/")[2]
        return f"{error.missing_cfg_file!r} is unknown; {suggestion(name, error.options)} (conf/)"
    cause = error.__cause__
    text = str(error) if cause is None or str(error) in str(cause) else f"{error}: {cause}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith(ADVICE))
