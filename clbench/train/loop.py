"""Trains one stage: draws the global batch of every step, splits it, and calls the method and the engine in their fixed order."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clbench.config import TrainConfig
from clbench.data.encoder import Encoder
from clbench.data.sampling import draw, seeded
from clbench.protocols import Engine, Method, Stage
from clbench.train.optimizer import factor
from clbench.types import Batch, Example, Reading, Source

CPU_TOKENS = 384
"""Tokens of a forward that keep the CPU busy and in its caches (measured)."""
LOG_EVERY = 10
"""Steps between readings of the loss; reading it makes the host wait for the device, so not every step."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a stage's training did: optimizer steps, tokens read (padding not counted), mean loss of the last steps in nats per answer token.

    `said`: mean log-likelihoods in nats of a few answers, after stage 1 and before the method merged.
    """

    steps: int = 0
    tokens_trained: int = 0
    tokens_replayed: int = 0
    loss: float = math.nan
    said: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The steps of a stage, `total` of them: `steps` on the mixed sources, then one pass over the rows that come after."""

    mixed: tuple[Source, ...] = ()
    after: tuple[Example, ...] = ()
    steps: int = 0
    total: int = 0


def plan_stage(sources: Sequence[Source], config: TrainConfig) -> Plan:
    """How many steps the stage takes on which sources; none without sources."""
    mixed = tuple(source for source in sources if not source.after)
    after = tuple(example for source in sources if source.after for example in source.examples)
    if not mixed:
        return Plan()
    steps = config.steps
    if steps is None:
        assert config.epochs is not None, config
        steps = math.ceil(len(mixed[0].examples) * config.epochs / config.batch_size)
    after_steps = math.ceil(len(after) / config.batch_size) if steps else 0
    return Plan(mixed=mixed, after=after, steps=steps, total=steps + after_steps)


def global_batch(
    plan: Plan, step: int, *, config: TrainConfig, seed: int, stage: int
) -> list[tuple[Example, int, float]]:
    """The rows of optimizer step `step` (from 0): (example, index of its source, weight of its source)."""
    if step < plan.steps:
        return draw(plan.mixed, batch_size=config.batch_size, step=step, seed=seed, stage=stage)
    first = (step - plan.steps) * config.batch_size
    return [(example, len(plan.mixed), 1.0) for example in plan.after[first : first + config.batch_size]]


def train_stage(
    stage: Stage,
    plan: Plan,
    *,
    method: Method,
    engine: Engine,
    encoder: Encoder,
    config: TrainConfig,
    seed: int,
    report: Callable[[int, int, Reading | None], None],
    first: int = 0,
    save: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Runs the stage's steps from `first` on; `report(step, steps, reading)` is called before the first and after each, with the last
    reading (None before there is one), `save(step)` every `checkpoint_steps`.

    Dropout draws from a generator named by the step, so nothing of it needs to be kept. Raises FloatingPointError for a loss that is not finite.
    """
    engine.model.train()
    unread: list[tuple[Tensor, Tensor | float]] = []
    trained = replayed = tokens = 0
    reading, since = None, time.perf_counter()
    report(first, plan.total, reading)
    for step in range(plan.total):
        rows = global_batch(plan, step, config=config, seed=seed, stage=stage.index)
        lengths = [(len(encoder.example(example).ids), source) for example, source, _ in rows]
        trained += sum(length for length, source in lengths if source == 0)
        replayed += sum(length for length, source in lengths if source)
        if step < first:
            continue
        tokens += sum(length for length, _ in lengths)
        with seeded(seed, f"dropout/{step}/{engine.rank}", stage.index):
            unread.append(train_step(rows, method=method, engine=engine, encoder=encoder, config=config))
        if (step + 1) % LOG_EVERY == 0 or step + 1 == plan.total:
            losses, penalties = zip(*unread, strict=True)
            loss, now = float(torch.stack(losses).mean()), time.perf_counter()
            if not math.isfinite(loss):
                raise FloatingPointError(f"step {step + 1} at the latest: the loss is {loss}")
            reading = Reading(
                loss=loss,
                penalty=float(sum(penalties)) / len(penalties),
                learning_rate=config.lr * factor(config, step, steps=plan.total),
                tokens_per_second=tokens / (now - since),
            )
            unread.clear()
            tokens, since = 0, now
        report(step + 1, plan.total, reading)
        if config.checkpoint_steps and (step + 1) % config.checkpoint_steps == 0:
            save(step + 1)
    engine.model.eval()
    loss = reading.loss if reading else math.nan
    return Trained(steps=plan.total, tokens_trained=trained, tokens_replayed=replayed, loss=loss)


def micro_batches(
    rows: list[tuple[Example, int, float]], *, encoder: Encoder, config: TrainConfig, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """This rank's part of a global batch, in the pieces that one forward reads."""
    micro = config.micro_batch_size or len(rows)
    budget = config.micro_batch_tokens or (CPU_TOKENS if encoder.device.type == "cpu" else None)
    return encoder.micro_batches(rows, rows=micro, tokens=budget, rank=rank, world_size=world_size)


def train_step(
    rows: list[tuple[Example, int, float]], *, method: Method, engine: Engine, encoder: Encoder, config: TrainConfig
) -> tuple[Tensor, Tensor | float]:
    """One optimizer step on `rows`; returns its loss in nats per answer token, the method's penalty included, and that penalty."""
    total = torch.zeros((), device=encoder.device)
    for batch in micro_batches(rows, encoder=encoder, config=config, rank=engine.rank, world_size=engine.world_size):
        loss = method.loss(engine.model, batch)
        engine.backward(loss)
        total += loss.detach()
    penalty = method.correct_gradients(engine)
    engine.step()
    method.after_step(engine)
    return engine.total(total) + penalty, penalty
