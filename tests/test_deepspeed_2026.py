"""The methods of 2026 on two processes and the ZeRO stages on which test_deepspeed does not try them."""

import pytest

from tests.test_deepspeed import SELDOM, check_weights, pair  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", (0, 1, 2))
@pytest.mark.parametrize("case", SELDOM)
def test_two_processes_train_the_weights_of_one(pair, case, stage):  # noqa: F811
    check_weights(pair, case, stage)
