"""One run, from a typed configuration to a closed ledger: the stage loop.

The path of a stage, downwards: `run` -> `run_stage` (this file) -> `train.train_stage` -> the method -> the engine; then `examine` ->
the probes -> the student; then the ledger. A kill at any point costs at most the stage it fell into.
"""

from __future__ import annotations

import logging
import resource
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module

from clbench.build import Run, prepare, set_up_torch
from clbench.config import Config, TrackingConfig, is_due, run_directory, run_name
from clbench.examine.student import Student
from clbench.examine.student_ranks import RankStudent
from clbench.models.architecture import causal_lm
from clbench.models.folding import folded
from clbench.models.sharding import gathering
from clbench.models.weights import describe, load_trainable_state, trainable, trainable_state
from clbench.protocols import Engine, Stage
from clbench.record.ledger import COMPLETE, Checkpoint
from clbench.record.tracking import Tracker
from clbench.train import optimizer as optim
from clbench.train.local import LocalEngine
from clbench.train.loop import Plan, Trained, plan_stage, train_stage
from clbench.train.ranks import Ranks
from clbench.types import Cost, Score, Source

log = logging.getLogger("clbench")


def run(config: Config, *, command: str = "", ranks: Ranks | None = None) -> Path:
    """Runs (or continues) one experiment to its end; gives its directory. A run that is complete is left alone.

    `command` is what the user typed, for the record. `ranks`: the processes that run it together, each of which calls this.
    """
    set_up_torch(config)
    prepared = prepare(config, command=command, ranks=ranks or Ranks())
    ledger, path = prepared.ledger, run_directory(config)
    if prepared.ranks.share(ledger is not None and ledger.status() == COMPLETE):
        if ledger is not None:
            log.info("%s is complete already", path)
        return path
    # A polite kill counts as an interruption, like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ledger or nullcontext():
        run_stages(prepared)
    return path


def run_stages(run: Run) -> None:
    """Every stage that the ledger does not hold yet, the untouched model first."""
    first = run.ranks.share(run.ledger.finished + 1 if run.ledger else 0)
    run.model.eval()
    untouched = student_of(run)
    with gathering(run.model):
        for probe in run.probes:
            probe.begin(untouched)
    if first > 0:
        go_on(run)
    with open_tracker(run, first=max(first - 1, 0)) as tracker:
        if first == 0:
            run_stage(run, None, tracker)
        for stage in run.stream.stages[max(first - 1, 0) :]:
            run_stage(run, stage, tracker)


def go_on(run: Run) -> None:
    """Takes back the last finished stage, and whatever of the next was kept."""
    finished, run.within = run.ranks.share((run.ledger.load(), run.ledger.load_within()) if run.ledger else None)
    load_trainable_state(run.model, finished.weights)
    run.method.load_state_dict(finished.state)
    run.moments = finished.moments
    step = f", step {run.within.step} of the next" if run.within else ""
    log.info("%s: continuing after stage %d%s", run_name(run.config), finished.stage, step)


def open_tracker(run: Run, *, first: int) -> Tracker:
    """What a person sees, on the first rank; the others follow the run in silence."""
    return Tracker(
        run.config.tracking if run.ranks.is_first else TrackingConfig(progress=False),
        run=run_name(run.config),
        stages=run.stream.stages,
        manifest={"config": asdict(run.config), "results_dir": run.config.results_dir},
        first=first,
    )


def run_stage(run: Run, stage: Stage | None, tracker: Tracker) -> None:
    """Trains and examines `stage` (None: the untouched model); the first rank records, and last of all marks it finished."""
    started = time.perf_counter() - (run.within.seconds if run.within else 0.0)
    index, name = (stage.index, stage.name) if stage else (0, "base")
    trained = Trained(steps=0, tokens_trained=0, tokens_replayed=0, loss=float("nan"))
    replay: list[Score] = []
    if stage:
        sources, trained = train(run, stage, tracker)
        replay = replay_scores(run, stage, sources[1:])
    after_training = time.perf_counter()
    examined, tokens = examine(run, index)
    scores = [*replay, *examined]
    tokens_scored = sum(run.ranks.gather(tokens))
    after_probes = time.perf_counter()
    # On every rank: it may take all of them to read a weight.
    state = run.method.state_dict()
    if run.ledger is None:
        return run.ranks.wait()
    run.ledger.append(scores)
    counts = describe(run.model)
    read = trained.tokens_trained + trained.tokens_replayed
    cost = Cost(
        stage=index,
        steps=trained.steps,
        tokens_trained=trained.tokens_trained,
        tokens_replayed=trained.tokens_replayed,
        tokens_scored=tokens_scored,
        seconds_train=after_training - started,
        seconds_probe=after_probes - after_training,
        seconds_other=0.0,
        trainable_parameters=counts["trainable"],
        peak_memory_bytes=peak_memory(run.encoder.device),
        # Forward 2, activation gradients 2, gradients of trainable weights 2 operations per parameter and token (arXiv 2001.08361).
        flops=float(
            read * (4 * counts["parameters"] + 2 * counts["trainable"]) + 2 * tokens_scored * counts["parameters"]
        ),
        joules=float("nan"),
    )
    run.ledger.append_cost(replace(cost, seconds_other=time.perf_counter() - after_probes))
    whole = {"weights": trainable_state(run.model), "state": state, "moments": run.moments}
    run.ledger.save(Checkpoint(stage=index, **whole))
    tracker.stage(index, name, scores, loss=trained.loss, seconds=time.perf_counter() - started)
    run.ranks.wait()


def train(run: Run, stage: Stage, tracker: Tracker) -> tuple[Sequence[Source], Trained]:
    """The method's turn: everything between two examinations. Gives what was trained on, too."""
    config, method = run.config, run.method
    method.begin_stage(stage, run.model)
    # A memory grows when its stage ends; what was trained on is what it held before.
    sources = [replace(source, examples=tuple(source.examples)) for source in method.training_set(stage)]
    plan = plan_stage(sources, config.train)
    before = re_enter(run) if run.within else Checkpoint(stage=stage.index, weights={}, state={}, moments=run.moments)
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
        report=lambda step, steps, loss: tracker.step(stage, step, steps, loss),
        first=before.step,
        save=lambda step: save_within(run, stage, engine, step=step, seconds=time.perf_counter() - started),
    )
    method.end_stage(stage, engine)
    run.moments = engine.moments() if config.train.carry_optimizer else {}
    engine.close()
    method.consolidate(run.model)
    return sources, trained


def re_enter(run: Run) -> Checkpoint:
    """Puts back what a stage that has just begun was in the middle of."""
    before, run.within = run.within, None
    assert before is not None
    load_trainable_state(run.model, before.weights)
    device = run.encoder.device
    here = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in before.state.items()}
    run.method.load_state_dict(here)
    return before


def save_within(run: Run, stage: Stage, engine: Engine, *, step: int, seconds: float) -> None:
    """Keeps a stage as it is after `step` steps; every rank gives its part, the first one writes."""
    weights = {tensor.name: tensor.value for tensor in engine.tensors()}
    whole = {"weights": weights, "state": run.method.state_dict(), "moments": engine.moments()}
    if run.ledger:
        run.ledger.save(Checkpoint(stage=stage.index, step=step, seconds=seconds, **whole))


def replay_scores(run: Run, stage: Stage, memory: Sequence[Source]) -> list[Score]:
    """How much of the replayed memory is also in a test or probe: a count of distinct examples; nothing without replay."""
    replayed = {example.id for source in memory for example in source.examples}
    if not replayed:
        return []
    shared = len(replayed & run.overlapping)
    return [
        Score(
            stage=stage.index,
            stage_name=stage.name,
            probe="data",
            task="replay",
            metric="test_or_probe_overlap",
            value=float(shared),
            n=len(replayed),
            stderr=float("nan"),
            seconds=0.0,
        )
    ]


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


def student_of(run: Run) -> Student:
    """The model as it stands. Ranks share its requests, unless they hold slices of the base and make every forward together."""
    if run.ranks.size > 1 and not run.config.engine.shard_base:
        return RankStudent(run.model, run.encoder, ranks=run.ranks)
    return Student(run.model, run.encoder)


def examine(run: Run, index: int) -> tuple[list[Score], int]:
    """Every probe on every view of the model, and the tokens that were read; a secondary view's probes are named `probe@view`."""
    run.model.eval()
    scores, tokens = [], 0
    last = len(run.stream.stages)
    due = [probe for probe in run.probes if is_due(run.config.probe.cadence.get(probe.name, "all"), index, last)]
    for number, (view, weights) in enumerate(run.method.views(run.model).items()):
        with weights, folded(run.model) if number == 0 else nullcontext(), gathering(run.model):
            student = student_of(run)
            for probe in due:
                for score in probe.measure(student, run.stream, index):
                    scores.append(score if number == 0 else replace(score, probe=f"{score.probe}@{view}"))
            tokens += student.tokens_scored
    return scores, tokens


def peak_memory(device: torch.device) -> int:
    """Highest memory use so far, in bytes: of the accelerator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
