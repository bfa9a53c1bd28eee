"""One run, from a typed configuration to a closed ledger: the stage loop.

The path of a stage, downwards: `run` -> `run_stage` (this file) -> `train` (`underway`) -> `train.loop` -> the method -> the engine; then
`examine` -> the probes -> the student; then the ledger. A kill at any point costs at most the stage it fell into.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from math import isnan
from pathlib import Path

from torch import Tensor
from torch.nn import Module

from clbench.build import build, load_model, set_up_torch, wrap
from clbench.config import Config, run_directory, run_name
from clbench.experiment.examination import (
    check_evaluation,
    check_own_model,
    described,
    examine,
    measure_untouched,
    replay_scores,
    under_views,
)
from clbench.experiment.underway import Run, cost_of, re_enter, train
from clbench.models.lora import check_reached, roles
from clbench.models.sharding import gathering
from clbench.models.weights import trainable, trainable_state
from clbench.progress import Line
from clbench.protocols import Parts, Stage
from clbench.record.forecast import Forecast, seconds_of
from clbench.record.ledger import COMPLETE, DIVERGED, Checkpoint, Ledger, status_of
from clbench.record.tracking import Tracker, written_to
from clbench.record.untouched import Untouched
from clbench.report.standing import standing
from clbench.stream import cut_prompts, said_of
from clbench.train.loop import Trained
from clbench.train.pace import seconds_a_token, tokens_of
from clbench.train.ranks import Ranks
from clbench.types import Cost, Diverged, Score, UserMistake

log = logging.getLogger("clbench")


def run(config: Config, *, command: str = "", ranks: Ranks | None = None) -> Path:
    """Runs (or continues) one experiment to its end; gives its directory. A run that is complete is left alone.

    `command` is what the user typed, for the record. `ranks`: the processes that run it together, each of which calls this.
    """
    set_up_torch(config)
    ranks, path = ranks or Ranks(), run_directory(config)
    working = partial(Line, name=path.name, quiet=not (ranks.is_first and config.tracking.progress))
    parts = ranks.in_turn(lambda: build(config, working=working))  # the first rank fills the cache for the others
    with working("checking the data"):
        data, manifest = described(config, parts, command=command, ranks=ranks)
        cuts = cut_prompts(parts.stream, parts.encoder)
        manifest |= {
            "adapted_layers": roles(parts.adapted),
            "cut_prompts": {name: asdict(cut) for name, cut in cuts.items()},
        }
        status = ranks.share(status_of(path, manifest, resume=config.resume) if ranks.is_first else "")
    if status in (COMPLETE, DIVERGED):
        log.info("%s has %s already", path, {COMPLETE: "been completed", DIVERGED: "diverged"}[status])
        return path
    with working("loading the model"):
        model = loaded(config, parts)
    row = partial(standing, path, by_task=config.tracking.tasks)
    shown = Tracker(config, parts.stream.stages, silent=not ranks.is_first, row=row)
    with written_to(path if ranks.is_first else None), shown as tracker:
        with gathering(model):
            try:
                watch = partial(tracker.examining, 0)
                untouched = measure_untouched(config, parts, model, manifest=manifest, ranks=ranks, watch=watch)
            except FloatingPointError as error:
                raise UserMistake(
                    f"model={parts.source.label} untrained, engine.dtype={config.engine.dtype}: {error}; choose another"
                ) from error
        model = wrap(parts.method, model)
        ledger = None
        if ranks.is_first:
            data.warn()
            for name, cut in cuts.items():
                log.warning("%s", said_of(cut, name, parts.encoder))
            tracker.doing("canaries")
            evaluation = check_evaluation(parts, model)
            begun = manifest | {"canaries": evaluation, "untouched_measured_by": untouched.run}
            ledger = Ledger(path, manifest=begun, keep_all=config.train.checkpoint == "all")
        under_way = {"config": config, "model": model, "ledger": ledger, "ranks": ranks}
        started = Run(**vars(parts), **under_way, overlapping=data.overlapping, untouched=untouched.scores)
        try:
            with ledger or nullcontext():
                run_stages(started, untouched, tracker)
        except Diverged as result:
            log.warning("%s diverged in %s; it keeps the stages before and is not ranked", path.name, result)
        send_outcome(path, tracker)
    return path


def loaded(config: Config, parts: Parts) -> Module:
    """The untouched model; raises UserMistake where the method's layers are computed past."""
    model = load_model(config, parts.source)
    # `wrap` says so, too, but the untouched model is examined before it, for minutes.
    check_reached(model, {name: model.get_submodule(name) for name in parts.adapted})
    return model


def outlook(config: Config) -> Forecast:
    """How long the stages of a run take on this machine. The untouched model is examined for that, which the run then need not do again."""
    set_up_torch(config)
    parts, alone = build(config), Ranks()
    _, manifest = described(config, parts, ranks=alone)
    model = loaded(config, parts)
    untouched = measure_untouched(config, parts, model, manifest=manifest, ranks=alone, watch=lambda *_: None)
    return forecast(Run(**vars(parts), config=config, model=wrap(parts.method, model)), untouched)


def run_stages(run: Run, untouched: Untouched, tracker: Tracker) -> None:
    """Every stage that the ledger does not hold yet, the untouched model first."""
    first = run.ranks.share(run.ledger.finished + 1 if run.ledger else 0)
    moments: dict[str, Tensor] = {}
    within: Checkpoint | None = None
    if first > 0:
        moments, within = go_on(run)
    done = max(first - 1, 0)
    if first == 0:
        record_untouched(run, untouched, tracker)
    tracker.begin(steps=run.ledger.steps if run.ledger else 0)
    tracker.expect(forecast(run, untouched), finished=done)
    for stage in run.stream.stages[done:]:
        moments, cost = run_stage(run, stage, tracker, moments=moments, within=within)
        within = None
        # Now a memory holds rows, and the first stage shows what the method adds.
        if stage.index == 1 < len(run.stream.stages) and (tokens := cost.tokens_trained + cost.tokens_replayed):
            tracker.expect(forecast(run, untouched, pace=cost.seconds_train / tokens), finished=1)


def pace_of_trial(run: Run, untouched: Untouched) -> float:
    """Seconds that training takes for a token, on this machine as it is now; what a method adds is left out."""
    if not trainable(run.model):
        return 0.0
    if run.config.engine.shard_base:
        # A backward pass takes twice as long as a forward, and slices of a model go backward in an engine only.
        return 3 * sum(seconds_of(untouched.rows()).values()) / untouched.tokens
    return seconds_a_token(run.model, run.encoder, run.stream.stages[0].train, run.config.train) / run.ranks.size


def forecast(run: Run, untouched: Untouched, *, pace: float | None = None) -> Forecast:
    """How long the stages will take at `pace` seconds for a token trained (None: by a trial), with the replay that there is by now."""
    config, cadence = run.config.train, run.config.probe.cadence
    each = pace_of_trial(run, untouched) if pace is None else pace
    training = tuple(each * tokens_of(run.method, stage, run.encoder, config) for stage in run.stream.stages)
    views = len(run.method.views(run.model)) - len(run.method.still()) if trainable(run.model) else 0
    examining = seconds_of(untouched.rows())
    left_out = "replay yet to come and what the method adds come" if pace is None else ""
    if pace is not None and any(source.after for source in run.method.training_set(run.stream.stages[-1])):
        left_out = "the replay of further tasks comes"
    return Forecast(training=training, examining=examining, cadence=cadence, views=views, left_out=left_out)


def go_on(run: Run) -> tuple[dict[str, Tensor], Checkpoint | None]:
    """Takes back the last finished stage; gives the optimizer's state after it, and what was kept within the next one."""
    kept = run.ranks.share((run.ledger.load(), run.ledger.load_within()) if run.ledger else None)
    assert kept is not None, "the first rank has the ledger"
    finished, within = kept
    re_enter(run, finished)
    step = f", step {within.step} of the next" if within else ""
    log.info("%s: continuing after stage %d%s", run_name(run.config), finished.stage, step)
    return finished.moments, within


def record_untouched(run: Run, untouched: Untouched, tracker: Tracker) -> None:
    """Stage 0: the untouched model's scores, under the name of each of the method's views."""
    scores = under_views(untouched.rows(), run.method.views(run.model))
    seconds = sum(score.seconds for score in untouched.rows())  # once, however many views
    cost = cost_of(run, 0, Trained(), tokens_scored=untouched.tokens, seconds_train=0.0, seconds_probe=seconds)
    record(run, [*scores, *check_own_model(run, 0)], cost, moments={})
    tracker.stage(0, "base", scores, loss=float("nan"), seconds=seconds)


def run_stage(
    run: Run, stage: Stage, tracker: Tracker, *, moments: Mapping[str, Tensor], within: Checkpoint | None
) -> tuple[dict[str, Tensor], Cost]:
    """Trains, examines and records `stage`; gives the optimizer's state after it, where that is carried, and what the stage cost.

    Raises Diverged, on every rank, where the loss, a trained tensor or what the model says is no longer finite.
    """
    started = time.perf_counter() - (within.seconds if within else 0.0)
    try:
        sources, trained, moments = train(run, stage, tracker, moments=moments, within=within)
        after_training = time.perf_counter()
        examined, tokens = examine(run, stage.index, partial(tracker.examining, stage.index))
        own = check_own_model(run, 1, before=trained.said) if stage.index == 1 else []
    except FloatingPointError as error:
        where = f"stage {stage.index} of {len(run.stream.stages)} ({stage.name})"
        raise Diverged(f"{where}, {error}") from error
    scores = [*replay_scores(run, stage, sources[1:]), *examined, *own]
    cost = cost_of(
        run,
        stage.index,
        trained,
        tokens_scored=sum(run.ranks.gather(tokens)),
        seconds_train=after_training - started,
        seconds_probe=time.perf_counter() - after_training,
    )
    record(run, scores, cost, moments=moments)
    tracker.stage(stage.index, stage.name, scores, loss=trained.loss, seconds=time.perf_counter() - started)
    return moments, cost


def record(run: Run, scores: Sequence[Score], cost: Cost, *, moments: Mapping[str, Tensor]) -> None:
    """Writes a stage to the ledger, on the first rank; the checkpoint, which marks it finished, comes last."""
    started = time.perf_counter()
    # On every rank: it may take all of them to read a weight.
    state = run.method.state_dict()
    if run.ledger is not None:
        run.ledger.append(scores)
        run.ledger.append_cost(replace(cost, seconds_other=time.perf_counter() - started))
        weights = trainable_state(run.model)
        run.ledger.save(Checkpoint(stage=cost.stage, weights=weights, state=state, moments=dict(moments)))
    run.ranks.wait()


def send_outcome(path: Path, tracker: Tracker) -> None:
    """Gives the curves of the run recorded at `path`, if it has any, its measures, score matrix and report; of one that is not ranked,
    the report alone."""
    if not tracker.curves:
        return
    # These take a while to import.
    from clbench.report.html import page
    from clbench.report.summary import of_run

    summary = of_run(path)
    measures = summary.measures.to_dict("index").get(path.name, {})
    found = {
        "measures": {name: value for name, value in measures.items() if not isnan(value)},
        "matrix": summary.matrices[path.name].tolist() if measures else [],
        "stages": [stage.name for stage in tracker.stages],
        "report": page(summary, path.parents[1]),
    }
    for curves in tracker.curves:
        curves.outcome(**found)
