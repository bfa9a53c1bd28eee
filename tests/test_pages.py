"""What the pages show of results is what the files say."""

import re

import pandas as pd
import pytest

from tests.pages import BLOCKS, RESULTS, ROOT, against, filled

OTHER_WAY = {"better": "worse", "worse": "better", "not separated": "not separated"}


@pytest.mark.parametrize("page", BLOCKS, ids=[str(page.relative_to(ROOT)) for page in BLOCKS])
def test_the_tables_of_a_page_are_those_of_the_files(page):
    assert page.read_text(encoding="utf-8") == filled(page)


def test_no_finding_says_more_than_the_differences_do():
    """Behind each finding stand its pairs: `a > b` says that a is better, `a ~ b` that the two are not separated."""
    pairs = pd.read_csv(RESULTS / "reference" / "differences.csv").set_index(["measure", "method", "other"])["verdict"]
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    said = re.findall(r"<!-- (\w+): (.* [>~] .*) -->", page)
    assert len(said) > 8
    for measure, claims in said:
        for claim in claims.split("; "):
            method, sign, *others = claim.split()
            for other in others:
                there = pairs.get((measure, method, other)) or OTHER_WAY[pairs[measure, other, method]]
                assert there == {">": "better", "~": "not separated"}[sign], (measure, method, sign, other)


def test_a_method_is_set_against_another_whichever_side_of_the_pair_it_stands_on():
    columns = ["measure", "method", "other", "difference", "low", "high", "verdict"]
    pairs = pd.DataFrame(
        [
            ("average_accuracy", "seq", "er", -0.25, -0.5, 0.125, "not separated"),
            ("average_accuracy", "ewc", "seq", 0.5, 0.25, 0.75, "better"),
            ("average_accuracy", "ewc", "er", 9.0, 9.0, 9.0, "better"),
            ("log_perplexity_ratio", "seq", "er", 1.0, 0.5, 2.0, "worse"),
        ],
        columns=columns,
    )
    _, _, ewc, er = against("seq", pairs).splitlines()
    assert ewc == "| ewc | +0.500 [+0.250, +0.750] better | - | - |"
    assert er == "| er | +0.250 [-0.125, +0.500] | - | -1.000 [-2.000, -0.500] better |"
