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
SHOWN = ("method", "blocks", "accuracy", "learned", "BWT", "retention", "perplexity")


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


def table(rows: list[tuple[str, ...]] | list[list[str]]) -> str:
    """As Markdown has it."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


BLOCKS: Mapping[Path, Mapping[str, Callable[[], str]]] = {
    ROOT / "README.md": {"reference": partial(leaderboard, "reference", most=5)},
    RESULTS / "README.md": {"validation": validation},
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
