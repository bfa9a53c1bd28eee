"""Commands of clbench in forks of this process, which has imported everything already: a run of a tiny model then takes a second or two.

Not on a machine with CUDA, which does not survive a fork once it was used.
"""

import os
import runpy
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import baselines.er  # noqa: F401
import baselines.ewc  # noqa: F401
import baselines.ilora  # noqa: F401
import clbench.experiment  # noqa: F401
import clbench.leaderboard  # noqa: F401
import clbench.verify  # noqa: F401
import tasks.multiple_choice  # noqa: F401
import tasks.rows  # noqa: F401
from clbench.examine import lm_tasks  # noqa: F401
from tests.conftest import QUIET, TINY_MODEL, TINY_STREAM

TINY = (*TINY_MODEL, *TINY_STREAM, *QUIET, "engine.device=cpu")
LIMIT = 120.0
"""Seconds after which a command counts as hung."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended: its exit code, or less than 0 the signal that killed it, what it wrote, the seconds that it took, and those of `work`,
    in which it had the processor."""

    code: int
    out: str
    err: str
    seconds: float
    work: float

    @property
    def faults(self) -> list[str]:
        """What no command may do, whatever was done to it."""
        found = ["a traceback"] if "Traceback" in self.err + self.out else []
        return found + (["it hung"] if self.seconds >= LIMIT else [])

    @property
    def line(self) -> str:
        """The one line of a refusal; empty where there is none, or more."""
        lines = [line for line in self.err.splitlines() if line.startswith("clbench: ")]
        return lines[0] if len(lines) == 1 else ""


def command(
    arguments: Sequence[str],
    *,
    folder: Path,
    module: str = "clbench",
    first: Callable[[], object] = lambda: None,
    killed_after: float = LIMIT,
) -> Outcome:
    """`python -m MODULE ARGUMENTS` from `folder`, after `first` in the same process; it gets a SIGKILL after so many seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    files, started = [folder / ".out", folder / ".err"], time.monotonic()
    child = os.fork()
    if child == 0:
        _become(module, arguments, files=files, folder=folder, first=first)
    watched = os.pidfd_open(child)
    try:
        if not select.select([watched], [], [], killed_after)[0]:
            os.kill(child, signal.SIGKILL)
        _, status, used = os.wait4(child, 0)
    finally:
        os.close(watched)
    out, err = (file.read_text(errors="replace") for file in files)
    for file in files:
        file.unlink()
    code = os.waitstatus_to_exitcode(status)
    work = used.ru_utime + used.ru_stime
    return Outcome(code=code, out=out, err=err, seconds=time.monotonic() - started, work=work)


def _become(
    module: str, arguments: Sequence[str], *, files: Sequence[Path], folder: Path, first: Callable[[], object]
) -> None:
    """Ends this process as the interpreter would end after the command."""
    code = 1
    try:
        for number, file in enumerate(files, start=1):
            os.dup2(os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND), number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
        sys.argv = [module, *arguments]
        first()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
