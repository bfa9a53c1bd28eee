"""The processes ("ranks") that run one experiment together: which one this is, what they tell each other, how they start and how they end.

One process is a rank of its own and talks to nobody. Ranks that torchrun, DeepSpeed's launcher or SLURM started find each other by the variables that
those set; otherwise the command starts them itself, on its machine, with `torch.multiprocessing.spawn`. The first death ends all, and no rank
outlives the command. Torchrun orders failures by whole seconds: of a rank killed within a second's last tenth it named another's broken connection.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import pickle
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import distributed
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException, spawn

from clbench.config import Config, run_directory
from clbench.record.ledger import mark_interrupted
from clbench.types import RankFailed, UserMistake

T, R = TypeVar("T"), TypeVar("R")
# How long a rank waits for another, which may be pretraining or loading. A rank that died is the launcher's to notice, not a timeout's.
PATIENCE = timedelta(days=1)
# Seconds that ranks have to end by themselves after one has failed, and again after they were asked to.
GRACE = 5.0


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
        box = [value]
        if self.size > 1:
            distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, by rank, on every rank."""
        values = [value] * self.size
        if self.size > 1:
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
    answers: dict[int, R] = {}
    for part, results in zip(parts, found, strict=True):
        answers |= zip(part, results, strict=True)
    return [answers[index] for index in range(len(items))]


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


def place(environment: Mapping[str, str]) -> dict[str, str]:
    """What a launcher says of this process in torch's variables, also where srun says it in SLURM's; empty where it is not one rank of several.

    The first rank is on the step's first node; MASTER_ADDR and MASTER_PORT may be given.
    """
    # A job of one task starts its own ranks, and so does a batch script, which is no step.
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {key: environment[key] for key in ("RANK",) if key in environment}
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


def join() -> Ranks:
    """Makes this process the rank that its environment names (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)."""
    import deepspeed

    from clbench.train.deepspeed_patches import skip_shared_memory_op

    skip_shared_memory_op()
    deepspeed.get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=PATIENCE, verbose=False)
    return Ranks(rank=distributed.get_rank(), size=distributed.get_world_size())


def leave() -> None:
    """Ends what `join` began; torch's own function would leave DeepSpeed's groups behind."""
    from deepspeed import comm

    comm.destroy_process_group()


# --- starting the ranks of one machine ---------------------------------------------------------------------------------------


def launch(work: Callable[..., Path | None], config: Config, *, command: str) -> Path:
    """Does `work(config, command=command)` in `config.engine.processes` ranks on this machine; gives the run's directory.

    Raises UserMistake or RankFailed as the rank says that failed first, KeyboardInterrupt on SIGINT or SIGTERM; by then no rank is left.
    """
    path, size = run_directory(config), config.engine.processes
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Children of a process that joblib started would otherwise look for a way of starting that they do not know.
    multiprocessing.set_start_method("spawn", force=True)
    try:
        common = {
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": get_free_port(),
        }
        given = (partial(work, config, command=command), common, os.getpid())
        ranks = spawn(be_rank, given, nprocs=size, join=False)
        while not ranks.join(grace_period=GRACE):
            pass
    except KeyboardInterrupt:
        started = multiprocessing.active_children()
        for process in started:
            process.terminate()
        for process in started:
            process.join(GRACE)
            process.kill()
        mark_interrupted(path)
        raise
    except ProcessException as error:
        if isinstance(error, ProcessExitedException):
            mark_interrupted(path)
        raise failure(error, ranks.error_files) from None
    finally:
        signal.signal(signal.SIGTERM, previous)
    return path


def be_rank(number: int, work: Callable[[], Path | None], common: Mapping[str, object], parent: int) -> None:
    """What a process does that `launch` has started; `common`: variables of the environment that all have in common."""
    # The kernel kills it when its parent ends, by whatever end; Ctrl-C comes to the parent alone, which passes it on once.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        raise SystemExit("the parent is gone already")
    os.setsid()
    if number:
        logging.disable()
    os.environ |= {key: str(value) for key, value in {**common, "RANK": number, "LOCAL_RANK": number}.items()}
    work()


def failure(error: ProcessException, reports: Sequence[str]) -> Exception:
    """What the rank says that failed first. The errors of others are mostly that it was gone."""
    written = sorted(filter(Path.is_file, map(Path, reports)), key=os.path.getmtime)
    text = pickle.loads(written[0].read_bytes()) if written else ""
    for report in written:
        report.unlink()
    if isinstance(error, ProcessExitedException):
        by = f"was killed by signal {-error.exit_code} ({error.signal_name})"
        how = by if error.exit_code < 0 else f"ended with exit code {error.exit_code}"
        return RankFailed(f"rank {error.error_index} {how}")
    kind, _, mistake = text.strip().rpartition("\n")[2].partition(": ")
    return UserMistake(mistake) if kind.endswith(".UserMistake") else RankFailed(text)
