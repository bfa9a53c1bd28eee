"""`python -m clbench.export RUN out=DIR [stage=K]`: the model that a run trained, as a checkpoint that transformers and PEFT open."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from clbench.commands import side_command
from clbench.config.checks import given, whole_number
from clbench.types import UserMistake


def _export(options: Namespace) -> str:
    found = given(options.words, among=("out", "stage", "cache_dir"))
    if "out" not in found:
        raise UserMistake("say where to: out=DIR, a new folder")
    out, cache_dir = Path(found["out"]), Path(found["cache_dir"]) if "cache_dir" in found else None
    stage = whole_number("stage", found.get("stage"))
    from clbench.export import export_run  # which is heavy: the words are right

    no_adapter = export_run(options.run, out, stage=stage, cache_dir=cache_dir)
    return f"{out} for transformers, " + (
        f"none for PEFT: {no_adapter}" if no_adapter else f"{out / 'adapter'} for PEFT"
    )


if __name__ == "__main__":
    parser = ArgumentParser(
        "python -m clbench.export", description="Writes what a run trained as an ordinary checkpoint."
    )
    parser.add_argument(
        "run", type=Path, help="results_dir/runs/NAME, or NAME@VIEW for a secondary view of its weights"
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="key=value",
        help="out=DIR, a new folder; stage=K, the last unless given; cache_dir=DIR",
    )
    print(side_command(parser, _export))
