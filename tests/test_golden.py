"""The project's own functions against numbers that an independent implementation worked out.

The file is tests/golden/methods.json, or the one that CLBENCH_GOLDEN names: other seeds and shapes must pass as well.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench import metrics

HERE = Path(__file__).parent / "golden" / "methods.json"
DOUBLE = {"rel": 1e-6, "abs": 1e-12, "nan_ok": True}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(Path(os.environ.get("CLBENCH_GOLDEN", HERE)).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("average_accuracy", metrics.average_accuracy),
        ("learning_accuracy", metrics.learning_accuracy),
        ("bwt", metrics.bwt),
        ("forgetting", metrics.forgetting),
        ("fwt", metrics.fwt),
    ],
)
def test_matrix_metrics_equal_the_golden_numbers(golden, name, function):
    block = golden["metrics"]["matrix"]
    assert function(np.array(block["R"])) == pytest.approx(block["expect"][name], **DOUBLE)


def test_every_expected_matrix_number_is_checked(golden):
    expected = set(golden["metrics"]["matrix"]["expect"])
    assert expected == {"average_accuracy", "learning_accuracy", "bwt", "forgetting", "fwt"}


def test_retention_equals_the_golden_numbers(golden):
    block, expect = golden["metrics"]["retention"], golden["metrics"]["retention"]["expect"]
    names = [str(index) for index in range(len(block["before"]))]
    record = metrics.retention(
        dict(zip(names, block["before"], strict=True)),
        after=dict(zip(names, block["after"], strict=True)),
        chance={name: 1 / choices for name, choices in zip(names, block["n_choices"], strict=True)},
    )
    assert record.retention == pytest.approx(expect["retention"], **DOUBLE)
    for field, key in (
        ("retention", "per_probe"),
        *((key, key) for key in ("delta", "lost", "gained", "stderr_paired")),
    ):
        got = [getattr(probe, field) for probe in record.probes]
        assert got == pytest.approx([np.nan if value is None else value for value in expect[key]], **DOUBLE), key


def test_perplexity_equals_the_golden_numbers(golden):
    block = golden["metrics"]["perplexity"]
    expect, before, after = block["expect"], block["nll_nats_before"], block["nll_nats_after"]
    ratio = metrics.perplexity_ratio(before, after, count=block["n_words"])
    assert ratio == pytest.approx(expect["word_ppl_ratio"], **DOUBLE)
    bits_before = metrics.bits_per_byte(before, n_bytes=block["n_bytes"])
    assert bits_before == pytest.approx(expect["bits_per_byte_before"], **DOUBLE)
    drift = metrics.bits_per_byte(after - before, n_bytes=block["n_bytes"])
    assert drift == pytest.approx(expect["bits_per_byte_drift"], **DOUBLE)
