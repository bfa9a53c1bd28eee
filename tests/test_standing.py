"""What is said of a run after a stage: the numbers of the tables, read off its records while it goes on."""

import pytest

from clbench.report.standing import standing
from tests.test_leaderboard import ALPHA, write_run


# After stage 2 of ALPHA: learned (.8 + .7) / 2, kept (.9 + .7) / 2. After stage 3: learned 2.4 / 3, kept 2 / 3, half of .75 lost (test_leaderboard).
@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (0, "  learned -      kept -      retention 1.000  perplexity x1.00"),
        (2, "  learned 0.750  kept 0.800  retention 1.000  perplexity x1.00"),
        (3, "  learned 0.800  kept 0.667  retention 0.667  perplexity x2.00"),
    ],
)
def test_a_stage_is_summed_up_in_one_short_line(tmp_path, stage, said):
    path = write_run(tmp_path, "alpha", seed=0, matrix=ALPHA, status="running", stages=stage, fast=ALPHA[::-1])
    write_run(tmp_path, "beta", seed=0, matrix=ALPHA[::-1])
    assert standing(path, stage, by_task=False) == said and len(said) <= 70


def test_every_task_so_far_has_a_line_of_its_own_on_request(tmp_path):
    path = write_run(tmp_path, "alpha", seed=0, matrix=ALPHA, status="running", stages=2)
    _, *tasks = standing(path, 2, by_task=True).splitlines()
    assert tasks == ["  learned 0.800  kept 0.900  sums", "  learned 0.700  kept 0.700  food"]
