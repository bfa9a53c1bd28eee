"""What an experiment will take, as tables: trainable parameters, memory, tokens, operations, hours, disk. No model is loaded for it.

Assumed: the share of its peak that a GPU reaches, rows as long as `train.max_length` (for memory always, for tokens where there are no
rows), written answers as long as they may be. Everything else is counted. GB are 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from rich.table import Table
from torch.nn import Module

from clbench.adapters import describe
from clbench.build import DTYPES
from clbench.cli import CONF_DIR, compose
from clbench.config import Config
from clbench.data import Encoder
from clbench.dry_run import DryRun, Footprint, dry_engine
from clbench.estimate import (
    GPUS,
    Tokens,
    bound_tokens,
    count_tokens,
    examination_operations,
    meta_model,
    training_operations,
)
from clbench.footprint import examined_in_slices, local, sharded
from clbench.meta import META, Shapes
from clbench.model import Pretrained
from clbench.parts import make_method, make_probes
from clbench.protocols import Method, Task
from clbench.sharding import units
from clbench.stream import build_stream
from clbench.types import UserMistake


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What is asked: on which GPU, at which share of its bfloat16 peak, in how many processes, one a GPU."""

    gpu: str
    utilisation: float
    processes: int


def forecast(
    config: Config, tasks: Mapping[str, Task], arguments: Sequence[str], terms: Terms
) -> Iterator[Table | str]:
    """All tables, each as soon as it is known. `arguments` composed `config`; other methods are composed with them, too."""
    source = instantiate(config.model)
    architecture = source.configuration(Path(config.cache_dir))
    plain = meta_model(architecture)
    yield f"model {source.label}: {describe(plain)['parameters']:,} parameters, in {config.engine.dtype}"
    yield methods_table(trainable_counts(arguments, architecture))
    method, model = wrapped(config, architecture)
    counts = describe(model)
    tokens, reason = tokens_of(config, tasks, source, method=method, model=model)
    footprint = footprint_of(config, architecture, tokens, terms)
    in_slices = footprint_of(config, architecture, tokens, terms, sharded=True)
    unit = max(describe(part)["parameters"] for part in units(plain))
    yield memory_table(config, footprint, in_slices, tokens, terms, unit=unit)
    yield work_table(tokens, counts, terms)
    yield assumptions(tokens, reason, terms)
    yield disk_line(footprint, tokens, describe(plain)["parameters"], is_download=isinstance(source, Pretrained))


def wrapped(config: Config, architecture: Any) -> tuple[Method, Module]:
    """The configured method and its model, in the run's precision, without storage."""
    model = meta_model(architecture).to(DTYPES[config.engine.dtype])
    method = make_method(config)
    with Shapes(answer_length=1):
        return method, method.wrap(model)


def trainable_counts(arguments: Sequence[str], architecture: Any) -> dict[str, int]:
    """Trainable parameters under every method of conf/method as its yaml has it, whatever `arguments` say of the method."""
    others = compose(arguments)
    counts = {}
    for path in sorted((CONF_DIR / "method").glob("*.yaml")):
        method = compose([f"method={path.stem}"]).method
        _, model = wrapped(replace(others, method=method), architecture)
        counts[path.stem] = describe(model)["trainable"]
    return counts


def tokens_of(
    config: Config, tasks: Mapping[str, Task], source: Any, *, method: Method, model: Module
) -> tuple[Tokens, str]:
    """Counted tokens; where rows or tokenizer cannot be had, tokens from the yamls' caps, and why."""
    engine = dry_engine(model, processes=1)
    try:
        tokenizer = source.load_tokenizer(Path(config.cache_dir))
        encoder = Encoder(tokenizer, max_length=config.train.max_length, device=META)
        stream = build_stream(config.stream, order=config.order, tasks=tasks, encoder=encoder)
        probes = make_probes(config)
    except UserMistake as mistake:
        names = list(tasks)[: config.stream.limit]
        caps = [(config.tasks[name].get("max_train"), config.tasks[name].get("max_test")) for name in names]
        if any(cap is None for pair in caps for cap in pair):
            raise
        train = [min(cap, config.stream.train_rows or cap) for cap, _ in caps]
        test = [min(cap, config.stream.test_rows or cap) for _, cap in caps]
        with Shapes(answer_length=1):
            return bound_tokens(config, train, test, method=method, engine=engine), str(mistake)
    positions = source.configuration(Path(config.cache_dir)).max_position_embeddings
    with Shapes(answer_length=1):
        return count_tokens(config, stream, probes, encoder, positions=positions, method=method, engine=engine), ""


def methods_table(counts: Mapping[str, int]) -> Table:
    """Trainable parameters of every method."""
    table = table_of("Trainable parameters", "method", "parameters")
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    return table


def footprint_of(
    config: Config, architecture: Any, tokens: Tokens, terms: Terms, *, sharded: bool = False
) -> Footprint:
    """What one of the processes would hold of whole weights; `sharded`: computing as where they are slices (ZeRO 3)."""
    dry = DryRun(
        method=make_method(config),
        model=meta_model(architecture).to(DTYPES[config.engine.dtype]),
        config=config.train,
        processes=terms.processes,
        answer_length=tokens.answer_length,
        sharded=sharded,
    )
    return dry.run(stages=len(tokens.trained))


def memory_table(
    config: Config, footprint: Footprint, in_slices: Footprint, tokens: Tokens, terms: Terms, *, unit: int
) -> Table:
    """Memory of one GPU: in training, on every ZeRO stage (3: `in_slices`), and in examination, with whole weights unless the base is sharded.

    `unit`: parameters that are then gathered at once.
    """
    held = {stage: in_slices if stage == 3 else footprint for stage in range(4)}
    rows = {f"ZeRO {n}": sharded(each, zero_stage=n, processes=terms.processes) for n, each in held.items()}
    if terms.processes == 1:
        rows = {"local": local(footprint)} | rows
    share = -(-config.train.batch_size // terms.processes)
    title = (
        f"Memory of one {terms.gpu} of {terms.processes}, in GB: {config.method['name']}, stage {len(tokens.trained)}, "
        f"{min(config.train.micro_batch_size or share, share)} rows of {config.train.max_length} tokens a forward, "
        f"{tokens.answer_length} of them answer"
    )
    examination = {"total": footprint.examination}
    if config.engine.shard_base:
        gathered = unit * footprint.entry
        examination = {"total": examined_in_slices(footprint, processes=terms.processes, unit=gathered)}
    columns = {name: vars(memory) | {"total": memory.total} for name, memory in rows.items()} | {
        "examination": examination
    }
    table = table_of(title, "", *columns)
    for part in next(iter(columns.values())):
        table.add_row(part, *(f"{column[part] / 1e9:.2f}" if part in column else "" for column in columns.values()))
    table.add_row("fits", *(fits(column["total"], terms) for column in columns.values()))
    return table


def fits(size: int, terms: Terms) -> str:
    """Whether so many bytes fit, a tenth left for the driver, its libraries and fragments."""
    return "yes" if size < 0.9 * GPUS[terms.gpu].memory else "no"


def work_table(tokens: Tokens, counts: Mapping[str, int], terms: Terms) -> Table:
    """Tokens, operations and hours of training and of every probe. All processes train and share what probes ask for."""
    trained = sum(tokens.trained) + sum(tokens.replayed)
    operations = training_operations(trained, **counts)
    work = {
        "training": (sum(tokens.trained), None, 0),
        "replay": (sum(tokens.replayed), None, 0),
        "training and replay": (trained, operations, terms.processes),
    }
    for name, read in tokens.examined.items():
        operations = examination_operations(sum(read), parameters=counts["parameters"])
        work[f"probe {name}, {sum(map(bool, read))} times"] = (sum(read), operations, terms.processes)
    table = table_of("Work of one run", "", "tokens", "operations", "hours")
    speed = GPUS[terms.gpu].peak * terms.utilisation * 3600
    total = 0.0
    for name, (count, done, gpus) in work.items():
        hours = done / speed / gpus if done is not None else None
        total += hours or 0.0
        table.add_row(
            name, f"{count:,}", *("" if done is None else f"{done:.2e}", "" if hours is None else f"{hours:.2f}")
        )
    table.add_row("all", "", "", f"{total:.2f}")
    return table


def assumptions(tokens: Tokens, reason: str, terms: Terms) -> str:
    """What the numbers of the tables above rest on."""
    kind = (
        "Tokens are exact, written answers at their longest."
        if tokens.exact
        else f"Tokens are a bound: every sequence counted as long as train.max_length, one per test row, other probes not counted, because {reason}."
    )
    return (
        f"{kind} Hours at {terms.utilisation:.0%} of the bfloat16 peak of {terms.processes} {terms.gpu}: "
        "an assumption about utilisation, not a measurement. Memory without the driver's own; attention is taken to be one fused operation."
    )


def disk_line(footprint: Footprint, tokens: Tokens, parameters: int, *, is_download: bool) -> str:
    """Disk that a run and its model take."""
    entry, whence = (2, "downloaded in bfloat16") if is_download else (4, "made here in float32")
    return (
        f"disk: model {parameters * entry / 1e9:.2f} GB, {whence}; checkpoint {footprint.checkpoint / 1e9:.2f} GB, twice that while it is "
        f"replaced; ledger at most {tokens.record / 1e6:.1f} MB"
    )


def table_of(title: str, *headings: str) -> Table:
    """An empty table; numbers stand to the right."""
    table = Table(title=title, title_justify="left", box=None)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    return table
