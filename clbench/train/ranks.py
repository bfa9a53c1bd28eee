"""The processes ("ranks") that run one experiment together: which one this is, what they tell each other, how they start and how they end.

One process is a rank of its own and talks to nobody. Ranks that torchrun, DeepSpeed's launcher or SLURM started find each other by the variables that
those set; otherwise the command starts them itself, on its machine. The first death ends all, and no rank outlives the command. Torch's own launcher
is not used, as it orders failures by whole seconds: for one rank killed in ten it named another one's broken connection (torch 2.13).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from torch import distributed

from clbench.config import Config, run_directory
from clbench.record.ledger import mark_interrupted
from clbench.types import RankFailed, UserMistake

T, R = TypeVar("T"), TypeVar("R")
PATIENCE = timedelta(days=1)
"""How long a rank waits for another, which may be pretraining or loading. A rank that died is the launcher's to notice, not a timeout's."""
LOOK_EVERY = 0.1
"""Seconds between looks at the ranks."""
GRACE = 10.0
"""Seconds that a rank has to end after it was asked to."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """`size` processes, of which this one is number `rank`; rank 0 alone writes and prints."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """Rank 0's `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Returns once every rank has come here."""
        if self.size > 1:
            distributed.barrier()


def shared(
    ranks: Ranks, work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T], *, by: Sequence[Sequence[int]]
) -> list[R]:
    """The results of `work` for all items, in their order, on every rank; each rank works on its part. Equal keys of `by` stay together.

    Results travel between processes, so tensors among them must be on the CPU and own their memory.
    """
    parts = dealt(by, size=ranks.size)
    mine = [items[index] for index in parts[ranks.rank]]
    found = ranks.gather(list(work(mine)) if mine else [])
    together = {
        index: result
        for part, results in zip(parts, found, strict=True)
        for index, result in zip(part, results, strict=True)
    }
    return [together[index] for index in range(len(items))]


def dealt(keys: Sequence[Sequence[int]], *, size: int) -> list[list[int]]:
    """The indices of `keys` in `size` parts: equal keys in one part, long and short ones evenly, each part in ascending order.

    >>> dealt([(1, 2), (3,), (1, 2), (4,)], size=2)
    [[0, 2, 3], [1]]
    """
    members: dict[Sequence[int], list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    longest_first = sorted(members, key=len, reverse=True)
    return [sorted(index for key in longest_first[rank::size] for index in members[key]) for rank in range(size)]


# --- who this process is ------------------------------------------------------------------------------------------------------


def is_rank() -> bool:
    """Whether another launcher started this process as one rank of several. What SLURM says of it is put into torch's words first."""
    # A job of one task starts its own ranks, and so does a batch script, which is no step.
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ |= ranks_of_slurm(os.environ)
    return "RANK" in os.environ


def ranks_of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """Torch's variables from those that srun sets. The first rank is on the step's first node; MASTER_ADDR and MASTER_PORT may be given."""
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_node(environment["SLURM_STEP_NODELIST"]),
        # The same on every rank, and seldom that of another job.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000),
    }


def first_node(nodes: str) -> str:
    """The first name of a list as SLURM writes it.

    >>> first_node("gpu[007-009,12],login")
    'gpu007'
    """
    return re.sub(r"^([^,\[]*)(?:\[([^],-]*)[^]]*\]([^,]*))?.*", r"\1\2\3", nodes)


def is_first() -> bool:
    """Whether this process writes and speaks: the first rank, or no rank at all."""
    return os.environ.get("RANK", "0") == "0"


def join() -> Ranks:
    """Makes this process the rank that its environment names (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)."""
    import deepspeed

    from clbench.train import deepspeed_patches

    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed_patches.skip_shared_memory_op()
    deepspeed.init_distributed("nccl" if has_gpu else "gloo", auto_mpi_discovery=False, timeout=PATIENCE, verbose=False)
    return Ranks(rank=distributed.get_rank(), size=distributed.get_world_size())


def leave() -> None:
    """Ends what `join` began; torch's own function would leave DeepSpeed's groups behind."""
    from deepspeed import comm

    comm.destroy_process_group()


# --- starting the ranks of one machine ---------------------------------------------------------------------------------------


def launch(config: Config, *, command: str) -> Path:
    """Runs the experiment in `config.engine.processes` ranks; gives the run's directory.

    Raises UserMistake or RankFailed as the first failing rank reports, KeyboardInterrupt on SIGINT or SIGTERM; by then no rank is left.
    """
    path, size, port = run_directory(config), config.engine.processes, free_port()
    with TemporaryDirectory(prefix="clbench-") as name:
        folder, ranks = Path(name), []
        (folder / "order.json").write_text(json.dumps({"config": asdict(config), "command": command}))
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            for number in range(size):
                ranks.append(start(number, size=size, folder=folder, port=port))
            failed = watch(ranks)
        except KeyboardInterrupt:
            stop(ranks)
            mark_interrupted(path)
            raise
        finally:
            stop(ranks)
            signal.signal(signal.SIGTERM, previous)
        if any(code < 0 for code in failed.values()):
            mark_interrupted(path)
        if failed:
            raise failure(folder, failed)
    return path


def start(number: int, *, size: int, folder: Path, port: int) -> subprocess.Popen:
    """Starts rank `number`; the first one speaks to the terminal, the others to a file."""
    environment = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CLBENCH_PARENT": os.getpid()}
    with (folder / f"{number}.log").open("w") as log:
        output = log if number else None
        return subprocess.Popen(
            [sys.executable, "-m", "clbench.worker", str(folder)],
            env=os.environ | {key: str(value) for key, value in environment.items()},
            stdout=output,
            stderr=output,
            # Ctrl-C then comes to us alone and is passed on once.
            start_new_session=True,
        )


def watch(ranks: Sequence[subprocess.Popen]) -> dict[int, int]:
    """Waits until all ranks are done or one has failed; gives the exit codes of those that failed, by rank (below 0: the signal that killed it)."""
    while True:
        codes = [rank.poll() for rank in ranks]
        if any(codes) or None not in codes:
            return {number: code for number, code in enumerate(codes) if code}
        time.sleep(LOOK_EVERY)


def stop(ranks: Sequence[subprocess.Popen]) -> None:
    """Asks the ranks that are left to end, and ends those that do not."""
    for rank in ranks:
        rank.terminate()
    deadline = time.monotonic() + GRACE
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def failure(folder: Path, failed: Mapping[int, int]) -> Exception:
    """What the first failing rank says. The errors of others are mostly that it was gone."""
    for number, code in failed.items():
        if code < 0:
            return RankFailed(f"rank {number} was killed by signal {-code} ({signal.Signals(-code).name})")
    reports = [json.loads(path.read_text()) for path in folder.glob("error-*.json")]
    if reports:
        first = min(reports, key=lambda report: report["time"])
        return UserMistake(first["text"]) if first["is_mistake"] else RankFailed(first["text"])
    number, code = next(iter(failed.items()))
    return RankFailed(f"rank {number} ended with exit code {code}\n{(folder / f'{number}.log').read_text()[-2000:]}")


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent ends, by whatever end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ["CLBENCH_PARENT"]):
        raise SystemExit("the parent is gone already")
