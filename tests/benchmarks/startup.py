"""What the harness itself takes: seconds until `--help` and until a run is done that trains nothing, and its share of a real run."""

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from clbench import experiment
from clbench.config.composition import compose
from clbench.examine.student import Student
from clbench.train.local import LocalEngine
from tests.benchmarks.race import Figure, spread, timed

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = ("torch", "transformers", "peft", "lm_eval.api.task")
"""What every run imports. It takes a process as long whatever it goes on to do, so the first share is without, the second with it."""


def command(*arguments: str) -> None:
    """Runs clbench in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "clbench", *arguments], cwd=ROOT, env=environment, check=True, capture_output=True
    )


def run() -> Iterator[Figure]:
    """Two starts and one share."""
    yield plain("--help", [timed(lambda: command("--help"), time.perf_counter)[0] for _ in range(3)], "seconds", "-")
    with tempfile.TemporaryDirectory() as folder:
        nothing = [
            f"results_dir={folder}",
            "stream.limit=1",
            "train.steps=0",
            "stream.test_rows=1",
            "tracking.progress=false",
        ]
        seconds = [timed(partial(command, *nothing, f"seed={n}"), time.perf_counter)[0] for n in range(3)]
        yield plain("a run that trains nothing on one task", seconds, "seconds", "-")
        for library in IMPORTED:
            import_module(library)
        total, working = watched(compose([f"results_dir={folder}", "method=seq", "tracking.progress=false"]))
    outside = "outside forward, backward, optimizer and scoring, of a run of SEQ"
    yield plain(outside, [total], "share of a run", "<= 0.05", (total - working) / total)
    starting = [timed(started, time.perf_counter)[0] for _ in range(3)]
    yield plain("Python with torch, transformers, peft and lm-eval, and no more", starting, "seconds", "-")
    whole = total + statistics.median(starting)
    yield plain(f"{outside}, with that", [whole], "share of a run", "-", (whole - working) / whole)


def started() -> None:
    """Python and the libraries that every run begins with, in a process of their own."""
    subprocess.run([sys.executable, "-c", f"import {', '.join(IMPORTED)}"], check=True, capture_output=True)


def watched(config: Any) -> tuple[float, float]:
    """Seconds of a whole run in this process, and of its forwards, backwards, optimizer steps and scoring."""
    spent = [0.0]
    inside = [False]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if inside[0]:
                return function(*arguments, **named)
            inside[0] = True
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent[0] += time.perf_counter() - started
                inside[0] = False

        return call

    from baselines.seq import Seq

    parts = [(Seq, "loss"), (LocalEngine, "backward"), (LocalEngine, "step"), (Student, "read"), (Student, "write")]
    with ExitStack() as stack:
        for owner, name in parts:
            stack.enter_context(patch.object(owner, name, counted(getattr(owner, name))))
        total, _ = timed(lambda: experiment.run(config), time.perf_counter)
    return total, spent[0]


def plain(case: str, seconds: list[float], unit: str, wanted: str, ratio: float | None = None) -> Figure:
    """The row of a figure without a peer."""
    return Figure(
        benchmark="startup",
        case=case,
        peer="-",
        unit=unit,
        ours=statistics.median(seconds),
        ours_spread=spread(seconds),
        theirs=math.nan,
        theirs_spread=math.nan,
        ratio=statistics.median(seconds) if ratio is None else ratio,
        wanted=wanted,
        difference="",
    )
