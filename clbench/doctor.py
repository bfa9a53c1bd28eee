"""What there is and what an experiment will cost: `python -m clbench.doctor methods`, `python -m clbench.doctor +experiment=NAME`.

`python -m clbench.doctor hub` looks whether the hub still has every dataset that conf/ names.
With gpu=here the untouched model is examined and training is tried on this machine, and what a run says before its first stage is printed.

Parameters are counted on torch's meta device, where tensors have a shape and no storage. Tokens are counted by drawing every batch as the run
will. Operations, hours and memory are formulas; what they assume is printed below them. No weights are loaded. GB are 10^9 bytes.
"""

import importlib
import logging
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Column, Table
from transformers import PretrainedConfig

from clbench.build import check_classes, make_tasks, set_up_torch, sketch
from clbench.commands import side_command
from clbench.config import Config
from clbench.config.checks import one_of
from clbench.config.composition import CONF_DIR, compose
from clbench.data.encoder import Encoder
from clbench.models.weights import count_parameters
from clbench.protocols import Method, Task
from clbench.stream import address, build_stream
from clbench.train.local import LocalEngine
from clbench.train.loop import global_batch, plan_stage
from clbench.types import UserMistake

PAGE = """# Datasets of the tasks\n
Written by `python -m clbench.doctor datasets > conf/task/README.md`; a test holds it against the yamls. The project holds none of these rows.
Terms are those that the dataset's card states; ask your own counsel. A revision "main" is a branch: no commit is pinned. The hub keeps
"refs/convert/parquet", its own form of a repository that has a loading script, only for as long as it likes. Where `python -m clbench.doctor hub`
finds a repository wanting, put rows with the columns that the yaml names into train.jsonl and test.jsonl in data_dir/NAME (its dataset.name).\n
| task | hub dataset @ revision | hub splits train / test | licence | metric | rows at most |\n| --- | --- | --- | --- | --- | --- |\n"""
WORDS = "methods | datasets | hub | [+experiment=NAME] [key=value ...] [gpu=h100 | gpu=here] [utilisation=0.4] [engine.processes=8]"
ON_HUB = ("asked for by", "dataset : configuration @ revision [splits]", "")
CARD = ("paper", "trainable", "memory", "compute", "deviations")
HERE = "here"
GPUS = {"a100": (312, 80), "h100": (989, 80), "h200": (989, 141), "l40s": (362, 48), "rtx4090": (165, 24)}
"""Dense bfloat16 peak in 10^12 operations a second, and memory in GB, from the makers' data sheets."""
OWN = ("gpu=", "utilisation=", "engine.processes=")
"""Arguments that are the doctor's and not Hydra's; the processes, because they need no engine here."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens of a whole run: of the stages' own rows in training, of replayed rows, and of all examinations of the stream's tasks."""

    trained: int
    replayed: int
    examined: int


def method_yaml(name: str) -> dict[str, Any]:
    """The keys of conf/method/<name>.yaml over those of the yamls it inherits; `seed` is 0."""
    loaded: Any = OmegaConf.load(CONF_DIR / "method" / f"{name}.yaml")
    parents = [method_yaml(parent) for parent in loaded.get("defaults", ()) if isinstance(parent, str)]
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge({"seed": 0}, *parents, loaded), resolve=True))


def methods() -> dict[str, dict[str, Any]]:
    """Every method of conf/method, configured as its own yaml has it."""
    return {path.stem: method_yaml(path.stem)["method"] for path in sorted((CONF_DIR / "method").glob("*.yaml"))}


def card(target: str) -> dict[str, str]:
    """The Card of a method, from the docstring of the module that its class `target` is in: the lines `- key: value` after `Card:`."""
    text = importlib.import_module(target.rpartition(".")[0]).__doc__ or ""
    found = dict(re.findall(r"^- (\w+): (.+)$", text.partition("\nCard:\n")[2], flags=re.MULTILINE))
    return {key: found[key] for key in CARD}


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], **looks: Any) -> Table:
    """A table to print; long cells are folded."""
    made = Table(*(Column(name, overflow="fold") for name in headings), title=title, title_justify="left", **looks)
    for row in rows:
        made.add_row(*row)
    return made


def methods_table() -> Table:
    """Every method of conf/method with its card."""
    rows = ((name, *card(method["_target_"]).values()) for name, method in methods().items())
    return table("Methods", ("method", *CARD), rows, show_lines=True)


def datasets_page() -> str:
    """conf/task/README.md: what every task reads, under which terms, and how it is scored."""
    rows = []
    for path in sorted((CONF_DIR / "task").glob("*.yaml")):
        task: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if "dataset" in task:
            splits = f"{task['dataset']['splits']['train']} / {task['dataset']['splits']['test']}"
            metric = f"{task['metric']} v{task['metric_version']}"
            most = f"{task['max_train']} / {task['max_test']}"
            rows.append((path.stem, address(instantiate(task["dataset"])), splits, task["licence"], metric, most))
    return PAGE + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def hub_table() -> Table:
    """Every dataset that conf/ names, with what is wrong with it on the hub."""
    from clbench.hub import checked  # which imports datasets: a datasets.py of the user's is out of its way by now

    return table("Datasets on the hub", ON_HUB, checked())


def trainable_rows(config: Config, sizes: PretrainedConfig) -> Iterator[tuple[str, str]]:
    """Every method of conf/method and its trainable parameters, as its own yaml has it, whatever `config` says of the method."""
    for name, method in methods().items():
        try:
            yield name, f"{count_parameters(sketch(replace(config, method=method), sizes)[1])['trainable']:,}"
        except UserMistake as mistake:
            yield name, f"not to be counted on this model: {mistake}"


def count_tokens(config: Config, sizes: PretrainedConfig, tasks: Mapping[str, Task], encoder: Encoder) -> Tokens:
    """Draws every batch of the run; a method that replays ends each stage, so that its memory fills.

    An examination reads each test row's prompt once, and its choices or an answer as long as the longest of training. There is one before the first
    stage and one after each, on every view of the model.
    """
    stages = build_stream(config.stream, order=config.order, tasks=tasks, encoder=encoder).stages
    method, model = sketch(config, sizes)
    trained, examined = [0, 0], 0
    for stage in stages:
        plan = plan_stage(method.training_set(stage), config.train)
        for step in range(plan.total):
            for row, source, _ in global_batch(plan, step, config=config.train, seed=config.seed, stage=stage.index):
                trained[source > 0] += len(encoder.example(row).ids)
        if type(method).training_set is not Method.training_set:
            method.end_stage(stage, LocalEngine(model, optimizer=None, schedule=None, clip=0.0))
        longest = max(len(encoder.answer(row.answer)) + 1 for row in stage.train)
        for row in stage.test:
            choices = sum(len(encoder.answer(choice)) for choice in row.choices)
            examined += min(len(encoder.prompt(row.prompt)), encoder.max_length) + (choices or longest)
    times = (len(stages) + 1) * len(method.views(model))
    return Tokens(trained=trained[0], replayed=trained[1], examined=examined * times)


def work(tokens: Tokens, counts: Mapping[str, int], speed: float) -> Iterator[tuple[str, str, str, str]]:
    """Rows of what is done, its tokens, operations, and hours at `speed` operations a second.

    A trained token is taken to cost 4 operations a parameter and 2 more a trainable one, a token that is only read 2 a parameter. That a GPU
    reaches this share of its peak is an assumption. Probes of base knowledge and of text are not counted.
    """
    training = tokens.trained + tokens.replayed
    weight = 4 * counts["parameters"] + 2 * counts["trainable"]
    operations = training * weight, tokens.examined * 2 * counts["parameters"]
    names = f"training, {tokens.replayed:,} tokens of it replay", "examination of the stream's tasks", "both"
    read = training, tokens.examined, training + tokens.examined
    for name, count, done in zip(names, read, (*operations, sum(operations)), strict=True):
        yield name, f"{count:,}", f"{done:.2e}", f"{done / speed / 3600:.2f}"


def memory(config: Config, model: torch.nn.Module, sizes: PretrainedConfig, ranks: int) -> dict[str, list[float]]:
    """Bytes of one GPU in training on ZeRO stage 0 to 3, by part.

    This is a formula, unmeasured. It assumes gradients, moments, master copies and logits in float32, and gradients that add up whole on each
    rank until the step. Activations are those of plain LoRA on every linear layer, or of full training, with fused attention: a token and layer
    keeps 40 bytes x hidden size and 16 (bfloat16: 10) x inner size; DoRA keeps twice as much, CUR layers half. A quarter of all tokens are
    answers, with logits and their gradient. Left out are the method's own tensors (its card names them), offloading, messages between ranks and
    the driver. Between stages ZeRO 3 holds all weights, too, unless engine.shard_base.
    """
    rows = min(config.train.micro_batch_size or config.train.batch_size, -(-config.train.batch_size // ranks))
    hidden, layers, entry = sizes.hidden_size, sizes.num_hidden_layers, next(model.parameters()).element_size()
    layer = 40 * hidden + (16 if entry == 4 else 10) * (sizes.to_dict().get("intermediate_size") or 4 * hidden)
    # Computed again in the backward pass, a layer keeps what goes into it, and one at a time keeps all.
    kept = layers * hidden * entry + layer if config.engine.activation_checkpointing else layers * layer
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    trained = 4 * count_parameters(model)["trainable"]
    parts: dict[str, list[float]] = {
        "weights": [*[weights] * 3, weights / ranks],
        "gradients": [trained] * 4,
        "moments, masters": [2 * trained, *[3 * trained / ranks] * 3],
        "activations": [rows * config.train.max_length * kept] * 4,
        "logits": [rows * config.train.max_length // 4 * sizes.vocab_size * 8] * 4,
    }
    parts["total"] = [sum(column) for column in zip(*parts.values(), strict=True)]
    return parts


def assumed(formula: Callable[..., object]) -> str:
    """What a formula assumes: its docstring but for the first line, as one line."""
    return " ".join(f"{formula.__doc__}".partition("\n")[2].split())


def asked(arguments: Sequence[str], *, config_dir: Path | None = None) -> tuple[Config, str, float, int]:
    """The configuration, the GPU, the share of its peak that it reaches, the number of processes."""
    own = {"gpu": "h100", "utilisation": "0.4"} | dict(part.split("=", 1) for part in arguments if part.startswith(OWN))
    config = compose([part for part in arguments if not part.startswith(OWN)], config_dir=config_dir)
    processes, share = own.get("engine.processes", str(config.engine.processes)), own["utilisation"]
    one_of("gpu", own["gpu"], [HERE, *GPUS])
    if own["gpu"] == HERE and config.engine.shard_base:
        raise UserMistake(
            "gpu=here measures in one process, which cannot hold slices; leave engine.shard_base=true out"
        )
    if not re.fullmatch(r"0?\.\d*[1-9]\d*|1(\.0*)?", share) or not re.fullmatch(r"[1-9]\d*", processes):
        raise UserMistake(f"utilisation={share} engine.processes={processes}: give a share as 0.4, a whole number as 8")
    return config, own["gpu"], float(share), int(processes)


def forecast(arguments: Sequence[str], *, config_dir: Path | None = None) -> Iterator[Table | str]:
    """All that is printed of an experiment, each part as soon as it is known."""
    config, gpu, share, ranks = asked(arguments, config_dir=config_dir)
    check_classes(config)
    set_up_torch(config)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    tasks, source = make_tasks(config), instantiate(config.model, _convert_="all")
    read = ((name, address(task.dataset), task.licence) for name, task in tasks.items() if task.dataset)
    yield table("Datasets of the stream", ("task", "dataset", "licence"), read, box=None)
    sizes = source.sizes(Path(config.cache_dir))
    yield table("Trainable parameters", ("method", ""), trainable_rows(config, sizes), box=None)
    model = sketch(config, sizes)[1]
    counts = count_parameters(model)
    if gpu == HERE:
        from clbench.experiment import outlook  # takes a while, and is wanted here alone

        yield outlook(config).spoken(done=0)
        return
    yield f"{source.label} with {config.method['name']}: {counts['parameters']:,} parameters, {counts['trainable']:,} of them trainable"
    try:
        tokenizer, chat = source.load_tokenizer(Path(config.cache_dir)), config.prompt == "chat"
        encoder = Encoder(tokenizer, max_length=config.train.max_length, chat=chat)
        tokens = count_tokens(config, sizes, tasks, encoder)
        rows = work(tokens, counts, GPUS[gpu][0] * 1e12 * share * ranks)
        yield table(
            f"{ranks} {gpu} at {share:.0%} of the peak", ("work", "tokens", "operations", "hours"), rows, box=None
        )
        yield f"Tokens are exact, but for written answers (their longest). {assumed(work)}"
    except UserMistake as mistake:
        yield f"Tokens, operations and hours cannot be counted: {mistake}"
    rows = ((part, *(f"{size / 1e9:.2f}" for size in row)) for part, row in memory(config, model, sizes, ranks).items())
    zero = (f"GB (an {gpu} has {GPUS[gpu][1]})", *(f"ZeRO {stage}" for stage in range(4)))
    yield table("Memory of one GPU", zero, rows, box=None)
    yield f"{assumed(memory)}\nDisk: a checkpoint takes {counts['trainable'] * 4 / 1e9:.2f} GB."


def main(arguments: Sequence[str]) -> None:
    """Prints what was asked for. A mistake of the user's ends the command with exit code 2."""
    parser = ArgumentParser("python -m clbench.doctor", description="What there is, and what an experiment will cost.")
    parser.add_argument("words", nargs="*", metavar="what", help=WORDS)
    parser.add_argument("--config-dir", "-cd", type=Path, help="a folder with yamls of your own")
    side_command(parser, _tell, arguments)


def _tell(options: Namespace) -> None:
    pages = {"methods": methods_table, "datasets": datasets_page, "hub": hub_table}
    words = options.words
    if not words:
        raise UserMistake(f"say what to look at: {WORDS}")
    for part in [pages[words[0]]()] if words[0] in pages else forecast(words, config_dir=options.config_dir):
        Console(highlight=False, markup=False, emoji=False, soft_wrap=True).print(part)


if __name__ == "__main__":
    main(sys.argv[1:])
