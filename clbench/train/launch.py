"""Starts the ranks of one experiment on this machine, watches over them and says how they ended.

The configuration is composed once and frozen; each rank is a `clbench.worker`. The first death ends all: whatever one rank leaves behind,
the others would wait for it for ever. No rank outlives its parent, however that one ends.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from clbench.config import Config, run_directory
from clbench.record.ledger import mark_interrupted
from clbench.types import RankFailed, UserMistake

LOOK_EVERY = 0.1
"""Seconds between looks at the ranks."""
GRACE = 10.0
"""Seconds that a rank has to end after it was asked to."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One process of the experiment. `report` is where it writes its error, `log` where its standard error goes (None: to the terminal)."""

    number: int
    process: subprocess.Popen
    report: Path
    log: Path | None


def launch(config: Config, *, command: str) -> Path:
    """Runs the experiment in `config.engine.processes` ranks; gives the run's directory.

    Raises UserMistake and RankFailed as the first failing rank reports, KeyboardInterrupt on SIGINT or SIGTERM; by then no rank is left.
    """
    path = run_directory(config)
    with TemporaryDirectory(prefix="clbench-") as name, ExitStack() as at_exit:
        folder = Path(name)
        (folder / "order.json").write_text(json.dumps({"config": asdict(config), "command": command}))
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        at_exit.callback(signal.signal, signal.SIGTERM, previous)
        ranks: list[Rank] = []
        try:
            port = free_port()
            for number in range(config.engine.processes):
                ranks.append(start(config, number, folder=folder, port=port))
            killed = watch(ranks)
        except KeyboardInterrupt:
            stop(ranks)
            mark_interrupted(path)
            raise
        finally:
            stop(ranks)
        if killed:
            mark_interrupted(path)
        if any(rank.process.returncode for rank in ranks):
            raise failure(ranks, killed)
    return path


def start(config: Config, number: int, *, folder: Path, port: int) -> Rank:
    """Starts rank `number`; the first one speaks to the terminal."""
    order, report = folder / "order.json", folder / f"error-{number}.json"
    environment = os.environ | {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(config.engine.processes),
        "LOCAL_WORLD_SIZE": str(config.engine.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CLBENCH_PARENT": str(os.getpid()),
    }
    log = folder / f"rank-{number}.log" if number else None
    with ExitStack() as opened:
        output = opened.enter_context(log.open("w")) if log else None
        # In a session of its own, so that Ctrl-C comes to us alone and is passed on once.
        process = subprocess.Popen(
            [sys.executable, "-m", "clbench.worker", str(order), str(report)],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    return Rank(number=number, process=process, report=report, log=log)


def watch(ranks: Sequence[Rank]) -> dict[int, int]:
    """Waits until all ranks are done or one has failed; gives the signals that killed ranks, by rank."""
    while True:
        codes = {rank.number: rank.process.poll() for rank in ranks}
        if any(codes.values()) or all(code == 0 for code in codes.values()):
            return {number: -code for number, code in codes.items() if code is not None and code < 0}
        time.sleep(LOOK_EVERY)


def stop(ranks: Sequence[Rank]) -> None:
    """Asks the ranks that are left to end, and ends those that do not."""
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.terminate()
    deadline = time.monotonic() + GRACE
    for rank in ranks:
        try:
            rank.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()


def failure(ranks: Sequence[Rank], killed: dict[int, int]) -> Exception:
    """What the first failing rank says. The errors of others are mostly that it was gone."""
    for number, by in killed.items():
        return RankFailed(f"rank {number} was killed by signal {by} ({signal.Signals(by).name})")
    reports = [json.loads(rank.report.read_text()) for rank in ranks if rank.report.is_file()]
    if reports:
        first = min(reports, key=lambda report: report["time"])
        return UserMistake(first["text"]) if first["is_mistake"] else RankFailed(first["text"])
    rank = next(rank for rank in ranks if rank.process.returncode)
    log = rank.log.read_text()[-2000:] if rank.log else ""
    return RankFailed(f"rank {rank.number} ended with exit code {rank.process.returncode}\n{log}")


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
