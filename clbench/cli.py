"""The command line: has the configuration composed, checks it, starts the run, refreshes the leaderboard.

What the user got wrong is one line on standard error and exit code 2; what we got wrong is a
traceback and exit code 1. Heavy imports wait until a run really starts, so `--help` answers at once.
"""

import json
import math
import os
import shlex
import signal
import sys
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from types import FrameType
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from clbench.commands import FAILURES, put_in_reach, refuse
from clbench.config import Config, run_directory
from clbench.config.checks import check, check_extras, one_of, writable
from clbench.config.composition import (
    CONF_DIR,
    MISTAKES,
    mask_typed,
    one_line,
    register_schema,
    resolve,
    with_own_model,
)
from clbench.config.help import page
from clbench.progress import Line, log, set_up_logging
from clbench.types import NotWritten, UserMistake

SWEEP = "CLBENCH_SWEEP"
"""The variable that tells the jobs of a sweep, in whatever process, which file they say in how they ended."""


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end, `number`; its text says where the run was."""

    number = signal.SIGINT


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a job of a sweep ended: its run's directory ("" where there is none), what went wrong in one line, the exit code of that."""

    path: str = ""
    error: str = ""
    code: int = 0

    @property
    def is_complete(self) -> bool:
        """Also where another process completed it, or it has all but the measure that the sweeper looks for."""
        status = Path(self.path) / "status"
        ends = (b"complete\n", b"diverged: ")
        return not self.error or (self.path != "" and status.is_file() and status.read_bytes().startswith(ends))


def main() -> None:
    """Runs what the command line asks for."""
    if {"--help", "-h"} & {*sys.argv[1:]}:
        print(page(sys.argv[1:]))
        return
    put_in_reach(Path.cwd())
    register_schema()
    # Hydra then hands its exceptions to us instead of printing them over several lines and exiting with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        # Between overrides argparse would refuse those behind it.
        words = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
        sys.argv[1:] = with_own_model(words)
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(_job)()
    except (*FAILURES, ValueError) as error:
        # A sweeper gave up; Optuna's says by a ValueError that no trial has a value.
        if (jobs := ended()) and (isinstance(error, FAILURES) or not any(job.is_complete for job in jobs)):
            with suppress(NotWritten):
                end_sweep(Path(os.environ[SWEEP]).parent, quiet=True)
        if not isinstance(error, FAILURES):
            raise
        refuse(error)
    except BrokenProcessPool:
        print(
            "clbench: a process of the sweep was killed, as for want of memory; the same command continues",
            file=sys.stderr,
        )
        with suppress(NotWritten):
            end_sweep(Path(os.environ[SWEEP]).parent, quiet=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        print(f"clbench: {str(stop) or 'interrupted'}; the same command continues", file=sys.stderr)
        raise SystemExit(128 + number) from None
    finally:
        if SWEEP in os.environ:
            with suppress(NotWritten, OSError):  # what cannot be written there has been said
                mask_typed(Path(os.environ[SWEEP]).parent)
                Path(os.environ[SWEEP]).unlink(missing_ok=True)


def _job(composed: DictConfig) -> float | None:
    """One Hydra job. In a sweep what ends it is kept for the end, unless a launcher did not pass the sweep's variable on; then Hydra tells it."""
    heed_signals()
    mask_typed(Path(HydraConfig.get().sweep.dir))
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return _swept(composed) if SWEEP in os.environ else _run(resolve(composed))
    try:
        return _run(resolve(composed))
    except FAILURES as error:
        refuse(error)


def heed_signals() -> None:
    """SIGTERM, and where nobody else waits for them a scheduler's warning, SIGUSR1, and a closed terminal's SIGHUP, end a run as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        stopped = Stopped()
        stopped.number = signal.Signals(number)
        raise stopped

    signal.signal(signal.SIGTERM, stop)
    for number in (signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, stop)


def _swept(composed: DictConfig) -> float | None:
    """A job of a sweep: says how it ended, on the screen, in the sweep's file, and to a sweeper that looks for the best; a grid goes on."""
    path, value, failure = "", None, None
    try:
        config = resolve(composed)
        path = str(run_directory(config))
        value = _run(config)
        end = Ended(path=path)
    except FAILURES as error:
        failure = error
        end = Ended(path=path, error=one_line(error), code=2 if isinstance(error, MISTAKES) else 1)
        print(f"clbench: {end.error}", file=sys.stderr)
    with Path(os.environ[SWEEP]).open("a") as file:
        file.write(json.dumps(asdict(end)) + "\n")
    if failure is not None and not HydraConfig.get().sweeper._target_.endswith(".BasicSweeper"):
        raise failure
    return value


def _run(config: Config) -> float | None:
    """Runs it; gives the measure that `optimize` names, for a sweeper that looks for its best."""
    check(config)
    check_extras(config)
    if config.optimize is not None:
        from clbench.report.columns import MEASURES

        one_of("optimize", config.optimize, MEASURES)
    _say_first(config)
    path = _experiment(config, command=_command())
    if path is None:
        return None
    if HydraConfig.get().mode == RunMode.RUN:
        show_leaderboard(Path(config.results_dir), quiet=not config.tracking.progress)
    else:
        print(f"{path.name} is {(path / 'status').read_text().strip()}")
    if config.optimize is None:
        return None
    from clbench.report.summary import measured

    value = measured(path, config.optimize)
    if math.isnan(value):
        raise UserMistake(f"{path.name} has no {config.optimize}; name another measure in optimize")
    return value


def _say_first(config: Config) -> None:
    """A line at once, as libraries take seconds to load: what is run, and what was derived for a model of one's own."""
    if {os.environ.get(name, "0") for name in ("RANK", "SLURM_PROCID")} != {"0"}:
        return
    set_up_logging()
    if config.tracking.progress:
        model = config.model
        tasks = min(filter(None, (len(config.tasks), config.stream.limit, config.stream.last)))
        own = f" ({model['name']}; adapters on {model['targets']})" if model.get("targets") else ""
        what = f"{config.method['name']}, {tasks} tasks of {config.stream.name}, model {model['label']}{own}"
        log.info(
            "%s", fill(f"{run_directory(config).name}: {what}", 80, subsequent_indent="  ", break_on_hyphens=False)
        )


def _command() -> str:
    """What pastes back as this run, from the same folder: of a sweep, this job alone."""
    hydra_config = HydraConfig.get()
    added = [source.path for source in hydra_config.runtime.config_sources if source.provider == "command-line"]
    folders = [word for path in added for word in ("--config-dir", os.path.relpath(path))]
    return shlex.join(["python", "-m", "clbench", *folders, *hydra_config.overrides.task])


def _experiment(config: Config, *, command: str) -> Path | None:
    """Runs it in this process, in ranks started here, or as one rank of many; its directory, None where another rank writes."""
    loading = Line("loading libraries", name=run_directory(config).name, quiet=not config.tracking.progress)
    if config.engine.name == "deepspeed":
        with loading:
            from clbench.train.launch import assigned_rank, launch
        launched = assigned_rank(os.environ)
        os.environ |= launched
        return take_part(config, command=command) if launched else launch(take_part, config, command=command)
    with loading:
        from clbench.experiment import run
    return run(config, command=command)


def take_part(config: Config, *, command: str) -> Path | None:
    """Runs the experiment as the rank that the environment names; on the first rank, gives its directory."""
    size = int(os.environ["WORLD_SIZE"])
    if size != config.engine.processes:
        raise UserMistake(
            f"engine.processes={config.engine.processes}, but {size} processes were started; give both the same number"
        )
    from clbench.build import set_up_torch
    from clbench.experiment import run
    from clbench.train.launch import join, leave

    set_up_torch(config)
    ranks = join()
    if ranks.is_first:
        set_up_logging()
    path = run(config, command=command, ranks=ranks)
    ranks.wait()
    leave()
    return path if ranks.is_first else None


class Hooks(Callback):
    """What Hydra calls around the jobs of a sweep: a look at results_dir before Hydra itself writes there, the tables after the last job."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Opens the file in which jobs say how they ended; they may run in other processes, on other machines."""
        try:
            writable("results_dir", config.results_dir)
        except UserMistake as error:
            refuse(error)  # SystemExit: Hydra turns any other exception of a callback into a warning
        file = Path(config.results_dir).resolve() / f".sweep-{os.uname().nodename}-{os.getpid()}.jsonl"
        file.write_text("")
        os.environ[SWEEP] = str(file)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Says how the jobs ended."""
        end_sweep(Path(config.results_dir), quiet=not config.tracking.progress)


def ended() -> list[Ended]:
    """How the jobs of the sweep that this process began have ended so far; none where it began none."""
    file = Path(os.environ.get(SWEEP, ""))
    return [Ended(**json.loads(line)) for line in file.read_text().splitlines()] if file.is_file() else []


def end_sweep(results_dir: Path, *, quiet: bool) -> None:
    """Writes the tables, and exits with the code of what failed: 2 for mistakes of the user's, else 1."""
    show_leaderboard(results_dir, quiet=quiet)
    jobs = ended()
    failed = [job for job in jobs if not job.is_complete]
    if failed:
        print(f"{len(jobs) - len(failed)} of {len(jobs)} jobs are complete", file=sys.stderr)
        for job in failed:
            print(f"failed: {Path(job.path).name or 'a job'}: {job.error}", file=sys.stderr)
        raise SystemExit(2 if all(job.code == 2 for job in failed) else 1)


def show_leaderboard(results_dir: Path, *, quiet: bool) -> None:
    """Writes the leaderboard, prints its table and where its CSV is: once a command, as it reads every run that there is."""
    from clbench.report import tables as leaderboard

    with Line("writing the tables", quiet=quiet):
        table = leaderboard.refresh(results_dir)
    Console().print(table)
    print(f"leaderboard: {results_dir / 'leaderboard.csv'}")
