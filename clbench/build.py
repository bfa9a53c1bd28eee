"""The objects that a configuration names: tasks, probes, method, stream, model."""

import builtins
import copy
import logging
import os
import sys
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import is_dataclass
from inspect import isfunction, signature
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch
import transformers
from hydra.utils import instantiate
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch.nn import Module
from transformers import AutoModelForCausalLM, PretrainedConfig

from clbench.config import Config, leaves, target_names
from clbench.config.names import suggestion
from clbench.data.encoder import Encoder
from clbench.models.folding import adapted
from clbench.models.limits import check_length, check_read, has_one_key_head, positions
from clbench.models.lora import ALL_LINEAR, roles
from clbench.models.loss import causal_lm
from clbench.protocols import Method, ModelSource, Parts, Probe, Task
from clbench.stream import build_stream, chosen
from clbench.types import UserMistake

log = logging.getLogger("clbench")
BUILT_IN = ("builtins", "collections.abc")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def set_up_torch(config: Config) -> None:
    """Threads, the count of an accelerator's memory, and warnings of libraries that say nothing a user can act on."""
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # one process may run several methods after one another
    else:
        # transformers asks deepspeed for its accelerator, which warns when it has to find out for itself.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch.distributed")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def build(config: Config, *, working: Callable[[str], AbstractContextManager[object]] = nullcontext) -> Parts:
    """Reads the rows and the tokenizer; no model is loaded. What is done inside of `working` takes long, which it says."""
    check_classes(config)
    device = _device_of(config)
    with working("reading the rows of tasks and probes"):
        tasks = make_tasks(config)
        asked = config.probe.probes.items()
        probes = tuple(instantiate(probe, name=name, _convert_="all") for name, probe in asked)
        # What is wrong with rows is said at once: the tokenizer of a model that is pretrained here is there when that is done.
        for task in tasks.values():
            for split in ("train", "test"):
                task.examples(split)
    source = instantiate(config.model, _convert_="all")
    own = source.configuration(Path(config.cache_dir))
    # What the method cannot be put on is said before weights are read, or a model is pretrained.
    _, sketched = sketch(config, own)
    train, longest = config.train, positions(own)
    check_length(train.max_length, positions=longest)
    tokenizer = source.load_tokenizer(Path(config.cache_dir))
    chat = config.prompt == "chat"
    encoder = Encoder(tokenizer, max_length=train.max_length, cut=train.cut, device=device, chat=chat)
    if tokenizer.chat_template is not None and not chat:
        log.info("the model's tokenizer has a chat template, which prompt=plain leaves out; prompt=chat uses it")
    if (config.stream.limit or 0) > len(config.stream.tasks):
        log.warning("stream.limit=%d, but the stream has %d tasks: all are trained", config.stream.limit, len(tasks))
    method = make_method(config)
    with working("encoding the rows"):
        check_texts(method.documents(), encoder)
        stream = build_stream(config.stream, order=config.order, tasks=tasks, encoder=encoder)
        for probe in probes:
            check_read(probe.longest(encoder), positions=longest)
    parts = Parts(
        source=source,
        method=method,
        adapted=tuple(adapted(causal_lm(sketched))),
        encoder=encoder,
        stream=stream,
        probes=probes,
    )
    if ALL_LINEAR in dict(leaves(config.method)).values():
        log.info("%s: adapters are on %s", ALL_LINEAR, ", ".join(roles(parts.adapted)))
    return parts


def load_model(config: Config, source: Any) -> Module:
    """The untouched model on its device; with engine.shard_base each rank holds a slice of it, and all ranks load it together."""
    device, dtype = _device_of(config), DTYPES[config.engine.dtype]
    if not config.engine.shard_base:
        # Not model.to(dtype): that would also round the frequencies of rotary embeddings, which transformers keeps in float32.
        model, _ = source.load(Path(config.cache_dir), dtype=dtype)
        return placed(model, device)
    from clbench.train.zero import born_sharded

    with born_sharded(dtype, offload=config.engine.offload):
        model, _ = source.load(Path(config.cache_dir), dtype=dtype)
        return placed(model, device)


def placed(model: Module, device: torch.device) -> Module:
    """The model on its device. On CUDA one whose attention has a single head of keys and values computes attention by matrix products.

    torch's memory-efficient kernel gives a wrong output of the last token where one head is expanded over many, attention has a mask, and a length
    is one more than a multiple of 32 (pytorch issue 191937; seen in 2.11). Matrix products take memory by the square of a row's tokens.
    """
    if device.type == "cuda" and has_one_key_head(model):
        causal_lm(model).set_attn_implementation("eager")
    return model.to(device)


def sketch(config: Config, sizes: PretrainedConfig) -> tuple[Method, Module]:
    """The method and the model that it has wrapped, in the run's precision, without storage.

    Raises UserMistake where the method finds no layers for it, or needs whole what engine.shard_base keeps in slices.
    """
    # Code that lies beside weights is asked for where there is no other; that it may run was said when the configuration was read.
    is_remote = type(sizes) not in AutoModelForCausalLM._model_mapping
    own, dtype = copy.deepcopy(sizes), DTYPES[config.engine.dtype]
    method = make_method(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(own, dtype=dtype, trust_remote_code=is_remote)
        base = [*model.parameters()]
        wrapped = method.wrap(model)
    if config.engine.shard_base and (method.decomposes or any(parameter.requires_grad for parameter in base)):
        does = "decomposes" if method.decomposes else "trains"
        raise UserMistake(
            f"method={config.method['name']} {does} the base model's weights, which engine.shard_base=true keeps frozen, in slices; "
            "choose a method with adapters, or engine.shard_base=false"
        )
    return method, wrapped


def wrap(method: Method, model: Module) -> Module:
    """The method's model, not to be trained yet."""
    return method.wrap(model).eval()


def _device_of(config: Config) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if config.engine.device == "cuda" and not has_gpu:
        raise UserMistake("engine.device=cuda, but torch finds no CUDA device here; choose auto or cpu")
    return torch.device(("cuda" if has_gpu else "cpu") if config.engine.device == "auto" else config.engine.device)


def make_tasks(config: Config) -> dict[str, Task]:
    """The stream's tasks that are trained, by name, in the order in which the stream lists them."""
    names = chosen([*config.tasks], limit=config.stream.limit, last=config.stream.last)
    return {name: instantiate(config.tasks[name], _convert_="all") for name in names}


def make_method(config: Config) -> Method:
    """The method; `name` is its label and no field of it."""
    return instantiate({key: value for key, value in config.method.items() if key != "name"}, _convert_="all")


def check_texts(texts: Sequence[str], encoder: Encoder) -> None:
    """Raises UserMistake where a text that the method trains on is too long for a row."""
    for text in texts:
        if not encoder.fits(text):
            raise UserMistake(
                f"the method's text {text[:40]!r}... has more tokens than train.max_length={encoder.max_length} holds; "
                "let it take fewer words (conf/method), or set train.max_length higher"
            )


def check_classes(config: Config) -> None:
    """Raises UserMistake where a group names what is not of its kind, or gives it what its fields do not allow; nothing is made or called."""
    method = {key: value for key, value in config.method.items() if key != "name"}
    check_value("method", method, Method)
    check_value("model", config.model, ModelSource)
    for name, task in config.tasks.items():
        check_value(f"tasks.{name}", task, Task)
    for name, probe in config.probe.probes.items():
        check_value(f"probe.probes.{name}", {**probe, "name": name}, Probe)


def check_value(key: str, value: Any, hint: Any) -> None:
    """Raises UserMistake where `value`, which a configuration has at `key`, is not what the annotation `hint` says.

    What names a `_target_` has to name a class of that kind, or a function that says it returns such a thing.
    """
    if isinstance(value, Mapping) and "_target_" in value:
        return _check_target(key, value, hint)
    if isinstance(hint, type) and is_dataclass(hint):
        raise UserMistake(
            f"{key}={value!r} is not allowed, a {hint.__name__} is due; name its class as {key}._target_ (conf/)"
        )
    inner = {list: get_args(hint)[:1], dict: get_args(hint)[1:]}.get(type(value), ())
    if [*target_names(value)]:
        for name, one in value.items() if isinstance(value, Mapping) else enumerate(value):
            check_value(f"{key}.{name}", one, inner[0] if inner else None)
        return
    try:
        TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
    except ValidationError as error:
        why = " or ".join(dict.fromkeys(one["msg"][0].lower() + one["msg"][1:] for one in error.errors()))
        quote = "; yaml takes a bare yes, no or number for none, so quote it" if "valid string" in why else ""
        raise UserMistake(
            f"{key}={value!r} is not allowed, {why}{quote}; change it in conf/ or as {key}=VALUE"
        ) from error


def _check_target(key: str, settings: Mapping[str, Any], hint: Any) -> None:
    target, kinds = settings["_target_"], list(_kinds(hint))
    wanted = " or ".join(kind.__name__ for kind in kinds) or "nothing that is made of a _target_"
    try:
        found: Any = locate(str(target))
    except ErrorDuringImport as error:
        if error.value and not isinstance(error.value, Exception):
            raise error.value from None  # Ctrl-C, which locate takes for a fault of the module
        raise UserMistake(f"{key}._target_={target} cannot be imported ({error})") from error
    makes = _hints(found).get("return") if isfunction(found) else found
    # A class has to be of a kind that is somebody's own; text, numbers and lists are given as such, or made by a function that says so.
    own = kinds if makes is not found else [kind for kind in kinds if kind.__module__ not in BUILT_IN]
    if not any(issubclass(made, kind) for made in _kinds(makes) for kind in own):
        what = "is not there" if found is None else "is none"
        raise UserMistake(
            f"{key}._target_={target} {what}; allowed there: {wanted}, or a function that says it returns one"
        )
    parameters = signature(found).parameters.values()
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    fields = {one.name: one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    hints = _hints(found)
    given = {name: value for name, value in settings.items() if name != "_target_"}
    for name in () if takes_any else given.keys() - fields.keys():
        raise UserMistake(f"{key}.{name} is no field of {target}; {suggestion(name, fields)}")
    for name, field in fields.items():
        if name in given:
            check_value(f"{key}.{name}", given[name], hints.get(name, Any))
        elif field.default is field.empty:
            raise UserMistake(f"{key}.{name} is missing; {target} needs it: give {key}.{name}=VALUE")


class _Unknown(dict[str, Any]):
    """Stands for names that are there for type checkers alone."""

    def __missing__(self, name: str) -> Any:
        return Any


def _hints(found: Any) -> dict[str, Any]:
    """What a function, or a class, takes, by name; annotations in quotes are looked up where it, or a class that it inherits from, is written."""
    written = found.__mro__ if isinstance(found, type) else (found,)
    known = ChainMap(*(vars(sys.modules[one.__module__]) for one in written), builtins.__dict__, _Unknown())
    return get_type_hints(found.__init__ if isinstance(found, type) else found, localns=known, include_extras=True)


def _kinds(hint: Any) -> Iterator[type]:
    """The classes that an annotation names, without what it says of their contents: Sequence of Sequence[str] | None."""
    origin = get_origin(hint)
    if origin is Annotated or origin is UnionType:
        for inner in get_args(hint)[: 1 if origin is Annotated else None]:
            yield from _kinds(inner)
    elif isinstance(origin or hint, type) and hint is not type(None):
        yield origin or hint
