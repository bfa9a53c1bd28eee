"""The tables that README.md and results/README.md show, made of the files in results/: `python -m tests.pages` writes them into the pages.

A page holds each between `<!-- NAME -->` and `<!-- /NAME -->`. tests/test_pages.py holds the pages against the files.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
COMPARED = {
    "average_accuracy": "average accuracy",
    "retention_probability": "probability kept of base knowledge",
    "log_perplexity_ratio": "log perplexity ratio",
}
SHOWN = ("method", "blocks", "accuracy", "learned", "BWT", "retention", "probability kept", "perplexity")


def validation() -> str:
    """The accuracies of an untouched model beside its published ones, with the standard errors of so many items."""
    rows = [("task", "shots", "items", "acc", "acc_norm", "published"), ("---",) * 6]
    for (task, shots, n), one in pd.read_csv(RESULTS / "real" / "validation.csv").groupby(
        ["task", "shots", "n"], sort=False
    ):
        by_metric = one.set_index("metric")
        acc, acc_norm = (
            f"{by_metric['value'][name]:.3f} ± {by_metric['stderr'][name]:.3f}" for name in ("acc", "acc_norm")
        )
        published = f"{one['published'].iloc[0]:.3f} ({one['published_shots'].iloc[0]}-shot)"
        rows.append((task, str(shots), str(n), acc, acc_norm, published))
    return table(rows)


def leaderboard(folder: str, *, most: int) -> str:
    """The first rows, `most` at most, of a folder's leaderboard.md in the columns SHOWN."""
    lines = (RESULTS / folder / "leaderboard.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    places = [rows[0].index(name) for name in SHOWN]
    return table([[row[place] for place in places] for row in rows[: 2 + most]])


def findings(folder: str) -> str:
    """What a folder's leaderboard.md says of differences."""
    lines = (RESULTS / folder / "leaderboard.md").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("- In "))


def against(other: str, pairs: pd.DataFrame) -> str:
    """Each method less `other` in the measures COMPARED, with the 95 % interval and the verdict; the highest average accuracy first.

    `pairs`: rows of differences.csv, in which `other` stands on either side.
    """
    left = pairs[pairs["method"] == other]
    turned = left.assign(
        method=left["other"],
        difference=-left["difference"],
        low=-left["high"],
        high=-left["low"],
        verdict=left["verdict"].replace({"better": "worse", "worse": "better"}),
    )
    own = pd.concat([pairs[pairs["other"] == other], turned])
    by = own.set_index(["measure", "method"]).sort_values("difference", ascending=False, kind="stable")
    rows = [("method", *COMPARED.values()), ("---",) * (1 + len(COMPARED))]
    for method in by.loc["average_accuracy"].index:
        cells = [by.loc[measure, method] if (measure, method) in by.index else None for measure in COMPARED]
        rows.append((method, *("-" if one is None else _told(one) for one in cells)))
    return table(rows)


def _told(pair: pd.Series) -> str:
    said = f"{pair['difference']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}]"
    return said if pair["verdict"] == "not separated" else f"{said} {pair['verdict']}"


def table(rows: list[tuple[str, ...]] | list[list[str]]) -> str:
    """As Markdown has it."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


BLOCKS: Mapping[Path, Mapping[str, Callable[[], str]]] = {
    ROOT / "README.md": {"reference": partial(leaderboard, "reference", most=10)},
    RESULTS / "README.md": {
        "findings": partial(findings, "reference"),
        "against": lambda: against("seq", pd.read_csv(RESULTS / "reference" / "differences.csv")),
        "validation": validation,
        "real": partial(leaderboard, "real", most=11),
    },
}
"""By page, what each of its blocks holds."""


def filled(page: Path) -> str:
    """The page's text with every block made anew."""
    text = page.read_text(encoding="utf-8")
    for name, block in BLOCKS[page].items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        text, count = re.subn(f"{begin}.*?{end}", f"{begin}{block()}{end}", text, flags=re.DOTALL)
        assert count == 1, (page, name, count)
    return text


if __name__ == "__main__":
    for one in BLOCKS:
        one.write_text(filled(one), encoding="utf-8")
