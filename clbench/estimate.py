"""What an experiment will cost, before it costs it: parameters, tokens, floating-point operations, hours.

Parameters are counted on a model without storage, built from the architecture that the model's yaml states. Tokens are counted by tokenising
the rows and by letting every probe score a model that only counts; where rows or tokenizer cannot be had, every sequence counts as long as
`train.max_length` allows, and the number is an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module
from transformers import AutoModelForCausalLM, PretrainedConfig, StoppingCriteriaList

from clbench.config import Config, is_due
from clbench.data import Encoder
from clbench.protocols import Probe
from clbench.stream import Stream
from clbench.student import Ids, Student
from clbench.train import global_batch, plan_stage
from clbench.types import Source

# Dense bfloat16 peak of one device, in floating-point operations a second, from the makers' data sheets.
GPUS = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "l40s": 362e12, "rtx4090": 165e12}


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens that each stage trains on and that each examination reads or writes; `exact`: counted, not assumed.

    Only written answers are assumed even then: each as long as it may be.
    """

    trained: tuple[int, ...]
    examined: tuple[int, ...]
    exact: bool


def meta_model(configuration: PretrainedConfig) -> Module:
    """The model of that configuration on the meta device: shapes without storage."""
    with torch.device("meta"):
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
        """Counts each row once, as the real one reads it."""
        grouped = self._grouped(requests)
        self.tokens_scored += sum(len(ids) for ids, _ in grouped)
        return [(0.0, False)] * len(requests)

    def write(
        self, rows: Sequence[Ids], *, max_new_tokens: int, stopping: StoppingCriteriaList | None = None
    ) -> list[list[int]]:
        """Counts every row and as many tokens as may be written."""
        self.tokens_scored += sum(map(len, rows)) + len(rows) * max_new_tokens
        return [[] for _ in rows]

    def next_log_probs(self, contexts: Sequence[Ids]) -> Tensor:
        """Counts every context."""
        self.tokens_scored += sum(map(len, contexts))
        return torch.zeros(len(contexts), 1)


def count_tokens(
    config: Config, stream: Stream, probes: Sequence[Probe], encoder: Encoder, *, positions: int
) -> Tokens:
    """The tokens of a stream whose rows are there, as SEQ draws them, replay not included, and what the probes ask for."""
    trained = []
    for stage in stream.stages:
        plan = plan_stage([Source(examples=stage.train)], config.train)
        batches = (
            global_batch(plan, step, config=config.train, seed=config.seed, stage=stage.index)
            for step in range(plan.total)
        )
        trained.append(sum(len(encoder.example(example).ids) for batch in batches for example, _, _ in batch))
    last = len(stream.stages)
    for probe in probes:
        probe.begin(Counter(encoder, positions=positions))
    examined = []
    for index in range(last + 1):
        counter = Counter(encoder, positions=positions)
        for probe in probes:
            if is_due(config.probe.cadence.get(probe.name, "all"), index, last):
                for _ in probe.measure(counter, stream, min(index, 1)):
                    pass
        examined.append(counter.tokens_scored)
    return Tokens(trained=tuple(trained), examined=tuple(examined), exact=True)


def bound_tokens(config: Config, rows: Sequence[int], test_rows: Sequence[int]) -> Tokens:
    """Tokens when neither rows nor tokenizer can be had: every sequence as long as it may be, one per test row; probes are not counted."""
    longest = config.train.max_length
    plans = (plan_stage([Source(examples=range(count))], config.train) for count in rows)
    trained = tuple(plan.total * config.train.batch_size * longest for plan in plans)
    return Tokens(trained=trained, examined=(sum(test_rows) * longest,) * (len(rows) + 1), exact=False)


def operations(tokens: Tokens, *, parameters: int, trainable: int) -> tuple[float, float]:
    """Floating-point operations of training and of examination: forward 2, activation gradients 2, weight gradients 2 per parameter and token."""
    trained, examined = sum(tokens.trained), sum(tokens.examined)
    return float(trained * (4 * parameters + 2 * trainable)), float(2 * examined * parameters)
