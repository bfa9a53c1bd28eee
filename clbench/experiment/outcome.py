"""What a finished run amounts to, worked out from its records alone."""

from math import isnan
from pathlib import Path

from clbench.record.tracking import Tracker


def send_outcome(path: Path, tracker: Tracker) -> None:
    """Gives the curves of the run recorded at `path`, if it has any, its measures, score matrix and report; of one that is not ranked,
    the report alone."""
    if not tracker.curves:
        return
    # These take a while to import.
    from clbench.report.html import page
    from clbench.report.summary import of_run

    summary = of_run(path)
    measures = summary.measures.to_dict("index").get(path.name, {})
    found = {
        "measures": {name: value for name, value in measures.items() if not isnan(value)},
        "matrix": summary.matrices[path.name].tolist() if measures else [],
        "stages": [stage.name for stage in tracker.stages],
        "report": page(summary, path.parents[1]),
    }
    for curves in tracker.curves:
        curves.outcome(**found)
