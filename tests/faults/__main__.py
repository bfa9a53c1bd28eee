"""`make test-faults`: kills, damaged files and users' mistakes over tiny runs; what went wrong, a line each, then the figures of results/README.md.

    python -m tests.faults [--seed 0] [--kills 200] [--damages 60] [--mistakes 80]

Every command is a fork of this process (`warm`). Where a run is killed and what is damaged follows from the seed and the case's number; when a kill
by the clock falls depends on the machine, too. Where something went wrong the folder stays.
"""

import os
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled", "DS_ACCELERATOR": "cpu"}

from tests.faults.mistakes import ALL  # noqa: E402
from tests.faults.sample import kill, mistake, spoil  # noqa: E402
from tests.faults.warm import TINY, command  # noqa: E402


def main(options) -> int:
    torch.set_num_threads(1)
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="clbench-faults-"))
    cache, where = folder / "cache", {"seed": options.seed}
    first = command([*TINY, "results_dir=results", f"cache_dir={cache}"], folder=folder / "first")
    assert first.code == 0, first.err
    killed = kill(options.kills, folder=folder / "kills", cache=cache, **where)
    damaged = spoil(options.damages, folder=folder / "damages", cache=cache, **where)
    outcomes, wrong = mistake(options.mistakes, folder=folder / "mistakes", cache=cache, **where)
    every = [*killed.wrong, *damaged.wrong, *wrong]
    print("", *every, sep="\n")
    times = [one.work for one in outcomes] or [0.0]
    for kind, figures, faults in (
        ("kills", f"{killed.kinds.total()} {dict(killed.kinds)} of {killed.runs} runs", killed.wrong),
        ("damaged files", f"{options.damages} {dict(damaged.outcomes)}", damaged.wrong),
        ("mistakes", f"{len(outcomes)}, told within {max(times):.1f} s (median {statistics.median(times):.1f})", wrong),
    ):
        print(f"{kind}: {figures}; {len(faults)} wrong")
    print(f"seed {options.seed}, {time.monotonic() - started:.0f} s" + (f"; see {folder}" if every else ""))
    return int(bool(every))


if __name__ == "__main__":
    parser = ArgumentParser("python -m tests.faults", description="Kills, damaged files and mistakes over tiny runs.")
    for name, default in (("seed", 0), ("kills", 200), ("damages", 60), ("mistakes", len(ALL))):
        parser.add_argument(f"--{name}", type=int, default=default)
    sys.exit(main(parser.parse_args()))
