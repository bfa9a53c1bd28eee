"""One rank of an experiment. `python -m clbench.worker FOLDER` is what `train.ranks.launch` starts: it reads the frozen configuration from
FOLDER/order.json and writes what goes wrong to FOLDER/error-RANK.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType

from clbench.config import Config, from_plain
from clbench.train.ranks import die_with_parent, is_first, join, leave
from clbench.types import UserMistake


def take_part(config: Config, *, command: str) -> Path:
    """Runs the experiment as the rank that the environment names; gives the run's directory."""
    size = int(os.environ["WORLD_SIZE"])
    if size != config.engine.processes:
        raise UserMistake(
            f"engine.processes={config.engine.processes}, but {size} processes were started; give both the same number"
        )
    from clbench import experiment

    experiment.set_up_torch(config)
    ranks = join()
    path = experiment.run(config, command=command, ranks=ranks)
    ranks.wait()
    leave()
    return path


def main() -> None:
    """Entry point of a rank."""
    die_with_parent()
    folder = Path(sys.argv[1])

    def report(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        """Writes what ended this rank where the parent looks for it."""
        # The parent's signal may now end this process wherever it is, without a trace of where that was.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        is_mistake = issubclass(kind, UserMistake)
        text = str(value) if is_mistake else "".join(traceback.format_exception(kind, value, trace))
        written = folder / f"{os.environ['RANK']}.tmp"
        written.write_text(json.dumps({"time": time.time(), "is_mistake": is_mistake, "text": text}))
        written.replace(folder / f"error-{os.environ['RANK']}.json")

    sys.excepthook = report
    order = json.loads((folder / "order.json").read_text())
    if is_first():
        from clbench.record.tracking import set_up_logging

        set_up_logging()
    take_part(from_plain(order["config"]), command=order["command"])


if __name__ == "__main__":
    main()
