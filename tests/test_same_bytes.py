"""Tables are the same bytes on every processor: numpy and BLAS have other code for each, which rounds otherwise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clbench import report

NUMBERS = """
import numpy as np
from clbench.report import metrics
from clbench.report.differences import compare

draw = np.random.default_rng(0)
first, last = draw.random((2, 504))
ratios = metrics.perplexity_ratio(0.0, draw.normal(size=10_000), count=1)
kept = metrics.retention({"facts": first}, after={"facts": last}, floor={"facts": 0.1}, chance={"facts": 0.1})
items = draw.random((4, 6, 504))
pairs = compare(items.mean(axis=2), items=items, starts=[0], lower_is_better=False)
print(ratios.tolist(), kept, metrics.paired_interval(first, last), pairs)
"""
OTHERS = {
    "without AVX-512": {"NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SKX"},
    "BLAS of another processor": {"OPENBLAS_CORETYPE": "Prescott"},
    "two threads": {"OMP_NUM_THREADS": "2"},
}
"""What stands in the environment to make this machine like another."""


def numbers(**other: str) -> str:
    """What every kind of number of the tables is in a process of its own."""
    plain = {name: value for name, value in os.environ.items() if name not in ("OPENBLAS_CORETYPE", "OMP_NUM_THREADS")}
    told = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | other
    done = subprocess.run([sys.executable, "-c", NUMBERS], env=plain | told, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def here() -> str:
    return numbers()


@pytest.mark.parametrize("name", OTHERS)
def test_the_numbers_of_tables_do_not_depend_on_the_processor(name, here):
    assert numbers(**OTHERS[name]) == here


def test_no_table_is_made_with_a_function_that_numpy_has_in_several_forms():
    made = "".join(path.read_text() for path in Path(report.__file__).parent.glob("*.py"))
    assert not re.findall(r"np\.(?:exp|log|power|float_power|sin|cos|tan|tanh)\w*\(", made)
