"""Builds what a run is made of from its configuration: model, tasks, probes, method, ledger.

Not here: what happens to them (`experiment`).
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from hydra.utils import instantiate
from torch import Tensor
from torch.nn import Module

from clbench.config import Config, run_directory
from clbench.data.encoder import Encoder
from clbench.models.architecture import is_sharded
from clbench.protocols import Method, Probe, Stream, Task
from clbench.record.ledger import Checkpoint, Ledger
from clbench.record.manifest import data_contract, manifest
from clbench.stream import build_stream
from clbench.train.ranks import Ranks
from clbench.types import UserMistake

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True)
class Run:
    """Everything a run is made of, complete after `prepare`. `overlapping`: ids of training examples that a test or probe holds, too.

    Only the first rank writes: elsewhere there is no ledger. `moments`: the optimizer's state as the last stage left it, where it is
    carried (`optim`). `within`: where the next stage goes on, if it was begun before.
    """

    config: Config
    method: Method
    model: Module
    stream: Stream
    probes: tuple[Probe, ...]
    encoder: Encoder
    ledger: Ledger | None
    overlapping: frozenset[str] = frozenset()
    ranks: Ranks = field(default_factory=Ranks)
    moments: dict[str, Tensor] = field(default_factory=dict)
    within: Checkpoint | None = None


def set_up_torch(config: Config) -> None:
    """Threads, and warnings of libraries that say nothing a user can act on."""
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # transformers asks deepspeed, which warns when it has to find out for itself
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch.distributed")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def prepare(config: Config, *, command: str, ranks: Ranks) -> Run:
    """Builds what the configuration names and opens the ledger. The first rank goes first and fills the cache for the others."""
    if not ranks.is_first:
        ranks.wait()
    prepared = build(config, command=command, ranks=ranks)
    if ranks.is_first:
        ranks.wait()
    if config.engine.shard_base:
        prepared.model = sharded_model(config, prepared.method)
    return prepared


def sharded_model(config: Config, method: Method) -> Module:
    """The method's model, of whose base each rank holds a slice; all ranks load it together."""
    from clbench.train.zero import born_sharded

    dtype = DTYPES[config.engine.dtype]
    with born_sharded(dtype, offload=config.engine.offload):
        model, _ = instantiate(config.model).load(Path(config.cache_dir), dtype=dtype)
        model = method.wrap(model.to(device=device_of(config), dtype=dtype))
    if any(is_sharded(parameter) and parameter.requires_grad for parameter in model.parameters()):
        raise UserMistake(
            f"method={config.method['name']} trains the base model, which engine.shard_base=true keeps frozen; "
            "choose a method with adapters, or engine.shard_base=false"
        )
    return model


def device_of(config: Config) -> torch.device:
    """Where the model computes."""
    has_gpu = torch.cuda.is_available()
    return torch.device(("cuda" if has_gpu else "cpu") if config.engine.device == "auto" else config.engine.device)


def build(config: Config, *, command: str, ranks: Ranks) -> Run:
    """As `prepare`, for one rank; a model that is sharded is not there yet."""
    source = instantiate(config.model)
    method, model, device = make_method(config), Module(), device_of(config)
    if config.engine.shard_base:
        tokenizer = source.load_tokenizer(Path(config.cache_dir))
    else:
        model, tokenizer = source.load(Path(config.cache_dir))
        model.to(device=device, dtype=DTYPES[config.engine.dtype])
    encoder = Encoder(tokenizer, max_length=config.train.max_length, device=device)
    tasks = make_tasks(config)
    stream = build_stream(config.stream, order=config.order, tasks=tasks, encoder=encoder)
    probes = make_probes(config)
    ledger, overlapping = None, frozenset()
    if ranks.is_first:
        contract, overlapping = data_contract(config, stream, probes, encoder)
        named = {"model_label": source.label, "fingerprint": source.fingerprint(), "command": command}
        ledger = Ledger(
            run_directory(config), manifest=manifest(config, stream, **named) | contract, resume=config.resume
        )
    return Run(
        config=config,
        method=method,
        model=model if config.engine.shard_base else method.wrap(model),
        stream=stream,
        probes=probes,
        encoder=encoder,
        ledger=ledger,
        overlapping=overlapping,
        ranks=ranks,
    )


def make_tasks(config: Config) -> dict[str, Task]:
    """The stream's tasks by name, in the order in which the stream lists them."""
    return {name: instantiate(task, _convert_="all") for name, task in config.tasks.items()}


def make_probes(config: Config) -> tuple[Probe, ...]:
    """The probes, each with its name."""
    return tuple(instantiate(probe, name=name, _convert_="all") for name, probe in config.probe.probes.items())


def make_method(config: Config) -> Method:
    """The method; `name` is its label and no field of it."""
    return instantiate({key: value for key, value in config.method.items() if key != "name"}, _convert_="all")
