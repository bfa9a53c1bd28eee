"""Programs that a model wrote, run against their tests: pass@1. Only a task whose yaml asks for it (mbpp_pass) gets here.

What a program cannot do: reach a network, see or signal another process, start one (or a thread), write outside a
directory of its own that lives in memory, read stdin, be heard, gain rights, go on after its time, take more memory than
its limit. What it can: read the files that the user may (under root: that `nobody` may), speak to a service by a socket
file outside /run that the user may open, keep one core busy until its time is up. Linux 5.12 or newer only; where the
kernel refuses any part of this, nothing is run. It guards the machine: a program that sets out to deceive its tests can.

A row of mbpp:
    {"text": "Write a function to ...", "code": "...", "test_list": ["assert f(1) == 1"], "test_setup_code": ""}
"""

from __future__ import annotations

import os
import select
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired

from clbench.types import Example, UserMistake
from tasks.code import tidy
from tasks.hub import Row, TextTask, lookup, render

INSIDE = Path(__file__).with_name("sandbox_inside.py")
PASSED = 47
"""The status with which `sandbox_inside` ends after the program's last line."""
START = 30.0
"""Seconds in which an idle or a busy machine starts an interpreter."""
WAIT = 3
"""By the clock a program has this many times its processor time, so that a busy machine changes no score."""


@dataclass(kw_only=True)
class PassAtOne(TextTask):
    """`answer` is the column with a program, `tests` the one that lists its assertions, `setup` the code that these need.

    One program is run per example, for at most `seconds` of processor time and in `memory_mb` MiB. `Example.source` holds
    the assertions.
    """

    tests: str
    setup: str
    seconds: int
    memory_mb: int

    def example(self, row: Row, *, id: str) -> Example:
        """The assignment, a program that solves it, and the tests."""
        check_that_programs_run(seconds=self.seconds, memory_mb=self.memory_mb)
        checks = "\n".join([str(lookup(row, self.setup)), *lookup(row, self.tests)])
        answer = tidy(str(lookup(row, self.answer)))
        return Example(id=id, prompt=render(self.template, row), answer=answer, source=checks)

    def score(self, example: Example, answer: str) -> float:
        """1 where the program and then all of its tests run without an error, else 0."""
        return float(passes(f"{answer}\n{example.source}\n", seconds=self.seconds, memory_mb=self.memory_mb))


@cache
def check_that_programs_run(*, seconds: int, memory_mb: int) -> None:
    """Raises UserMistake where they do not; a run asks when it reads the rows, before it trains."""
    if not passes("", seconds=seconds, memory_mb=memory_mb):
        raise UserMistake(
            f"an empty program fails with seconds={seconds}, memory_mb={memory_mb}; raise them in conf/task"
        )


def passes(program: str, *, seconds: int, memory_mb: int) -> bool:
    """Whether `program` runs to its end without an error; raises UserMistake where it cannot be run safely."""
    if sys.platform != "linux":
        raise UserMistake(f"programs are run on Linux only, not on {sys.platform}; take task mbpp, which compares them")
    command = [os.path.realpath(sys.executable), "-I", "-S", str(INSIDE), str(seconds), str(memory_mb << 20)]
    # Its own session, so that the whole group can be killed.
    with Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env={}, cwd="/", start_new_session=True) as process:
        try:
            begin(process, program)
            return process.wait(timeout=WAIT * seconds) == PASSED
        except TimeoutExpired:
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def begin(process: Popen[bytes], program: str) -> None:
    """Returns when `program` has begun; raises UserMistake with the kernel's word where it could not."""
    assert process.stdin and process.stdout
    with suppress(BrokenPipeError), process.stdin:  # where it ended early, stdout says why
        process.stdin.write(program.encode("utf-8", errors="replace"))
    heard = select.select([process.stdout], [], [], START)[0]
    said = os.read(process.stdout.fileno(), 4096).decode() if heard else f"nothing for {START:.0f} seconds"
    if said != "ready":
        raise UserMistake(
            f"programs cannot be run safely here ({said or 'the interpreter did not start'}); they need Linux 5.12 and the right "
            "to make namespaces (not in a plain container); take task mbpp, which compares programs and runs none"
        )
