"""`python -m clbench.verify RUN|results_dir`: what differs, a line each, and exit code 1; or how many runs were verified."""

import sys
from argparse import ArgumentParser
from pathlib import Path

from clbench.leaderboard import run_command
from clbench.verify import verify


def _print(path: Path) -> int:
    found, count = verify(path)
    print("\n".join(found) if found else f"{count} runs verified")
    return int(bool(found))


if __name__ == "__main__":
    parser = ArgumentParser("python -m clbench.verify", description="Works out again what follows from the records.")
    sys.exit(run_command(parser, lambda options: _print(options.results_dir)))
