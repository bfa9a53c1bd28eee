"""How the cost of examinations grows with the stream: seconds per thousand test rows that were answered, in streams of 4, 8 and 16 tasks.

Counted are the rows of the tasks that all three streams have, as a row of another task may have a longer answer.
"""

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

from clbench import experiment
from clbench.config.composition import compose
from tests.benchmarks.race import Figure

LENGTHS = (4, 8, 16)


def run() -> Iterator[Figure]:
    """A figure for each length; its ratio is the seconds per row over those of the shortest stream."""
    shortest = math.nan
    for length in LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            settings = [f"results_dir={folder}", f"stream.limit={length}", "tracking.progress=false"]
            seconds, rows = examined(experiment.run(compose([*settings, "method=seq"])))
        each = 1000 * seconds / rows
        shortest = each if length == LENGTHS[0] else shortest
        yield Figure(
            benchmark="growth",
            case=f"{length} tasks: {rows} rows of the first {LENGTHS[0]}, {length + 1} examinations",
            peer=f"{LENGTHS[0]} tasks",
            unit="seconds per 1000 rows",
            ours=each,
            ours_spread=0.0,
            theirs=shortest,
            theirs_spread=0.0,
            ratio=each / shortest,
            wanted="1 (linear)",
            difference="",
        )


def examined(path: Path) -> tuple[float, int]:
    """Seconds that a run's cells of the matrix took for the tasks that all streams have, and the rows answered for them."""
    shared = json.loads((path / "manifest.json").read_text())["tasks"][: LENGTHS[0]]
    scores = [json.loads(line) for line in (path / "scores.jsonl").read_text().splitlines()]
    cells = [score for score in scores if score["probe"] == "stream" and score["task"] in shared]
    rows = {(cell["stage"], cell["task"]): cell["n"] for cell in cells}
    return sum(cell["seconds"] for cell in cells), sum(rows.values())
