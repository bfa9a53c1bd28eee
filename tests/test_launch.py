"""Which rank a process is when another launcher started it."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import joblib
import pytest
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from clbench.cli import take_part
from clbench.config.composition import compose
from clbench.train import launch as launching
from clbench.train.launch import launch
from clbench.types import RankFailed, UserMistake
from tests.conftest import QUIET, TINY_MODEL, TINY_STREAM
from tests.test_run import scores

ROOT = Path(__file__).resolve().parent.parent

STEP = {
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
}
TORCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def test_a_task_of_a_slurm_step_is_a_rank():
    assert tuple(map(launching.assigned_rank(STEP).get, TORCH)) == ("9", "1", "16", "gpu07", "23456")


def test_an_address_and_a_port_that_are_given_stay():
    found = launching.assigned_rank(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "29500")


def test_the_first_task_of_a_slurm_step_is_the_first_rank():
    assert launching.assigned_rank(STEP | {"SLURM_PROCID": "0"})["RANK"] == "0"


def test_a_slurm_job_of_one_task_is_no_rank():
    assert launching.assigned_rank(STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}) == {}


def test_a_batch_script_is_no_rank_though_its_allocation_has_many_tasks():
    assert launching.assigned_rank({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"}) == {}


def test_torchs_own_variables_come_first():
    own = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert own | launching.assigned_rank(STEP | own) == own


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu07,gpu08", "gpu07"),
        ("gpu[007-009,12],login", "gpu007"),
        ("gpu[3]", "gpu3"),
        ("a[1,4-5].cluster,b[1-2]", "a1.cluster"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert launching.first_node(nodes) == first


def test_the_rank_that_failed_first_is_heard_even_if_another_ended_before(tmp_path):
    reports = [tmp_path / name for name in ("0", "1", "none")]
    for seconds, (report, text) in enumerate(
        zip(reports, ("Traceback\nRuntimeError: gone", "Traceback\nKeyError: 3"), strict=False)
    ):
        report.write_bytes(pickle.dumps(text))
        os.utime(report, ns=(0, 10**9 + 10**6 * (1 - seconds)))
    error = launching.failure(
        ProcessRaisedException("", error_index=0, error_pid=1), [str(report) for report in reports]
    )
    assert isinstance(error, RankFailed) and str(error) == "Traceback\nKeyError: 3"
    assert not list(tmp_path.iterdir())


def test_a_users_mistake_is_told_from_a_failure(tmp_path):
    report = tmp_path / "0"
    report.write_bytes(
        pickle.dumps(f"Traceback\n  x: y\n{UserMistake.__module__}.UserMistake: resume=must: there is no run\n")
    )
    error = launching.failure(ProcessRaisedException("", error_index=0, error_pid=1), [str(report)])
    assert isinstance(error, UserMistake) and str(error) == "resume=must: there is no run"


def test_a_rank_that_ended_without_a_word_is_named(tmp_path):
    ended = {"msg": "", "error_index": 1, "error_pid": 1}
    killed = ProcessExitedException(**ended, exit_code=-6, signal_name="SIGABRT")
    assert str(launching.failure(killed, [])) == "rank 1 was killed by signal 6 (SIGABRT)"
    assert str(launching.failure(ProcessExitedException(**ended, exit_code=3), [])) == "rank 1 ended with exit code 3"


ENGINE = ("engine=deepspeed", "engine.processes=2", "engine.zero_stage=2", "method=er")


@pytest.fixture(scope="module")
def expected(cache_dir, tmp_path_factory) -> list[dict]:
    """The scores of a run in two ranks that clbench starts itself."""
    places = (f"cache_dir={cache_dir}", f"results_dir={tmp_path_factory.mktemp('own')}")
    return scores(launch(take_part, compose([*TINY_MODEL, *TINY_STREAM, *QUIET, *places, *ENGINE]), command=""))


def recorded(tmp_path: Path) -> list[dict]:
    (path,) = (tmp_path / "results" / "runs").iterdir()
    assert (path / "status").read_text() == "complete\n"
    return scores(path)


def launched(command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=dict(os.environ) | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    printed = process.communicate(timeout=300)[0]
    return process.returncode, printed[-3000:]


@pytest.mark.slow
def test_a_job_of_a_joblib_sweep_starts_ranks(expected, overrides, tmp_path):
    jobs = [joblib.delayed(launch)(take_part, compose([*overrides, *ENGINE]), command="")]
    joblib.Parallel(n_jobs=2)(jobs)
    assert recorded(tmp_path) == expected


@pytest.mark.slow
def test_torchrun_gives_the_scores_of_ranks_that_clbench_starts(expected, overrides, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "clbench"]
    code, printed = ended(launched([*torchrun, *overrides, *ENGINE]))
    assert code == 0, printed
    assert recorded(tmp_path) == expected and printed.count("leaderboard: ") == 1


@pytest.mark.slow
def test_srun_gives_the_scores_of_ranks_that_clbench_starts(expected, overrides, tmp_path):
    step = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(get_free_port())}
    tasks = [
        launched(
            [sys.executable, "-m", "clbench", *overrides, *ENGINE], step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        )
        for rank in "01"
    ]
    for code, printed in map(ended, tasks):
        assert code == 0, printed
    assert recorded(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--no_local_rank"], []])
def test_deepspeeds_launcher_works_as_the_readme_says(expected, overrides, tmp_path, flags):
    port = ["--num_gpus=2", f"--master_port={get_free_port()}"]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", *port, *flags, "--module", "clbench"]
    code, printed = ended(launched([*runner, *overrides, *ENGINE]))
    if flags:
        assert code == 0, printed
        assert recorded(tmp_path) == expected
    else:
        assert code != 0 and "unrecognized arguments: --local_rank" in printed and not (tmp_path / "results").exists()
