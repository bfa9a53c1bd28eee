"""What CI leaves to the slow suite: the methods of 2026 on the ZeRO stages on which test_deepspeed does not try them, and memory stage by stage."""

import pytest

from tests.test_deepspeed import SELDOM, STAGES, Pair, check_weights, pair, two  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", (0, 1, 2))
@pytest.mark.parametrize("case", SELDOM)
def test_two_processes_train_the_weights_of_one(pair, case, stage):  # noqa: F811
    check_weights(pair, case, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_sixteen_engines_take_no_more_memory_than_two(stage, tmp_path):
    fresh = Pair(tmp_path)
    for resident in fresh.ask("life", *two(stage))["resident"]:
        assert resident[-1] <= 1.05 * resident[1]
    fresh.end()
