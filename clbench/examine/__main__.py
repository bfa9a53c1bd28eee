"""`python -m clbench.examine RUN probe=NAME`: what the kept stages of a run give on other probes, beside its record."""

import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from clbench.commands import side_command
from clbench.config.checks import given, whole_number

OWN = ("stage", "cache_dir")


def _examine(options: Namespace) -> str:
    own = [word for word in options.words if word.partition("=")[0] in OWN]
    found = given(own, among=OWN)
    stage = whole_number("stage", found.get("stage"))
    # Heavy imports wait until the words are known to be right.
    from clbench.experiment.afterwards import examine_again
    from clbench.progress import set_up_logging
    from clbench.report.tables import refresh

    set_up_logging()
    path = examine_again(
        options.run,
        [word for word in options.words if word not in own],
        stage=stage,
        cache_dir=Path(found["cache_dir"]) if "cache_dir" in found else None,
        config_dir=options.config_dir,
        command=shlex.join(["python", "-m", "clbench.examine", *sys.argv[1:]]),
    )
    results_dir = path.parents[3]
    refresh(results_dir)
    return f"{path}; in {results_dir / 'stages.csv'} as {path.stem}/PROBE"


if __name__ == "__main__":
    parser = ArgumentParser(
        "python -m clbench.examine", description="Examines the kept stages of a run on other probes."
    )
    parser.add_argument("run", type=Path, help="results_dir/runs/NAME")
    help = "probe=NAME, probe.KEY=VALUE, data_dir=DIR; stage=K, without it all that are kept; cache_dir=DIR"
    parser.add_argument("words", nargs="*", metavar="key=value", help=help)
    parser.add_argument("--config-dir", "-cd", type=Path, help="a folder with yamls of your own")
    print(side_command(parser, _examine))
