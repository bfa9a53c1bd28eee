"""The objects that a configuration names: tasks, probes, method, stream, model."""

import copy
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from hydra.utils import instantiate
from torch.nn import Module

from clbench.config import Config
from clbench.data.encoder import Encoder
from clbench.models.limits import check_length, check_read
from clbench.models.sharding import is_sharded
from clbench.protocols import Method, Probe, Stream, Task
from clbench.stream import build_stream
from clbench.types import UserMistake

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run is made of besides its model: `source` makes that (`load_model`)."""

    source: Any
    method: Method
    encoder: Encoder
    stream: Stream
    probes: tuple[Probe, ...]


def set_up_torch(config: Config) -> None:
    """Threads, and warnings of libraries that say nothing a user can act on."""
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    if not torch.cuda.is_available():
        # transformers asks deepspeed for its accelerator, which warns when it has to find out for itself.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch.distributed")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def build(config: Config) -> Parts:
    """Reads the rows and the tokenizer; no model is loaded."""
    tasks, probes = make_tasks(config), make_probes(config)
    # What is wrong with rows is said at once: the tokenizer of a model that is pretrained here is there when that is done.
    for task in tasks.values():
        for split in ("train", "test"):
            task.examples(split)
    source = instantiate(config.model, _convert_="all")
    tokenizer = source.load_tokenizer(Path(config.cache_dir))
    train, positions = config.train, source.positions(Path(config.cache_dir))
    check_length(train.max_length, positions=positions)
    encoder = Encoder(tokenizer, max_length=train.max_length, cut=train.cut, device=_device_of(config))
    stream = build_stream(config.stream, order=config.order, tasks=tasks, encoder=encoder)
    for probe in probes:
        check_read(probe.longest(encoder), positions=positions)
    return Parts(source=source, method=make_method(config), encoder=encoder, stream=stream, probes=probes)


def load_model(config: Config, source: Any) -> Module:
    """The untouched model on its device; with engine.shard_base each rank holds a slice of it, and all ranks load it together."""
    device, dtype = _device_of(config), DTYPES[config.engine.dtype]
    if not config.engine.shard_base:
        model, _ = source.load(Path(config.cache_dir))
        return model.to(device=device, dtype=dtype)
    from clbench.train.zero import born_sharded

    with born_sharded(dtype, offload=config.engine.offload):
        model, _ = source.load(Path(config.cache_dir), dtype=dtype)
        return model.to(device=device, dtype=dtype)


def check_method(config: Config, model: Module) -> None:
    """Raises UserMistake where the method's layers are not to be had on `model`, before that is examined: tries on one without storage."""
    with torch.device("meta"):
        make_method(config).wrap(type(model)(copy.deepcopy(model.config)))


def wrap(config: Config, method: Method, model: Module) -> Module:
    """The method's model; raises UserMistake where a method trains what engine.shard_base keeps in slices."""
    wrapped = method.wrap(model)
    if any(is_sharded(parameter) and parameter.requires_grad for parameter in wrapped.parameters()):
        raise UserMistake(
            f"method={config.method['name']} trains the base model, which engine.shard_base=true keeps frozen; "
            "choose a method with adapters, or engine.shard_base=false"
        )
    return wrapped.eval()


def _device_of(config: Config) -> torch.device:
    has_gpu = torch.cuda.is_available()
    return torch.device(("cuda" if has_gpu else "cpu") if config.engine.device == "auto" else config.engine.device)


def make_tasks(config: Config) -> dict[str, Task]:
    """The stream's tasks by name, in the order in which the stream lists them."""
    return {name: instantiate(task, _convert_="all") for name, task in config.tasks.items()}


def make_probes(config: Config) -> tuple[Probe, ...]:
    """The probes, each with its name."""
    return tuple(instantiate(probe, name=name, _convert_="all") for name, probe in config.probe.probes.items())


def make_method(config: Config) -> Method:
    """The method; `name` is its label and no field of it."""
    return instantiate({key: value for key, value in config.method.items() if key != "name"}, _convert_="all")
