"""What is said of differences, of a table written by hand."""

import pandas as pd

from clbench.report.tables import findings

SETTING = {"stream": "three", "model": "tiny", "stream_hash": "abc"}
ROWS = pd.DataFrame([SETTING | {"method": name, "variant": "1", "label": name} for name in ("er", "seq", "ewc", "l2")])
NAMES = ["er", "seq", "ewc", "l2"]


def table(measure: str, verdicts: dict[tuple[str, str], str], *, q: float = 0.01) -> pd.DataFrame:
    pairs = [(left, right) for number, left in enumerate(NAMES) for right in NAMES[number + 1 :]]
    return pd.DataFrame(
        SETTING
        | {"measure": measure, "method": left, "variant": "1", "other": right, "other_variant": "1"}
        | {"q": q, "verdict": verdicts.get((left, right), "not separated")}
        for left, right in pairs
    )


def test_the_row_that_is_better_than_most_is_named_with_those_it_beats_whichever_side_of_the_pair_it_stands_on():
    told = {("er", "seq"): "better", ("er", "ewc"): "better", ("seq", "ewc"): "worse"}
    (sentence,) = findings(table("average_accuracy", told), ROWS)
    assert sentence == "In average accuracy er is better than seq and ewc; 3 of 6 pairs can be told apart."
    told = {("er", "l2"): "worse", ("seq", "l2"): "worse", ("ewc", "l2"): "worse"}
    (sentence,) = findings(table("log_perplexity_ratio", told), ROWS)
    assert sentence == "In perplexity l2 is better than er, seq and ewc; 3 of 6 pairs can be told apart."


def test_rows_that_beat_as_many_are_all_named():
    told = {("er", "seq"): "better", ("ewc", "l2"): "better"}
    (sentence,) = findings(table("retention_probability", told), ROWS)
    assert sentence == (
        "In the probability kept of base knowledge er is better than seq; ewc is better than l2; 2 of 6 pairs can be told apart."
    )


def test_where_nothing_is_separated_that_is_said_and_where_nothing_was_tested_nothing():
    assert list(findings(table("average_accuracy", {}), ROWS)) == [
        "In average accuracy none of 6 pairs can be told apart."
    ]
    assert not list(findings(table("average_accuracy", {}, q=float("nan")), ROWS))
    assert not list(findings(table("average_accuracy", {}), ROWS.assign(stream_hash="other data")))


def test_of_many_that_a_row_beats_the_number_is_said():
    losers = [f"l2-{number}" for number in range(13)]
    rows = pd.DataFrame([SETTING | {"method": name, "variant": "1", "label": name} for name in ("er", "seq", *losers)])
    verdicts = {loser: "better" for loser in losers} | {"seq": "not separated"}
    pairs = pd.DataFrame(
        SETTING
        | {"measure": "average_accuracy", "method": "er", "variant": "1", "other": other, "other_variant": "1"}
        | {"q": 0.01, "verdict": verdict}
        for other, verdict in verdicts.items()
    )
    (sentence,) = findings(pairs, rows)
    assert sentence == "In average accuracy er is better than 13 of 14 others; 13 of 14 pairs can be told apart."
