"""What the differences between the rows of a setting come to, in sentences."""

from collections.abc import Iterator

import pandas as pd

SAID = {
    "average_accuracy": "average accuracy",
    "retention_probability": "the probability kept of base knowledge",
    "log_perplexity_ratio": "perplexity",
}
"""The measures of differences.csv that are spoken of, and how they read."""


def findings(differences: pd.DataFrame, rows: pd.DataFrame) -> Iterator[str]:
    """A sentence for each measure of SAID: the rows that are better than the most others, and of how many pairs one can be told from the other.

    `rows`: rows of the leaderboard that share a setting. `differences`: pairs of rows, these among them. Nothing is said of pairs without a test.
    """
    labels = {(row.method, row.variant): row.label for row in rows.itertuples()}
    setting = rows.iloc[0][["stream", "model", "stream_hash"]]
    pairs = differences[(differences[setting.index] == setting).all(axis=1) & differences["q"].notna()]
    for measure, name in SAID.items():
        own = pairs[pairs["measure"] == measure]
        if own.empty:
            continue
        beaten: dict[str, list[str]] = {}
        for row in own[own["verdict"].isin(["better", "worse"])].itertuples():
            left, right = labels[row.method, row.variant], labels[row.other, row.other_variant]
            winner, loser = (left, right) if row.verdict == "better" else (right, left)
            beaten.setdefault(winner, []).append(loser)
        if not beaten:
            yield f"In {name} none of {len(own)} pairs can be told apart."
            continue
        most = max(map(len, beaten.values()))
        best = [f"{winner} is better than {listed(losers)}" for winner, losers in beaten.items() if len(losers) == most]
        yield f"In {name} {'; '.join(best)}; {sum(map(len, beaten.values()))} of {len(own)} pairs can be told apart."


def listed(names: list[str]) -> str:
    """
    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join([*filter(None, [", ".join(names[:-1])]), names[-1]])
