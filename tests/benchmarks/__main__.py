"""`make bench`: every benchmark, or those named; prints each figure, writes results/benchmarks.csv and the table in results/README.md.

    python -m tests.benchmarks [scoring training stream real growth limit startup]

Rows of benchmarks that are not run stay as they are. One thread, repetitions of ours and of the peers by turns, results compared first.
"""

import math
import platform
import sys
from dataclasses import asdict
from datetime import date
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
import transformers

from tests.benchmarks.race import Figure

ROOT = Path(__file__).resolve().parents[2]
CSV = ROOT / "results" / "benchmarks.csv"
PAGE = ROOT / "results" / "README.md"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
NAMES = ("scoring", "training", "stream", "real", "growth", "limit", "startup")
LIBRARIES = ("torch", "transformers", "peft", "lm-eval")


def main(names: list[str]) -> None:
    """Runs them, each in turn."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where = {"date": date.today().isoformat(), "cpu": processor(), "threads": 1}
    where |= {library: version(library) for library in LIBRARIES}
    for name in names or NAMES:
        found = []
        for figure in import_module(f"tests.benchmarks.{name}").run():
            print(line(figure), flush=True)
            found.append(asdict(figure) | where)
            record(name, found)  # each at once, so that one that is stopped leaves what it measured


def record(name: str, found: list[dict[str, object]]) -> None:
    """Puts a benchmark's figures in place of those it had, in the CSV and in the page's table."""
    kept = pd.read_csv(CSV, dtype=str, keep_default_na=False) if CSV.is_file() else pd.DataFrame(columns=list(found[0]))
    rows = pd.concat([kept[kept["benchmark"] != name], pd.DataFrame(found).map(written)])
    rows["place"] = rows["benchmark"].map(NAMES.index)
    rows.sort_values("place", kind="stable").drop(columns="place").to_csv(CSV, index=False)
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


def written(value: object) -> object:
    """A number in four digits, nothing where there is none."""
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.4g}"


def line(figure: Figure) -> str:
    """What is printed of a figure."""
    return (
        f"{figure.benchmark}: {figure.case} | {figure.peer} | ours {figure.ours:.3f} theirs {figure.theirs:.3f} {figure.unit} | "
        f"{figure.ratio:.2f} (wanted {figure.wanted})"
    )


def table() -> str:
    """The table of results/README.md, from the CSV."""
    rows = pd.read_csv(CSV, keep_default_na=False)
    lines = ["| work | against | figure | target |", "|---|---|---|---|"]
    for row in rows.to_dict("records"):
        figure = f"{float(row['ratio']):.2f}" + ("×" if row["theirs"] != "" else f" ({row['unit']})")
        lines.append(f"| {row['benchmark']}: {row['case']} | {row['peer']} | {figure} | {row['wanted']} |")
    return "\n".join(lines)


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    names = (
        [row.partition(":")[2].strip() for row in info.read_text().splitlines() if row.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main(sys.argv[1:])
