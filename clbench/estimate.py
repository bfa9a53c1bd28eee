"""How much an experiment reads and computes, before it does: parameters, tokens, floating-point operations.

Parameters are counted on a model without storage, built from the architecture that the model's yaml states. Tokens are counted by tokenising
the rows, drawing every batch and letting every probe score a model that only counts; where rows or tokenizer cannot be had, every sequence
counts as long as `train.max_length` allows, and the number is an upper bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import Module
from transformers import AutoModelForCausalLM, PretrainedConfig

from clbench.config import Config, is_due
from clbench.data import Encoder
from clbench.dry_run import NoTask, dry_encoder, dry_example
from clbench.meta import META
from clbench.packing import Ids, Read, groups
from clbench.protocols import Engine, Method, Probe
from clbench.stream import Stream
from clbench.student import Student
from clbench.train import global_batch, plan_stage
from clbench.types import Stage


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device: dense bfloat16 peak in operations a second, and memory in bytes, from the makers' data sheets."""

    peak: float
    memory: float


GPUS = {
    "a100": Gpu(peak=312e12, memory=80e9),
    "h100": Gpu(peak=989e12, memory=80e9),
    "h200": Gpu(peak=989e12, memory=141e9),
    "l40s": Gpu(peak=362e12, memory=48e9),
    "rtx4090": Gpu(peak=165e12, memory=24e9),
}


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens that each stage trains on and replays, and that each probe reads or writes in each examination, the untouched model's first.

    `exact`: counted, not assumed; only written answers are assumed even then, each as long as it may be. `answer_length`: tokens of the
    longest training answer, its end included. `record`: bytes that the ledger writes about all examinations.
    """

    trained: tuple[int, ...]
    replayed: tuple[int, ...]
    examined: Mapping[str, tuple[int, ...]]
    exact: bool
    answer_length: int
    record: int


def meta_model(configuration: PretrainedConfig) -> Module:
    """The model of that configuration on the meta device: shapes without storage."""
    with META:
        return AutoModelForCausalLM.from_config(configuration)


class Counter(Student):
    """A student that answers nothing and counts the tokens that it would read and write; `positions` is the longest input."""

    def __init__(self, encoder: Encoder, *, positions: int) -> None:
        super().__init__(Module(), encoder)
        self._positions = positions

    @property
    def positions(self) -> int:
        """As given."""
        return self._positions

    def log_likelihoods(self, requests: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        """Counts what the real one reads, shared beginnings once."""
        self._count(self.reads(requests))
        return [(0.0, False)] * len(requests)

    def write(
        self,
        prompts: Sequence[Ids],
        *,
        max_new_tokens: int,
        has_ended: Callable[[list[list[int]]], list[bool]] | None = None,
    ) -> list[list[int]]:
        """Counts every prompt and as many tokens as may be written."""
        self.tokens_scored += sum(map(len, prompts)) + len(prompts) * max_new_tokens
        return [[] for _ in prompts]

    def next_log_probs(self, contexts: Sequence[Ids]) -> Tensor:
        """Counts the contexts, shared beginnings once."""
        self._count([Read(ids, len(ids) - 1) for ids in contexts])
        return torch.zeros(len(contexts), 1)

    def _count(self, reads: Sequence[Read]) -> None:
        self.tokens_scored += sum(
            group.shared + sum(len(row.ids) - group.shared for row in group.rows) for group in groups(reads)
        )


def training_tokens(
    config: Config, stages: Sequence[Stage], encoder: Encoder, *, method: Method, engine: Engine
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of each stage's own rows and of replayed ones, as the run will draw them.

    A method that trains on more than the stage's rows ends every stage, so that its memory fills; `engine` is for that.
    """
    replays = type(method).training_set is not Method.training_set
    counted = []
    for stage in stages:
        plan = plan_stage(method.training_set(stage), config.train)
        tokens = {True: 0, False: 0}
        for step in range(plan.total):
            for example, source, _ in global_batch(
                plan, step, config=config.train, seed=config.seed, stage=stage.index
            ):
                tokens[source == 0] += len(encoder.example(example).ids)
        if replays:
            method.end_stage(stage, engine)
        counted.append((tokens[True], tokens[False]))
    trained, replayed = zip(*counted, strict=True)
    return trained, replayed


def count_tokens(
    config: Config,
    stream: Stream,
    probes: Sequence[Probe],
    encoder: Encoder,
    *,
    positions: int,
    method: Method,
    engine: Engine,
) -> Tokens:
    """The tokens of a stream whose rows are there. `method` is wrapped around the model of `engine`; each of its views is examined."""
    trained, replayed = training_tokens(config, stream.stages, encoder, method=method, engine=engine)
    views, last, record = len(method.views(engine.model)), len(stream.stages), 0
    examined = {}
    for probe in probes:
        probe.begin(Counter(encoder, positions=positions))
        before, after = (examination(probe, stream, stage, encoder, positions=positions) for stage in (0, 1))
        cadence = config.probe.cadence.get(probe.name, "all")
        due = [views * is_due(cadence, stage, last) for stage in range(last + 1)]
        found = [before, *[after] * last]
        examined[probe.name] = tuple(times * tokens for times, (tokens, _) in zip(due, found, strict=True))
        record += sum(times * size for times, (_, size) in zip(due, found, strict=True))
    encoded = (encoder.example(example) for stage in stream.stages for example in stage.train)
    return Tokens(
        trained=trained,
        replayed=replayed,
        examined=examined,
        exact=True,
        answer_length=max(len(row.ids) - row.answer_start for row in encoded),
        record=record,
    )


def examination(probe: Probe, stream: Stream, stage: int, encoder: Encoder, *, positions: int) -> tuple[int, int]:
    """Tokens of one measurement by `probe` after `stage`, and bytes of its record: a line a score, 8 bytes an item before compression."""
    counter = Counter(encoder, positions=positions)
    scores = list(probe.measure(counter, stream, stage))
    record = sum(len(str(asdict(score) | {"items": ()})) + 8 * len(score.items) for score in scores)
    return counter.tokens_scored, record


def bound_tokens(
    config: Config, rows: Sequence[int], test_rows: Sequence[int], *, method: Method, engine: Engine
) -> Tokens:
    """Tokens when neither rows nor tokenizer can be had: every sequence as long as it may be, one per test row; other probes not counted.

    Answers are taken to be a quarter of it, which no token count depends on.
    """
    longest = config.train.max_length
    example = dry_example(longest, answer_length=max(2, longest // 4))
    encoder = dry_encoder(longest)
    stages = [
        Stage(
            index=index,
            name="",
            task=NoTask(),
            train=(example,) * count,
            test=(),
            collate=encoder.collate,
            whole_stream=(example,) * sum(rows),
        )
        for index, count in enumerate(rows, start=1)
    ]
    trained, replayed = training_tokens(config, stages, encoder, method=method, engine=engine)
    views = len(method.views(engine.model))
    return Tokens(
        trained=trained,
        replayed=replayed,
        examined={"stream": (views * sum(test_rows) * longest,) * (len(rows) + 1)},
        exact=False,
        answer_length=max(2, longest // 4),
        record=views * 8 * sum(test_rows) * (len(rows) + 1),
    )


def training_operations(tokens: int, *, parameters: int, trainable: int) -> float:
    """Floating-point operations of training: forward 2, activation gradients 2, weight gradients 2 per parameter and token, as the ledger counts."""
    return float(tokens * (4 * parameters + 2 * trainable))


def examination_operations(tokens: int, *, parameters: int) -> float:
    """Floating-point operations of an examination: forward 2 per parameter and token, as the ledger counts."""
    return float(2 * tokens * parameters)
