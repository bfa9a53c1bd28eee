"""Which setting of each method a search prefers: `python -m clbench.tuning RESULTS_DIR`.

The search itself is a Hydra multirun on another world (`make tune`, conf/experiment/tune). Every method is judged by the same number,
fixed before any run: the mean of average accuracy and of retention held to [0, 1]. A setting that did not finish, or whose retention is
undefined, cannot be chosen. Writes RESULTS_DIR/tuning.csv, one row per run, best first within each method.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path

from clbench.config import identity
from clbench.runs import Run, read_runs
from clbench.statistics import summarise

COLUMNS = ("method", "setting", "average_accuracy", "retention", "perplexity_ratio", "criterion", "chosen", "run")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a search: what was varied, and fractions of 1."""

    method: str
    setting: str
    average_accuracy: float
    retention: float
    perplexity_ratio: float
    run: str

    @property
    def criterion(self) -> float:
        """Mean of accuracy and of retention held to [0, 1]; minus infinity where retention is undefined."""
        return (
            float("-inf") if isnan(self.retention) else (self.average_accuracy + min(max(self.retention, 0.0), 1.0)) / 2
        )


def trials(runs: Sequence[Run]) -> list[Trial]:
    """The complete runs as trials, best first within each method."""
    by_method: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.state == "complete":
            by_method[run.method].append(run)
    found = []
    for method, members in sorted(by_method.items()):
        flat = [identity(run.manifest["config"]) for run in members]
        varied = sorted(key for key in set().union(*flat) if len({repr(config.get(key)) for config in flat}) > 1)
        for run, config in zip(members, flat, strict=True):
            summary = summarise(run)
            found.append(
                Trial(
                    method=method,
                    setting=" ".join(f"{key}={config.get(key)}" for key in varied),
                    average_accuracy=summary.average_accuracy,
                    retention=summary.retention,
                    perplexity_ratio=summary.perplexity_ratio,
                    run=run.name,
                )
            )
    return sorted(found, key=lambda trial: (trial.method, -trial.criterion, trial.setting))


def main(arguments: Sequence[str]) -> int:
    """Writes and prints the trials of a results folder."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python -m clbench.tuning RESULTS_DIR (a folder that holds runs/)", file=sys.stderr)
        return 2
    chosen: set[str] = set()
    with (Path(arguments[0]) / "tuning.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for trial in trials(read_runs(Path(arguments[0]))):
            best = trial.method not in chosen
            chosen.add(trial.method)
            numbers = [
                round(value, 4)
                for value in (trial.average_accuracy, trial.retention, trial.perplexity_ratio, trial.criterion)
            ]
            writer.writerow([trial.method, trial.setting, *numbers, int(best), trial.run])
            if best:
                print(
                    f"{trial.method:16} {trial.setting:60} accuracy {numbers[0]:.3f}  retention {numbers[1]:.3f}  criterion {numbers[3]:.3f}"
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
