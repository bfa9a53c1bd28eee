"""Kills: at a random moment, at a chosen write, rename or fsync, in the middle of a file; the same command then ends as an unbroken run."""

import os
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.faults.records import numbers, tables, unlike
from tests.faults.warm import LIMIT, TINY, Outcome, command

METHODS = (
    ("method=seq",),
    ("method=er",),
    ("method=ewc", "train.checkpoint_steps=1"),
    ("method=ilora", "train.checkpoint_steps=2"),
    ("method=merge_average",),
)
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
"""What the interpreter says it does to a file; beside them files that it opens to write, and fsync."""
COLD = 0.15
"""Share of the runs that also have to make the base model."""
MOST_IN_A_ROW = 4


@dataclass(frozen=True, kw_only=True)
class Whole:
    """An unbroken run: its records and tables, how long it took, how often it changed a file, and the sizes of what it left."""

    records: dict[str, Any]
    tables: dict[str, bytes]
    seconds: float
    changes: int
    sizes: list[int]


@dataclass
class Kills:
    """What came of the runs that were killed: kills by their kind, runs, and what went wrong."""

    kinds: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    wrong: list[str] = field(default_factory=list)


def arguments(method: tuple[str, ...], *, folder: Path, cache: Path) -> list[str]:
    return [*TINY, *method, f"results_dir={folder / 'results'}", f"cache_dir={cache}"]


def only_run(folder: Path) -> Path:
    (path,) = (folder / "results" / "runs").iterdir()
    return path


def unbroken(method: tuple[str, ...], *, folder: Path, cache: Path) -> Whole:
    counted = folder / "counted"
    found = command(
        arguments(method, folder=folder, cache=cache),
        folder=folder,
        first=lambda: at_each_change(folder, counting(counted)),
    )
    assert found.code == 0, found.err
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return Whole(
        records=numbers(only_run(folder)),
        tables=tables(folder / "results"),
        seconds=found.seconds,
        changes=counted.stat().st_size,
        sizes=[size for size in sizes if size],
    )


def at_each_change(root: Path, act: Callable[[], None]) -> None:
    """Has this process `act` before it changes a file below `root`, and before every fsync."""

    def watch(event: str, given: tuple[Any, ...]) -> None:
        is_write = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        if (is_write or event in CHANGES) and str(given[0]).startswith(str(root)):
            act()

    fsync = os.fsync

    def watched(file: int) -> None:
        act()
        fsync(file)

    os.fsync = watched
    sys.addaudithook(watch)


def counting(path: Path) -> Callable[[], None]:
    """A byte of `path` for each time that it is called."""
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    return lambda: (os.write(file, b"."), None)[1]


def dying(number: int) -> Callable[[], None]:
    """Kills this process when it is called for the `number`th time."""
    left = [number]

    def act() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def die_in_a_file(size: int) -> None:
    """Has this process killed by the write that makes a file larger than `size`, of which the part before is written."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def killed(random: Random, given: list[str], *, whole: Whole, folder: Path, is_cold: bool) -> tuple[str, Outcome]:
    """The command, killed in one of three ways unless it ends before; which way, and how it ended."""
    kind = random.choice(("moment", "change", "file"))
    moment, nothing = LIMIT, lambda: None
    first: Callable[[], object] = nothing
    if kind == "moment":
        moment = random.uniform(0.1, 1.0) * whole.seconds * (2 if is_cold else 1)
    elif kind == "change":
        number = random.randint(1, whole.changes)
        first = lambda: at_each_change(folder, dying(number))  # noqa: E731
    else:
        size = int(random.choice(whole.sizes) * random.random())
        first = lambda: die_in_a_file(size)  # noqa: E731
    return kind, command(given, folder=folder, first=first, killed_after=moment)


def kill_a_run(
    random: Random, method: tuple[str, ...], *, whole: Whole, folder: Path, cache: Path, most: int, to: Kills
) -> None:
    """Kills a run up to `most` times, then lets it end: its records and tables are those of the `whole` one, and nothing half is left."""
    is_cold = random.random() < COLD
    cache = folder / "cache" if is_cold else cache
    given, name = arguments(method, folder=folder, cache=cache), " ".join(method)
    kinds: list[str] = []
    to.runs += 1
    for _ in range(random.randint(1, min(most, MOST_IN_A_ROW))):
        kind, found = killed(random, given, whole=whole, folder=folder, is_cold=is_cold)
        to.wrong += [f"{name} killed by {kinds}: {fault}" for fault in found.faults]
        if found.code >= 0:
            break  # it ended before its time came
        kinds.append(kind)
    to.kinds.update(kinds)
    found = command(given, folder=folder)
    wrong = found.faults + ([f"exit code {found.code}: {found.err[-500:]}"] if found.code else [])
    if not wrong:
        wrong += [f"{part} differs" for part in unlike(numbers(only_run(folder)), whole.records)]
        wrong += [f"{part} differs" for part in unlike(tables(folder / "results"), whole.tables)]
        wrong += [f"{path} is left" for path in folder.rglob("*") if ".tmp" in path.name]
    to.wrong += [f"{name}{' with an empty cache' * is_cold}, killed by {kinds}: {what}" for what in wrong]
    if not wrong:
        shutil.rmtree(folder)
