"""A sample of `make test-faults`: kills, damaged files and mistakes, each a command in a fork of this process."""

from pathlib import Path

import pytest
import torch

from tests.faults.sample import kill, mistake, spoil

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork; make test-faults")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny model is from the first test on."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow  # make test has other kills (test_run)
def test_killed_runs_end_as_an_unbroken_one(tmp_path, cache):
    found = kill(3, seed=0, folder=tmp_path, cache=cache)
    assert not found.wrong and found.kinds.total() == 3


def test_damaged_files_change_no_number_of_a_ranked_run(tmp_path, cache):
    found = spoil(1, seed=0, folder=tmp_path, cache=cache)
    assert not found.wrong and found.outcomes.total() == 1


def test_mistakes_are_told_in_one_line(tmp_path, cache):
    outcomes, wrong = mistake(4, seed=0, folder=tmp_path, cache=cache)
    assert not wrong and len(outcomes) == 4
