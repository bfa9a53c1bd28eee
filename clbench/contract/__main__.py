"""`python -m clbench.contract [--config-dir DIR] method=NAME [key=value ...]`: a line for each check, exit code 1 where one fails."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from clbench.build import check_classes, set_up_torch
from clbench.commands import side_command
from clbench.config.composition import compose
from clbench.contract import checks
from clbench.contract.lab import TOY


def _hold(options: Namespace) -> int:
    """How many checks fail; what failed is printed as it is found."""
    failed = 0
    with TemporaryDirectory() as folder:
        words = [*TOY, *options.words, f"results_dir={folder}", f"cache_dir={folder}"]
        config = compose(words, config_dir=options.config_dir)
        check_classes(config)
        set_up_torch(config)
        for name, check in checks(config):
            try:
                check()
                print(f"held    {name}", flush=True)
            except AssertionError as error:
                failed += 1
                print(f"BROKEN  {name}: {error}", flush=True)
    return failed


if __name__ == "__main__":
    parser = ArgumentParser(
        "python -m clbench.contract", description="Holds a method to what every method has to keep."
    )
    parser.add_argument("words", nargs="+", metavar="key=value", help="method=NAME, and any key of the configuration")
    parser.add_argument("--config-dir", "-cd", type=Path, help="a folder with yamls of your own")
    sys.exit(min(side_command(parser, _hold), 1))
