"""What a person sees of a run: one live line in a terminal, plain log lines elsewhere, and Weights & Biases curves on request.

Nothing here is read back: machine numbers go through the ledger.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from clbench.config import TrackingConfig
from clbench.protocols import Stage
from clbench.types import Score

log = logging.getLogger("clbench")


class Tracker:
    """Follows one run over its stages; use as a context."""

    def __init__(
        self, config: TrackingConfig, *, run: str, stages: Sequence[Stage], manifest: dict[str, Any], first: int
    ) -> None:
        self.run = run
        self.stages = stages
        self.console = Console(stderr=True)
        self.live = config.progress and self.console.is_terminal
        self.quiet = not config.progress
        self._started = time.monotonic()
        self._first = first
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
            transient=True,
        )
        self._bar: TaskID = self._progress.add_task(run, total=len(stages), completed=first)
        self._wandb = _wandb_run(config, run=run, manifest=manifest)

    def __enter__(self) -> Tracker:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def step(self, stage: Stage, step: int, steps: int, loss: float) -> None:
        """One reading of the loss within a stage."""
        text = f"{self.run}  stage {stage.index}/{len(self.stages)} {stage.name}  step {step}/{steps}  loss {loss:.3f}"
        self._progress.update(self._bar, description=text, completed=stage.index - 1 + step / max(steps, 1))
        if self._wandb is not None:
            self._wandb.log({"train/loss": loss, "train/stage": stage.index, "train/step": step})

    def stage(self, index: int, name: str, scores: Sequence[Score], *, loss: float, seconds: float) -> None:
        """The compact table after a stage."""
        values = {(score.probe, score.task, score.metric): score.value for score in scores}
        if self._wandb is not None:
            self._wandb.log(
                {f"{probe}/{task}/{metric}": value for (probe, task, metric), value in values.items()}
                | {"stage": index}
            )
        if self.quiet:
            return
        done = index - self._first
        left = (time.monotonic() - self._started) / done * (len(self.stages) - index) if done > 0 else float("nan")
        summary = "  ".join(f"{key} {value:.3g}" for key, value in headline(scores, self.stages[:index]).items())
        if not self.live:
            remaining = f", about {left:.0f} s left" if done > 0 else ""
            log.info(
                "%s  stage %d/%d %s  loss %.3f  %s  (%.1f s%s)",
                self.run,
                index,
                len(self.stages),
                name,
                loss,
                summary,
                seconds,
                remaining,
            )
            return
        self._progress.update(self._bar, completed=index)
        self.console.print(stage_table(self.run, index, name, scores, self.stages))


def headline(scores: Sequence[Score], seen: Sequence[Stage]) -> dict[str, float]:
    """The few numbers of a stage that fit one line: mean score on the tasks seen so far, on all, each other probe's first metric."""
    line: dict[str, float] = {}
    metrics = {stage.name: stage.task.metric for stage in seen}
    matrix = [score for score in scores if score.probe == "stream" and score.metric == metrics.get(score.task)]
    if matrix:
        line["seen"] = sum(score.value for score in matrix) / len(matrix)
    for score in scores:
        if score.probe != "stream" and "@" not in score.probe:
            line.setdefault(f"{score.probe} {score.metric}", score.value)
    return line


def stage_table(run: str, index: int, name: str, scores: Sequence[Score], stages: Sequence[Stage]) -> Table:
    """Every task's score and the probes after one stage, as one compact table."""
    table = Table(
        title=f"{run}  after stage {index}/{len(stages)} {name}", title_justify="left", box=None, padding=(0, 1)
    )
    cells = {
        stage.name: [
            score.value
            for score in scores
            if (score.probe, score.task, score.metric) == ("stream", stage.name, stage.task.metric)
        ]
        for stage in stages
    }
    for stage in stages:
        table.add_column(stage.name[-9:], justify="right", style="bold" if stage.index <= index else "dim")
    for probe in headline(scores, ()):
        table.add_column(probe, justify="right", style="cyan")
    table.add_row(
        *[f"{values[0]:.2f}" if values else "" for values in cells.values()],
        *[f"{value:.3g}" for value in headline(scores, ()).values()],
    )
    return table


def _wandb_run(config: TrackingConfig, *, run: str, manifest: dict[str, Any]) -> Any:
    if config.wandb == "disabled":
        return None
    import wandb

    return wandb.init(
        mode=config.wandb, project=config.project, name=run, config=manifest["config"], dir=manifest["results_dir"]
    )


def set_up_logging() -> None:
    """Human lines of clbench on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
