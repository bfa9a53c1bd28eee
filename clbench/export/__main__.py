"""`python -m clbench.export RUN OUT`: the model that a run trained, as a checkpoint that transformers and PEFT open."""

import sys
from argparse import ArgumentParser
from pathlib import Path

from clbench.cli import put_in_reach, refuse
from clbench.export import export_run
from clbench.types import NotWritten, UserMistake

if __name__ == "__main__":
    parser = ArgumentParser(
        "python -m clbench.export", description="Writes what a run trained as an ordinary checkpoint."
    )
    parser.add_argument("run", type=Path, help="results_dir/runs/NAME")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--cache-dir", type=Path, help="where a model that was pretrained here is kept")
    options = parser.parse_args()
    put_in_reach(Path.cwd())
    try:
        has_adapter = export_run(options.run, options.out, cache_dir=options.cache_dir)
    except (UserMistake, NotWritten) as error:
        refuse(error)
    print(f"{options.out} for transformers" + (f", {options.out / 'adapter'} for PEFT" if has_adapter else ""))
    sys.exit(0)
