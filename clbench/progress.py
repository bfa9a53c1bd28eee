"""One live line for work that takes long: a bar on a terminal, else, and in a log file, a line every half minute at least. And what is logged, where.

>>> spoken(4.2), spoken(42), spoken(754), spoken(12_000)
('4.2 s', '42 s', '13 min', '3 h 20 min')
"""

import logging
import math
import os
import sys
import time
from threading import Event, Thread
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from clbench.config.secrets import masking

log = logging.getLogger("clbench")

SECONDS_BETWEEN_LINES = 20.0


class Line:
    """Shows how much of `total` is done, or, where that is not known, that work is going on; use as a context.

    With `quiet` nothing is shown, and only a log file has the lines. `name` says in them what they are about; a live line has no room for it.
    """

    def __init__(self, text: str, *, name: str = "", total: float | None = None, quiet: bool = False) -> None:
        # The stream itself: what libraries say meanwhile is sent elsewhere.
        self.console = Console(file=sys.stderr)
        self.is_live = self.console.is_terminal and not quiet
        self._level = logging.DEBUG if self.is_live or quiet else logging.INFO
        left = TextColumn("{task.fields[left]}")
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=10), TaskProgressColumn(), left)
        self._progress = Progress(*columns, console=self.console, disable=not self.is_live, transient=True)
        self._bar = self._progress.add_task(text, total=total, left="")
        self._name, self._text, self._ended = name, text, Event()
        self.begin(total)

    def __enter__(self) -> Self:
        self._progress.start()
        Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._ended.set()
        self._progress.stop()

    def begin(self, total: float | None, *, done: float = 0.0) -> None:
        """Other work from here on: `total` of it, of which `done` was done before and says nothing of the pace."""
        self._total, self._done, self._first, self._started = total or math.nan, done, done, time.monotonic()
        self._progress.update(self._bar, total=total, completed=done)

    @property
    def left(self) -> float:
        """Seconds until all is done, at the mean pace so far; NaN where nothing has been done yet."""
        done = self._done - self._first
        return (time.monotonic() - self._started) / done * (self._total - self._done) if done > 0 else math.nan

    def say(self, text: str) -> None:
        """A line that stays, above the bar where there is one."""
        if self.is_live:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)
        log.log(self._level, "%s", text)

    def show(self, done: float, text: str) -> None:
        """`done` of the total is done; `text` describes where the work is."""
        self._done, self._text = done, text
        self._progress.update(self._bar, completed=done, description=text, left=self._left())

    def _left(self) -> str:
        return "" if math.isnan(self.left) else f"about {spoken(self.left)} left"

    def _beat(self) -> None:
        """Log lines come from a thread of their own: one step or forward may take longer than a reader waits."""
        while not self._ended.wait(SECONDS_BETWEEN_LINES):
            log.log(self._level, "%s", ", ".join(filter(None, [f"{self._name}  {self._text}".strip(), self._left()])))


def spoken(seconds: float) -> str:
    """A time as one says it."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.{int(seconds < 9.95)}f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def set_up_logging() -> None:
    """Human lines of clbench on standard error. How often the hub's library tries again is none of them, unless its own variable asks for that."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # read when the library is imported
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setLevel(logging.INFO)
    handler.addFilter(masking)
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
