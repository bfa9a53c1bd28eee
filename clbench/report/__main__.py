"""`python -m clbench.report [results_dir]`: one HTML file from the records of all runs."""

import sys

from clbench.leaderboard import run_command
from clbench.report.html import write

if __name__ == "__main__":
    sys.exit(
        run_command(
            "python -m clbench.report", about="Run directories to one HTML file.", action=lambda d: print(write(d))
        )
    )
