"""What a person sees of a run: one live line in a terminal, plain log lines elsewhere, and Weights & Biases curves on request.

Nothing here is read back: machine numbers go through the ledger.
"""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from clbench.config import Config, run_name
from clbench.progress import Line
from clbench.protocols import Stage
from clbench.types import Score

log = logging.getLogger("clbench")


class Tracker:
    """Follows one run over its stages; use as a context. `first`: stages that an earlier start has finished; `silent`: shows nothing at all."""

    def __init__(self, config: Config, stages: Sequence[Stage], *, first: int, silent: bool = False) -> None:
        self.run = run_name(config)
        self.stages = stages
        self.quiet = silent or not config.tracking.progress
        self._started = time.monotonic()
        self._first = first
        self._line = Line(self.run, total=len(stages), done=first, quiet=self.quiet)
        self._wandb = None if silent else _wandb_run(config, run=self.run)

    def __enter__(self) -> Self:
        self._line.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.__exit__()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def step(self, stage: Stage, step: int, steps: int, loss: float) -> None:
        """One reading of the loss within a stage."""
        text = f"{self.run}  stage {stage.index}/{len(self.stages)} {stage.name}  step {step}/{steps}  loss {loss:.3f}"
        self._line.show(stage.index - 1 + step / max(steps, 1), text)
        if self._wandb is not None:
            self._wandb.log({"train/loss": loss, "train/stage": stage.index, "train/step": step})

    def stage(self, index: int, name: str, scores: Sequence[Score], *, loss: float, seconds: float) -> None:
        """One line after a stage."""
        if self._wandb is not None:
            values = {f"{score.probe}/{score.task}/{score.metric}": score.value for score in scores}
            self._wandb.log(values | {"stage": index})
        if self.quiet:
            return
        self._line.show(index, self.run)
        done = index - self._first
        left = (time.monotonic() - self._started) / done * (len(self.stages) - index) if done > 0 else 0.0
        summary = "  ".join(f"{key} {value:.3g}" for key, value in headline(scores, self.stages[:index]).items())
        remaining = f", about {left:.0f} s left" if left else ""
        where = f"{self.run}  stage {index}/{len(self.stages)} {name}  loss {loss:.3f}"
        self._line.say(f"{where}  {summary}  ({seconds:.1f} s{remaining})")


def headline(scores: Sequence[Score], seen: Sequence[Stage]) -> dict[str, float]:
    """The few numbers of a stage that fit one line: mean score on the tasks seen so far, each other probe's first metric."""
    line: dict[str, float] = {}
    metrics = {stage.name: stage.task.metric for stage in seen}
    matrix = [score.value for score in scores if score.probe == "stream" and score.metric == metrics.get(score.task)]
    if matrix:
        line["seen"] = sum(matrix) / len(matrix)
    for score in scores:
        if score.probe != "stream" and "@" not in score.probe:
            line.setdefault(f"{score.probe} {score.metric}", score.value)
    return line


def _wandb_run(config: Config, *, run: str) -> Any:
    tracking = config.tracking
    if tracking.wandb == "disabled":
        return None
    import wandb

    where = {"project": tracking.project, "name": run, "dir": config.results_dir}
    return wandb.init(mode=tracking.wandb, config=asdict(config), **where)


def set_up_logging() -> None:
    """Human lines of clbench on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
