"""How ranks start and end: the processes that run one experiment together.

Ranks that torchrun, DeepSpeed's launcher or SLURM started find each other by the variables that those set; otherwise the command starts them itself,
on its machine, with `torch.multiprocessing.spawn`. The first death ends all, and no rank outlives the command. Torchrun is not used for that: it
orders failures by whole seconds, so that of a rank killed within a second's last tenth it named another's broken connection.
"""

import ctypes
import logging
import multiprocessing
import os
import pickle
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException, spawn

from clbench.config import Config, run_directory
from clbench.record.ledger import mark_interrupted
from clbench.train.ranks import Ranks
from clbench.types import NotWritten, RankFailed, UserMistake

# How long a rank waits for another, which may be pretraining or loading. A rank that died is the launcher's to notice, not a timeout's.
PATIENCE = timedelta(days=1)
# Seconds that ranks have to end by themselves after one has failed, and again after they were asked to.
GRACE = 5.0


def assigned_rank(environment: Mapping[str, str]) -> dict[str, str]:
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


def launch(work: Callable[..., Path | None], config: Config, *, command: str) -> Path:
    """Does `work(config, command=command)` in `config.engine.processes` ranks on this machine; gives the run's directory.

    Raises UserMistake, NotWritten or RankFailed as the rank says that failed first, KeyboardInterrupt on SIGINT; by then no rank is left.
    """
    path, size = run_directory(config), config.engine.processes
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
        ranks: Any = spawn(be_rank, given, nprocs=size, join=False)  # declared as None, too, which joined ones are
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
    return path


def be_rank(number: int, work: Callable[[], Path | None], common: Mapping[str, object], parent: int) -> None:
    """What a process does that `launch` has started; `common`: variables of the environment that all have in common."""
    # The kernel kills it when its parent ends, by whatever end; Ctrl-C comes to the parent alone, which passes it on once.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        raise SystemExit("the parent is gone already")
    os.setsid()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill is an interruption
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
    for known in (UserMistake, NotWritten):
        if kind.endswith(f".{known.__name__}"):
            return known(mistake)
    return RankFailed(text)
