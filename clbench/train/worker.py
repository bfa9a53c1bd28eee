"""One rank of an experiment: started by `launch`, or by torchrun, DeepSpeed's launcher or SLURM, which set RANK and its like.

`python -m clbench.worker ORDER ERROR` reads the frozen configuration from the JSON file ORDER and writes what goes wrong to the JSON file ERROR.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from clbench.config import Config, from_plain
from clbench.types import UserMistake

PR_SET_PDEATHSIG = 1


def take_part(config: Config, *, command: str) -> Path:
    """Runs the experiment as the rank that the environment names; gives the run's directory."""
    size = int(os.environ["WORLD_SIZE"])
    if size != config.engine.processes:
        raise UserMistake(
            f"engine.processes={config.engine.processes}, but {size} processes were started; give both the same number"
        )
    from clbench import experiment

    experiment.set_up_torch(config)
    from clbench.train import zero as engine_deepspeed

    world = engine_deepspeed.join()
    path = experiment.run(config, command=command, world=world)
    world.wait()
    engine_deepspeed.leave()
    return path


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


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent ends, by whatever end."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ["CLBENCH_PARENT"]):
        raise SystemExit("the parent is gone already")


def main() -> None:
    """Entry point of a rank."""
    order, error = map(Path, sys.argv[1:])
    die_with_parent()

    def report(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        """Writes what ended this rank where the parent looks for it."""
        # The parent's signal, which may come as soon as another rank has failed, must not cut this short.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        is_mistake = issubclass(kind, UserMistake)
        text = str(value) if is_mistake else "".join(traceback.format_exception(kind, value, trace))
        error.write_text(json.dumps({"time": time.time(), "is_mistake": is_mistake, "text": text}))
        # All is said: the parent's signal may end this process wherever it is, without a trace of where that was.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    sys.excepthook = report
    plain = json.loads(order.read_text())
    if is_first():
        from clbench.record.tracking import set_up_logging

        set_up_logging()
    take_part(from_plain(plain["config"]), command=plain["command"])


if __name__ == "__main__":
    main()
