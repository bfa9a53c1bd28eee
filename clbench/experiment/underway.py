"""A run under way: what it is made of, the training of one of its stages, and what a stage of it cost."""

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import Module

from clbench.config import Config
from clbench.examine.canaries.own_model import said
from clbench.models.loss import causal_lm
from clbench.models.sharding import gathering
from clbench.models.weights import count_parameters, load_trainable_state, trainable
from clbench.protocols import Engine, Parts, Stage
from clbench.record.ledger import Checkpoint, Ledger
from clbench.record.tracking import Tracker
from clbench.train import optimizer as optim
from clbench.train.local import LocalEngine
from clbench.train.loop import Plan, Trained, plan_stage, train_stage
from clbench.train.ranks import Ranks
from clbench.types import Cost, Score, Source


@dataclass(frozen=True, kw_only=True)
class Run(Parts):
    """A run under way. Only the first rank has a ledger. `overlapping`: ids of training examples that a test or probe holds, too.

    `untouched`: what each probe found of the untouched model, where that is known.
    """

    config: Config
    model: Module
    ledger: Ledger | None = None
    ranks: Ranks = field(default_factory=Ranks)
    overlapping: frozenset[str] = frozenset()
    untouched: Mapping[str, Sequence[Score]] = field(default_factory=dict)


def train(
    run: Run, stage: Stage, tracker: Tracker, *, moments: Mapping[str, Tensor], within: Checkpoint | None
) -> tuple[Sequence[Source], Trained, dict[str, Tensor]]:
    """The method's turn: everything between two examinations. Gives what was trained on and the optimizer's state, too."""
    config, method = run.config, run.method
    method.begin_stage(stage, run.model)
    # A memory grows when its stage ends; what was trained on is what it held before.
    sources = [replace(source, examples=tuple(source.examples)) for source in method.training_set(stage)]
    plan = plan_stage(sources, config.train)
    before = within or Checkpoint(stage=stage.index, weights={}, state={}, moments=dict(moments))
    if within:
        re_enter(run, within)
    started = time.perf_counter() - before.seconds
    engine = open_engine(run.model, config, plan, moments=before.moments, done=before.step)
    trained = train_stage(
        stage,
        plan,
        method=method,
        engine=engine,
        encoder=run.encoder,
        config=config.train,
        seed=config.seed,
        report=lambda step, steps, reading: tracker.step(stage, step, steps, reading),
        first=before.step,
        save=lambda step: save_within(run, stage, engine, step=step, seconds=time.perf_counter() - started),
    )
    method.end_stage(stage, engine)
    carried = engine.moments() if config.train.carry_optimizer else {}
    engine.close()
    for name, tensor in trainable(run.model).items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"step {plan.total}: {name} is not finite")
    if stage.index == 1 and method.keeps:
        with gathering(run.model.eval()):
            trained = replace(trained, said=tuple(said(run.model, run.encoder, run.stream)))
    method.consolidate(run.model)
    return sources, trained, carried


def re_enter(run: Run, kept: Checkpoint) -> None:
    """Puts back what a checkpoint holds, the method's state on the model's device."""
    load_trainable_state(run.model, kept.weights)
    device = run.encoder.device
    here = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in kept.state.items()}
    run.method.load_state_dict(here)


def save_within(run: Run, stage: Stage, engine: Engine, *, step: int, seconds: float) -> None:
    """Keeps a stage as it is after `step` steps; every rank takes part, the first one writes."""
    weights = {tensor.name: tensor.value for tensor in engine.tensors()}
    whole = {"weights": weights, "state": run.method.state_dict(), "moments": engine.moments()}
    if run.ledger:
        run.ledger.save(Checkpoint(stage=stage.index, step=step, seconds=seconds, **whole))


def open_engine(
    model: Module, config: Config, plan: Plan, *, moments: Mapping[str, Tensor] | None = None, done: int = 0
) -> Engine:
    """The stage's engine over the tensors that train now, after `done` of its steps. `moments` is what the optimizer starts from."""
    if config.engine.activation_checkpointing:
        causal_lm(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not trainable(model):
        return LocalEngine(model, optimizer=None, schedule=None, clip=0.0)
    moments = optim.fitting(moments or {}, trainable(model))
    optimizer = optim.optimizer(trainable(model), config.train, moments)
    schedule = optim.schedule(optimizer, config.train, steps=plan.total, done=done)
    if config.engine.name == "local":
        return LocalEngine(model, optimizer=optimizer, schedule=schedule, clip=config.train.clip, moments=moments)
    from clbench.train.zero import DeepSpeedEngine

    return DeepSpeedEngine(model, optimizer=optimizer, schedule=schedule, config=config, moments=moments)


def cost_of(run: Run, stage: int, trained: Trained, *, tokens_scored: int, **seconds: float) -> Cost:
    """Counts, seconds and memory of a stage."""
    counts = count_parameters(run.model)
    read = trained.tokens_trained + trained.tokens_replayed
    # Forward 2, activation gradients 2, gradients of trainable weights 2 operations per parameter and token (arXiv 2001.08361).
    operations = read * (4 * counts["parameters"] + 2 * counts["trainable"]) + 2 * tokens_scored * counts["parameters"]
    return Cost(
        stage=stage,
        steps=trained.steps,
        tokens_trained=trained.tokens_trained,
        tokens_replayed=trained.tokens_replayed,
        tokens_scored=tokens_scored,
        seconds_other=0.0,
        trainable_parameters=counts["trainable"],
        peak_memory_bytes=peak_memory(run.encoder.device),
        flops=float(operations),
        joules=float("nan"),
        **seconds,
    )


def peak_memory(device: torch.device) -> int:
    """Highest memory use so far, in bytes: of the accelerator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
