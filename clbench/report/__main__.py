"""`python -m clbench.report [results_dir]`: one HTML file from the records of all runs."""

import sys
from argparse import ArgumentParser

from clbench.leaderboard import run_command
from clbench.report.html import write

if __name__ == "__main__":
    parser = ArgumentParser("python -m clbench.report", description="The records of all runs to one HTML file.")
    sys.exit(run_command(parser, lambda options: print(write(options.results_dir))))
