"""What a person sees of a run: one live line in a terminal, plain log lines elsewhere and in its directory, and curves on request.

Nothing here is read back: machine numbers go through the ledger.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from types import TracebackType
from typing import Self

from clbench.config import Config, run_name
from clbench.config.checks import writing
from clbench.config.secrets import masking
from clbench.progress import Line
from clbench.protocols import Stage
from clbench.record.curves import curves_of
from clbench.record.forecast import Asked, Forecast
from clbench.record.runs import LOG
from clbench.types import Reading, Score

Row = Callable[[int], str]
WIDTH = 80
FOLDED = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
log = logging.getLogger("clbench")


class Tracker:
    """Follows one run; use as a context. `silent`: shows nothing at all. `row` says in a line what a finished stage amounts to, where it is shown."""

    def __init__(
        self, config: Config, stages: Sequence[Stage], *, silent: bool = False, row: Row = lambda stage: ""
    ) -> None:
        self.run = run_name(config)
        self.stages = stages
        self._row = (lambda stage: "") if silent else row
        self._forecast = Forecast()
        self._reading: Reading | None = None
        self._stage = 0
        self._steps = self._steps_before = 0
        self._examined: dict[tuple[str, Asked], float] = {}
        self._line = Line("", name=self.run, quiet=silent or not config.tracking.progress)
        self.curves = () if silent else curves_of(config)

    def __enter__(self) -> Self:
        self._line.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            where = (
                f"stage {self._stage}/{len(self.stages)}" if self._stage else "the examination of the untouched model"
            )
            error.args = (f"{self.run} is interrupted in {where}",)
            log.debug("%s", error)
        self._line.__exit__()
        for curves in self.curves:
            curves.close(failed=kind is not None)

    def doing(self, text: str) -> None:
        """What takes a while before the first stage."""
        self._line.begin(None)
        self._line.show(0, text)

    def begin(self, *, steps: int) -> None:
        """Stages come now, after `steps` optimizer steps of those before."""
        self._steps_before = steps

    def expect(self, forecast: Forecast, *, finished: int) -> None:
        """The stages after the `finished` first are expected to take so long."""
        self._forecast = forecast
        self._line.begin(forecast.until(len(self.stages)), done=forecast.until(finished))
        self._line.say(fill(f"{self.run}  {forecast.spoken(done=finished)}", WIDTH, **FOLDED))

    def step(self, stage: Stage, step: int, steps: int, reading: Reading | None) -> None:
        """Where training is within a stage, and the last reading."""
        self._examined, self._steps = {}, steps
        loss = f"  loss {reading.loss:.3f}" if reading else ""
        self._show(stage.index, f"{stage.name}  step {step}/{steps}{loss}", trained=step / max(steps, 1))
        if reading is not None and reading is not self._reading:
            self._reading = reading
            for curves in self.curves:
                curves.training(self._steps_before + step, reading)

    def examining(self, index: int, view: str, probe: str, task: str, done: int, of: int) -> None:
        """`done` of the `of` requests of a probe's task are answered, after stage `index` or, at 0, by the untouched model."""
        asked = view, (probe, task)
        if index == 0 and asked not in self._examined:
            self._line.begin(of, done=done)  # what other tasks take is not known yet
        self._examined = dict.fromkeys(self._examined, 1.0) | {asked: done / of}
        text = f"examining: {probe} {task}  {done}/{of}"
        if index:
            self._show(index, text, trained=1.0)
        else:
            self._line.show(done, f"untouched model, {text}")

    def _show(self, index: int, text: str, *, trained: float) -> None:
        forecast, self._stage = self._forecast, index
        # A slice, as a stage that is trained outside a run has no forecast.
        done = forecast.until(index - 1) + trained * sum(forecast.training[index - 1 : index])
        done += sum(share * forecast.examining.get(asked, 0.0) for (_, asked), share in self._examined.items())
        self._line.show(done, f"stage {index}/{len(self.stages)} {text}")

    def stage(self, index: int, name: str, scores: Sequence[Score], *, loss: float, seconds: float) -> None:
        """After a stage: which it was, and below how the run stands."""
        self._steps_before, self._steps = self._steps_before + self._steps, 0
        for curves in self.curves:
            curves.stage(index, scores)
        if index:
            self._line.show(self._forecast.until(index), f"stage {index}/{len(self.stages)} {name}")
        read = "" if math.isnan(loss) else f"  loss {loss:.3f}"
        where = f"{self.run}  stage {index}/{len(self.stages)} {name}{read}  {seconds:.1f} s"
        self._line.say("\n".join(filter(None, [fill(where, WIDTH, **FOLDED), self._row(index)])))


class LogFile(logging.FileHandler):
    """A log that goes on without the lines that cannot be written: the record that cannot be either ends the run, in one line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (its name there)
        return


@contextmanager
def written_to(path: Path | None) -> Iterator[None]:
    """All that is logged inside, and what a live line would say elsewhere, is added to a file of the folder `path` (None: to none)."""
    if path is None:
        yield
        return
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        handler = LogFile(path / LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    handler.addFilter(masking)
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        handler.close()
