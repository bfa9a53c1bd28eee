"""Which rank a process is when another launcher started it."""

import os

import pytest

from clbench import worker

STEP = {
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
}
TORCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What a test leaves in the environment is gone after it."""
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if key not in TORCH})


def found() -> tuple[str, ...]:
    return tuple(os.environ[key] for key in TORCH)


def test_a_task_of_a_slurm_step_is_a_rank():
    os.environ |= STEP
    assert worker.is_rank() and not worker.is_first()
    assert found() == ("9", "1", "16", "gpu07", "23456")


def test_an_address_and_a_port_that_are_given_stay():
    os.environ |= STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert worker.is_rank() and found()[3:] == ("10.0.0.1", "29500")


def test_the_first_task_of_a_slurm_step_is_the_first_rank():
    os.environ |= STEP | {"SLURM_PROCID": "0"}
    assert worker.is_rank() and worker.is_first()


def test_a_slurm_job_of_one_task_is_no_rank():
    os.environ |= STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}
    assert not worker.is_rank() and worker.is_first() and "RANK" not in os.environ


def test_a_batch_script_is_no_rank_though_its_allocation_has_many_tasks():
    os.environ |= {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"}
    assert not worker.is_rank()


def test_torchs_own_variables_come_first():
    os.environ |= STEP | {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert worker.is_rank() and found() == ("3", "3", "4", "a", "1")


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
    assert worker.first_node(nodes) == first
