"""One live line for work that takes long: a bar on a terminal, else a line of the log now and then."""

import logging
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("clbench")

SECONDS_BETWEEN_LINES = 10.0


class Line:
    """Shows how much of `total` is done; use as a context. With `quiet` nothing is shown."""

    def __init__(self, text: str, *, total: float, done: float = 0, quiet: bool = False) -> None:
        self.console = Console(stderr=True)
        self.is_live = self.console.is_terminal and not quiet
        self._quiet = quiet
        self._said = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self.console, disable=not self.is_live, transient=True)
        self._bar = self._progress.add_task(text, total=total, completed=done)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line that stays, above the bar where there is one."""
        if self.is_live:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)
        else:
            log.info("%s", text)

    def show(self, done: float, text: str) -> None:
        """`done` of the total is done; `text` describes where the work is."""
        self._progress.update(self._bar, completed=done, description=text)
        if not self.is_live and not self._quiet and time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            log.info("%s", text)
            self._said = time.monotonic()
