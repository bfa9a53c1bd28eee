"""One run, from a typed configuration to a closed ledger: the stage loop.

The path of a stage, downwards: `run` -> `run_stage` (this file) -> `train.train_stage` -> the method -> the engine; then `examine` ->
the probes -> the student; then the ledger. A kill at any point costs at most the stage it fell into.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import transformers
from hydra.utils import instantiate
from torch.nn import Module

from clbench import optim
from clbench.adapters import describe, folded, load_trainable_state, seeded, trainable, trainable_state
from clbench.config import Config, TrackingConfig, is_due, run_directory, run_name
from clbench.data import Encoder
from clbench.engine import LocalEngine
from clbench.ledger import COMPLETE, Ledger
from clbench.manifest import data_contract, manifest
from clbench.parts import make_method, make_probes, make_tasks
from clbench.protocols import Engine, Method, Probe
from clbench.stream import Stream, build_stream
from clbench.student import Student
from clbench.tracking import Tracker
from clbench.train import Plan, Trained, plan_stage, train_stage
from clbench.types import Cost, Score, Source, Stage
from clbench.world import World

log = logging.getLogger("clbench")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True)
class Run:
    """Everything a run is made of, complete after `prepare`. `overlapping`: ids of training examples that a test or probe holds, too.

    Only the first rank of the world examines and writes: elsewhere there are no probes and no ledger.
    """

    config: Config
    method: Method
    model: Module
    stream: Stream
    probes: tuple[Probe, ...]
    encoder: Encoder
    ledger: Ledger | None
    overlapping: frozenset[str] = frozenset()
    world: World = field(default_factory=World)


def run(config: Config, *, command: str = "", world: World | None = None) -> Path:
    """Runs (or continues) one experiment to its end; gives its directory. A run that is complete is left alone.

    `command` is what the user typed, for the record. `world`: the processes that run it together, each of which calls this.
    """
    set_up_torch(config)
    prepared = prepare(config, command=command, world=world or World())
    ledger, path = prepared.ledger, run_directory(config)
    if prepared.world.share(ledger is not None and ledger.status() == COMPLETE):
        if ledger is not None:
            log.info("%s is complete already", path)
        return path
    # A polite kill counts as an interruption, like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ledger or nullcontext():
        run_stages(prepared)
    return path


def set_up_torch(config: Config) -> None:
    """Threads, and warnings of libraries that say nothing a user can act on."""
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # transformers asks deepspeed, which warns when it has to find out for itself
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def prepare(config: Config, *, command: str, world: World) -> Run:
    """Builds what the configuration names and opens the ledger. The first rank goes first and fills the cache for the others."""
    if not world.is_first:
        world.wait()
    prepared = build(config, command=command, world=world)
    if world.is_first:
        world.wait()
    return prepared


def build(config: Config, *, command: str, world: World) -> Run:
    """As `prepare`, for one rank."""
    source = instantiate(config.model)
    model, tokenizer = source.load(Path(config.cache_dir))
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if config.engine.device == "auto" else config.engine.device
    )
    model.to(device=device, dtype=DTYPES[config.engine.dtype])
    token_dirs = [Path(folder) / "tokens" for folder in (config.data_dir, config.cache_dir) if folder is not None]
    encoder = Encoder(tokenizer, max_length=config.train.max_length, device=device, token_dirs=token_dirs)
    tasks = make_tasks(config)
    stream = build_stream(config.stream, order=config.order, tasks=tasks, encoder=encoder)
    probes, ledger, overlapping = (), None, frozenset()
    if world.is_first:
        probes = make_probes(config)
        contract, overlapping = data_contract(config, stream, probes, encoder)
        named = {"model_label": source.label, "fingerprint": source.fingerprint(), "command": command}
        ledger = Ledger(
            run_directory(config), manifest=manifest(config, stream, **named) | contract, resume=config.resume
        )
    method = make_method(config)
    return Run(
        config=config,
        method=method,
        model=method.wrap(model),
        stream=stream,
        probes=probes,
        encoder=encoder,
        ledger=ledger,
        overlapping=overlapping,
        world=world,
    )


def run_stages(run: Run) -> None:
    """Every stage that the ledger does not hold yet, the untouched model first."""
    first = run.world.share(run.ledger.finished + 1 if run.ledger else 0)
    run.model.eval()
    for probe in run.probes:
        probe.begin(Student(run.model, run.encoder))
    if first > 0:
        weights, state = run.world.share(run.ledger.load() if run.ledger else ({}, {}))
        load_trainable_state(run.model, weights)
        run.method.load_state_dict(state)
        if run.ledger:
            log.info("%s: continuing after stage %d", run.ledger.path.name, first - 1)
    with open_tracker(run, first=max(first - 1, 0)) as tracker:
        if first == 0:
            run_stage(run, None, tracker)
        for stage in run.stream.stages[max(first - 1, 0) :]:
            run_stage(run, stage, tracker)


def open_tracker(run: Run, *, first: int) -> Tracker:
    """What a person sees, on the first rank; the others follow the run in silence."""
    return Tracker(
        run.config.tracking if run.world.is_first else TrackingConfig(progress=False),
        run=run_name(run.config),
        stages=run.stream.stages,
        manifest={"config": asdict(run.config), "results_dir": run.config.results_dir},
        first=first,
    )


def run_stage(run: Run, stage: Stage | None, tracker: Tracker) -> None:
    """Trains `stage` (None: the untouched model); then the first rank examines, records, and last of all marks it finished."""
    started = time.perf_counter()
    index, name = (stage.index, stage.name) if stage else (0, "base")
    trained = Trained(steps=0, tokens_trained=0, tokens_replayed=0, loss=float("nan"))
    replay: list[Score] = []
    if stage:
        sources, trained = train(run, stage, tracker)
        replay = replay_scores(run, stage, sources[1:])
    if run.ledger is None:
        return run.world.wait()
    after_training = time.perf_counter()
    student = Student(run.model, run.encoder)
    scores = [*replay, *examine(run, student, index)]
    after_probes = time.perf_counter()
    run.ledger.append(scores)
    counts = describe(run.model)
    tokens = trained.tokens_trained + trained.tokens_replayed
    cost = Cost(
        stage=index,
        steps=trained.steps,
        tokens_trained=trained.tokens_trained,
        tokens_replayed=trained.tokens_replayed,
        tokens_scored=student.tokens_scored,
        seconds_train=after_training - started,
        seconds_probe=after_probes - after_training,
        seconds_other=0.0,
        trainable_parameters=counts["trainable"],
        peak_memory_bytes=peak_memory(run.encoder.device),
        # Forward 2, activation gradients 2, gradients of trainable weights 2 operations per parameter and token (arXiv 2001.08361).
        flops=float(
            tokens * (4 * counts["parameters"] + 2 * counts["trainable"])
            + 2 * student.tokens_scored * counts["parameters"]
        ),
        joules=float("nan"),
    )
    run.ledger.append_cost(replace(cost, seconds_other=time.perf_counter() - after_probes))
    run.ledger.save(index, weights=trainable_state(run.model), state=run.method.state_dict())
    tracker.stage(index, name, scores, loss=trained.loss, seconds=time.perf_counter() - started)
    run.world.wait()


def train(run: Run, stage: Stage, tracker: Tracker) -> tuple[Sequence[Source], Trained]:
    """The method's turn: everything between two examinations. Gives what was trained on, too."""
    config, method = run.config, run.method
    method.begin_stage(stage, run.model)
    sources = method.training_set(stage)
    plan = plan_stage(sources, config.train)
    engine = open_engine(run.model, config, plan)
    with seeded(config.seed, "dropout", stage.index):
        trained = train_stage(
            stage,
            plan,
            method=method,
            engine=engine,
            encoder=run.encoder,
            config=config.train,
            seed=config.seed,
            report=lambda step, steps, loss: tracker.step(stage, step, steps, loss),
        )
    method.end_stage(stage, engine)
    engine.close()
    method.consolidate(run.model)
    return sources, trained


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


def open_engine(model: Module, config: Config, plan: Plan) -> Engine:
    """The stage's engine: a fresh optimizer and schedule over the tensors that train now."""
    if not trainable(model):
        return LocalEngine(model, optimizer=None, schedule=None, clip=0.0)
    optimizer = optim.optimizer(trainable(model).values(), config.train)
    schedule = optim.schedule(optimizer, config.train, steps=plan.total)
    if config.engine.name == "local":
        return LocalEngine(model, optimizer=optimizer, schedule=schedule, clip=config.train.clip)
    from clbench.engine_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(
        model,
        optimizer=optimizer,
        schedule=schedule,
        clip=config.train.clip,
        zero_stage=config.engine.zero_stage,
        extra=config.engine.deepspeed,
    )


def examine(run: Run, student: Student, index: int) -> Iterator[Score]:
    """Every probe on every view of the model; a secondary view's probes are named `probe@view`."""
    run.model.eval()
    last = len(run.stream.stages)
    due = [probe for probe in run.probes if is_due(run.config.probe.cadence.get(probe.name, "all"), index, last)]
    for number, (view, weights) in enumerate(run.method.views(run.model).items()):
        with weights, folded(run.model) if number == 0 else nullcontext():
            for probe in due:
                for score in probe.measure(student, run.stream, index):
                    yield score if number == 0 else replace(score, probe=f"{score.probe}@{view}")


def peak_memory(device: torch.device) -> int:
    """Highest memory use so far, in bytes: of the accelerator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
