"""How a run is described and examined: data, manifest, probes on every view of its model, canaries, and the untouched model, which runs share."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.nn import Module

from clbench.config import Config, identity, is_due
from clbench.data.encoder import Encoder
from clbench.examine.canaries import check_stream
from clbench.examine.canaries.own_model import LONGEST, bounds, check_model
from clbench.examine.scores import Found
from clbench.examine.scores import scores as rows_of
from clbench.examine.student import Report, Student
from clbench.examine.together import reads_together
from clbench.experiment.underway import Run
from clbench.models.folding import folded
from clbench.models.sharding import gathering
from clbench.models.weights import trainable
from clbench.protocols import Parts, Probe, Stage
from clbench.record.manifest import describe, failed_canaries, versions
from clbench.record.overlaps import DataCheck, check_data
from clbench.record.runs import CANARIES, FAILED
from clbench.record.untouched import Untouched, find, keep, kept_at, source_hash
from clbench.train.ranks import Ranks
from clbench.types import FLOORS, Score, Source

log = logging.getLogger("clbench")
Watch = Callable[[str, str, str, int, int], None]
"""Hears of a view, a probe and a task how many requests are answered, and of how many."""


def described(config: Config, parts: Parts, *, command: str = "", ranks: Ranks) -> tuple[DataCheck, dict[str, Any]]:
    """What was found in the data, and the manifest of a run but for what it finds itself."""
    general, allowed = parts.method.documents(), config.probe.allow_overlap
    data = check_data(parts.stream, parts.probes, allow_overlap=allowed, general=general)
    manifest = describe(config, parts.stream, command=command) | data.record
    return data, manifest | ranks.share(parts.source.record(Path(config.cache_dir)) if ranks.is_first else {})


def check_evaluation(parts: Parts, model: Module) -> dict[str, Any]:
    """What the manifest says of the canaries; a run with a failed one is not ranked. `untried`: the model's bounds beyond what they read."""
    found = [asdict(canary) for canary in check_stream(parts.stream, parts.encoder)]
    failed = failed_canaries(found)
    if failed:
        log.warning("the run will not be ranked, its evaluation failed its own tests: %s", "; ".join(failed))
    _, untried = bounds(model, parts.encoder)
    if reached := [str(bound) for bound in untried if bound <= parts.encoder.max_length]:
        log.warning("the canaries read %d tokens at most: rows at %s tokens are not tried", LONGEST, ", ".join(reached))
    return {"checked": len(found), "failed": failed, "results": found, "untried": untried}


def measure_untouched(
    config: Config, parts: Parts, model: Module, *, manifest: Mapping[str, Any], ranks: Ranks, watch: Watch
) -> Untouched:
    """The untouched model's scores: those that another run has measured, or else measured now and kept for others.

    Before that it is tried out whether the model reads several rows as one, which the encoder is told.
    """
    # Ranks that disagreed would make other forwards than each other.
    parts.encoder.together = ranks.share(reads_together(model, parts.encoder))
    if not parts.encoder.together:
        log.info("sequences are read one at a time: in one forward this model gives them other scores")
    student = student_of(config, model, parts.encoder, ranks, report=partial(watch, "model"))
    for probe in parts.probes:
        probe.begin(student)
    settings = identity(manifest["config"])
    shared = ("engine.", "order", "prompt", "stream", "tasks", "probe", "train.max_length", "train.cut")
    depends_on = {key: value for key, value in settings.items() if key.startswith(shared)}
    depends_on |= {key: manifest[key] for key in ("model_fingerprint", "data", "probe_data", "hardware")}
    depends_on["versions"] = versions()  # without that of the method's package
    depends_on["source"] = source_hash([*(stage.task for stage in parts.stream.stages), *parts.probes])
    path = kept_at(Path(config.cache_dir), depends_on)
    kept = ranks.share(find(path) if ranks.is_first else None)
    if kept is not None:
        return kept
    scores = {probe.name: tuple(probe.measure(student, parts.stream, 0)) for probe in parts.probes}
    tokens = sum(ranks.gather(student.tokens_scored))
    measured = Untouched(run=manifest["run"], tokens=tokens, scores=scores)
    if ranks.is_first:
        keep(path, measured)
    return measured


def under_views(scores: Sequence[Score], views: Iterable[str]) -> list[Score]:
    """The same scores under the name of each of a method's views, the first of which is the primary one."""
    _, *others = views
    return [*scores, *(replace(score, probe=f"{score.probe}@{view}") for view in others for score in scores)]


def replay_scores(run: Run, stage: Stage, memory: Sequence[Source]) -> list[Score]:
    """How much of the replayed memory is also in a test or probe: a count of distinct examples; nothing without replay."""
    replayed = {example.id for source in memory for example in source.examples}
    if not replayed:
        return []
    found = {"test_or_probe_overlap": Found(float(len(replayed & run.overlapping)), len(replayed))}
    return list(rows_of(found, stream=run.stream, stage=stage.index, probe="data", task="replay", seconds=0.0))


def student_of(config: Config, model: Module, encoder: Encoder, ranks: Ranks, *, report: Report) -> Student:
    """The model under examination. Ranks share its requests, unless they hold slices of the base and make every forward together."""
    return Student(model, encoder, ranks=Ranks() if config.engine.shard_base else ranks, report=report)


def examine(run: Run, index: int, watch: Watch) -> tuple[list[Score], int]:
    """Every probe on every view of the model, and the tokens that were read; a secondary view's probes are named `probe@view`."""
    run.model.eval()
    scores, tokens = [], 0
    last, cadence = len(run.stream.stages), run.config.probe.cadence
    due = [probe for probe in run.probes if is_due(cadence.get(probe.name, "all"), index, last)]
    for number, (view, weights) in enumerate(run.method.views(run.model).items()):
        with weights, folded(run.model) if number == 0 else nullcontext(), gathering(run.model):
            student = student_of(run.config, run.model, run.encoder, run.ranks, report=partial(watch, view))
            for probe in due:
                found = measure(run, probe, view, student, index)
                scores += [replace(score, probe=f"{score.probe}@{view}") if number else score for score in found]
            tokens += student.tokens_scored
    return scores, tokens


def measure(run: Run, probe: Probe, view: str, student: Student, index: int) -> list[Score]:
    """What `probe` finds after stage `index`.

    A model of which nothing trains, and a view on which training has no effect (`Method.still`), is the untouched model, which is not read again.
    """
    if probe.name in run.untouched and (not trainable(run.model) or view in run.method.still()):
        where = {"stage": index, "stage_name": run.stream.stage_name(index), "seconds": 0.0}
        return [replace(score, **where) for score in run.untouched[probe.name] if score.metric not in FLOORS]
    return list(probe.measure(student, run.stream, index))


def check_own_model(run: Run, index: int, *, before: Sequence[float] = ()) -> list[Score]:
    """How far the run's fast forwards are from plain ones, of the model as it is now; a run with a gap is not ranked.

    `before`: what it said before the method merged.
    """
    started = time.perf_counter()
    view, *_ = run.method.views(run.model).values()
    with view, gathering(run.model):
        student = Student(run.model, run.encoder)
        gaps = check_model(student, run.stream, folded=folded(run.model), before=before)
    for gap in gaps:
        if gap.failed:
            log.warning("the run will not be ranked: %s is %.1e nats a token off plain forwards", gap.name, gap.nats)
    where = {"stage": index, "stage_name": run.stream.stage_name(index), "probe": CANARIES, "stderr": float("nan")}
    seconds = (time.perf_counter() - started) / (3 * len(gaps))
    return [
        Score(**where, task=gap.name, metric=metric, value=float(value), n=gap.n, seconds=seconds)
        for gap in gaps
        for metric, value in (("gap_nats", gap.nats), ("allowed_nats", gap.allowed), (FAILED, gap.failed))
    ]
