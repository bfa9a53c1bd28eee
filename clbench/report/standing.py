"""How a run stands after a stage: the few numbers that a person follows, as the tables will have them."""

from dataclasses import replace
from math import isnan, nan
from pathlib import Path

import numpy as np

from clbench.record.runs import read_runs
from clbench.report.summary import retention_by_stage, score_matrices


def standing(path: Path, stage: int, *, by_task: bool) -> str:
    """A line about the run recorded at `path`; with `by_task` one about each task trained so far below it.

    It has the means over those tasks of what was learned and what is kept of it, the share of base knowledge kept and the perplexity as a multiple
    of the base's; "-" where there is no such number.
    """
    records = read_runs(path.parents[1], only=path.name)
    runs = records.runs.set_index("run")
    ((_, matrix),) = score_matrices(records.scores, runs)
    measured = records.scores[records.scores["stage"].isin((0, stage))]
    now = retention_by_stage(replace(records, scores=measured))[0].iloc[-1]
    learned, kept = np.diagonal(matrix[1:]), matrix[stage, :stage]
    means = (learned.mean(), kept.mean()) if stage else (nan, nan)
    lines = [
        f"{_both(*means)}  retention {_cell(now['retention'])}  perplexity x{_cell(now['perplexity_ratio'], '.2f')}"
    ]
    if by_task:
        lines += [f"{_both(*own)}  {task}" for task, *own in zip(runs["tasks"].iloc[0], learned, kept, strict=False)]
    return "\n".join(f"  {line}" for line in lines)


def _both(learned: float, kept: float) -> str:
    return f"learned {_cell(learned)}  kept {_cell(kept)}"


def _cell(value: float, form: str = ".3f") -> str:
    """
    >>> _cell(0.5), _cell(nan)
    ('0.500', '-    ')
    """
    return "-".ljust(len(f"{0:{form}}")) if isnan(value) else f"{value:{form}}"
