"""What is done with a recorded run: its model as it was after a stage, and what that gives on other probes."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from torch.nn import Module

from clbench.build import build, check_classes, load_model, make_method, set_up_torch, wrap
from clbench.config import Config, EngineConfig, from_plain, probe_hash
from clbench.config.checks import writing
from clbench.config.composition import with_probes
from clbench.config.secrets import masked
from clbench.experiment.examination import described, examine, measure_untouched, under_views
from clbench.experiment.underway import Run
from clbench.models.weights import load_trainable_state
from clbench.progress import Line
from clbench.protocols import Method, Parts
from clbench.record import examined
from clbench.record.ledger import KEPT, STAGE, read_checkpoint, read_manifest
from clbench.record.runs import replace_file
from clbench.train.ranks import Ranks
from clbench.types import Score, UserMistake

log = logging.getLogger("clbench")
ASKED = ("git", "versions", "hardware", "command", "probe_data", "overlaps", "trained_probes", "model_fingerprint")
"""What an examination says of itself as a run's manifest does."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A run's record at `path`, to be gone on with in one process, whatever the run had.

    `config` says so, `source` has its model, `checkpoints` are those of its finished stages that are kept, by stage.
    """

    path: Path
    manifest: Mapping[str, Any]
    config: Config
    source: Any
    checkpoints: Mapping[int, Path]

    def stages(self, stage: int | None) -> list[int]:
        """The stages that are kept, or `stage` alone; raises UserMistake where that is not."""
        if stage is None or stage in self.checkpoints:
            return sorted(self.checkpoints) if stage is None else [stage]
        kept = ", ".join(map(str, sorted(self.checkpoints)))
        raise UserMistake(f"{self.path} has not kept stage={stage}, but {kept}; train.checkpoint=all keeps every stage")


def recorded(path: Path, *, cache_dir: Path | None = None) -> Recorded:
    """The run at `path`. Raises UserMistake where it has no finished stage, or its model or tokenizer is another one now.

    `cache_dir`: where a model that was pretrained here is kept, if not where the run had it.
    """
    if not (path / "manifest.json").is_file():
        raise UserMistake(f"{path} holds no run; name its directory, results_dir/runs/NAME")
    path = path.resolve()
    manifest = read_manifest(path)
    config = from_plain(manifest["config"])
    engine = EngineConfig(dtype=config.engine.dtype, threads=config.engine.threads)
    places = {"results_dir": str(path.parent.parent), "cache_dir": str(cache_dir or config.cache_dir)}
    tasks = {name: config.tasks[name] for name in config.stream.tasks}  # a manifest's keys are sorted
    config = replace(config, engine=engine, tasks=tasks, **places)
    set_up_torch(config)
    check_classes(config)
    source = instantiate(config.model, _convert_="all")
    if source.record(Path(config.cache_dir))["model_fingerprint"] != manifest["model_fingerprint"]:
        name = config.model.get("name")
        raise UserMistake(f"model.name={name!r} is not the model that {path.name} trained; restore it")
    last = path / "checkpoint" / STAGE
    stage = read_checkpoint(last, run=manifest["run"]).stage if last.is_file() else 0
    if not stage:
        raise UserMistake(f"{path} has no checkpoint of a finished stage; run it")
    kept = {number: path / "checkpoint" / KEPT.format(number) for number in range(1, stage)}
    checkpoints = {number: file for number, file in kept.items() if file.is_file()} | {stage: last}
    return Recorded(path=path, manifest=manifest, config=config, source=source, checkpoints=checkpoints)


def restored(run: Recorded, stage: int, model: Module) -> tuple[Method, Module]:
    """The run's method and model as they were after a stage that is kept, of the untouched `model`."""
    kept, method = read_checkpoint(run.checkpoints[stage], run=run.manifest["run"]), make_method(run.config)
    model = wrap(method, model)
    load_trainable_state(model, kept.weights)
    method.load_state_dict(kept.state)
    return method, model


@dataclass(kw_only=True)
class Showing:
    """The live line of an examination."""

    line: Line
    asked: tuple[Any, ...] = ()

    def __call__(self, stage: int, view: str, probe: str, task: str, done: int, of: int) -> None:
        if self.asked != (stage, view, probe, task):
            self.asked = stage, view, probe, task
            self.line.begin(of, done=done)
        self.line.show(done, f"stage {stage}, examining: {probe} {task}  {done}/{of}")


def examine_again(
    path: Path,
    overrides: Sequence[str],
    *,
    stage: int | None = None,
    cache_dir: Path | None = None,
    config_dir: Path | None = None,
    command: str = "",
) -> Path:
    """Examines the kept stages of the run at `path`, and its untouched model, with the probes that `overrides` name; gives the record of that.

    `stage`: that one alone. What has been examined so before is left alone; nothing is trained.
    """
    run = recorded(path, cache_dir=cache_dir)
    path = run.path
    wanted = [0, *run.stages(stage)]
    choice, config = with_probes(run.config, overrides, config_dir=config_dir)
    working = partial(Line, name=path.name, quiet=not config.tracking.progress)
    parts = build(config, working=working)
    _, manifest = described(config, parts, command=command, ranks=Ranks())
    if manifest["data"] != run.manifest["data"]:
        raise UserMistake(f"the stream's rows are not those that {path.name} was trained on; restore them")
    manifest |= {"run": run.manifest["run"]}
    asked = {key: manifest[key] for key in ASKED} | {"probe": masked(asdict(config.probe)), "sources": config.sources}
    name = f"{examined.FOLDER}/{choice.replace('/', '-')}-{probe_hash(asdict(config))}.jsonl"
    lines = examined_before(path, name, run=manifest["run"], probe_data=manifest["probe_data"])
    left = sorted({*wanted} - {line["stage"] for line in lines})
    with working("loading the model") as shown:
        for index, scores in examinations(run, config, parts, stages=left, manifest=manifest, shown=shown):
            lines.append(examined.line(scores, run=manifest["run"], stage=index, asked=asked))
            with writing(path):
                (path / examined.FOLDER).mkdir(exist_ok=True)
            replace_file(path / name, examined.written(lines, file=name))
            seconds = sum(score.seconds for score in scores)
            shown.say(f"{path.name}  stage {index} {parts.stream.stage_name(index)} is examined  {seconds:.1f} s")
    return path / name


def examined_before(path: Path, name: str, *, run: str, probe_data: Mapping[str, Any]) -> list[examined.Line]:
    """The stages that the examination `name` of the run at `path` holds; raises UserMistake where they are damaged, or measured on other rows."""
    if not (path / name).is_file():
        return []
    try:
        lines = examined.read({name: (path / name).read_bytes()}, file=name, run=run)
    except (ValueError, KeyError, TypeError) as error:
        raise UserMistake(f"{path / name} is damaged ({error}); restore it, or remove it to examine again") from error
    if lines[-1]["asked"]["probe_data"] != probe_data:
        raise UserMistake(f"{path / name} is of other rows; restore them, or remove it to examine again")
    return lines


def examinations(
    run: Recorded, config: Config, parts: Parts, *, stages: Sequence[int], manifest: Mapping[str, Any], shown: Line
) -> Iterator[tuple[int, list[Score]]]:
    """The scores of each of `stages` with the probes of `parts`; 0 is the untouched model, which the probes see first in any case."""
    if not stages:
        return
    showing = Showing(line=shown)
    model = load_model(config, run.source)
    untouched = measure_untouched(config, parts, model, manifest=manifest, ranks=Ranks(), watch=partial(showing, 0))
    if 0 in stages:
        yield 0, under_views(untouched.rows(), parts.method.views(wrap(parts.method, model)))
    del model  # one at a time
    for stage in stages:
        if stage:
            yield stage, scores_after(run, stage, config, parts, showing)


def scores_after(run: Recorded, stage: int, config: Config, parts: Parts, showing: Showing) -> list[Score]:
    """What the model of a stage gives, on each of its views. It is loaded anew, as a method may have merged what cannot be taken out again."""
    method, model = restored(run, stage, load_model(config, run.source))
    again = Run(**vars(replace(parts, method=method)), config=config, model=model)
    try:
        return examine(again, stage, partial(showing, stage))[0]
    except FloatingPointError as error:
        raise UserMistake(f"{run.path.name} after stage {stage}: {error}; choose other probes") from error
