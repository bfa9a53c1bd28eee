"""What is there, and what this machine can run: `python -m clbench.doctor methods`.

The table of methods is read from the sources: the Card at the end of each method's module docstring, and `conf/method/`. Nothing of a
method is imported.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from clbench.cli import CONF_DIR
from clbench.types import UserMistake

CARD = ("paper", "trainable", "memory", "compute", "deviations")


def card(module: str) -> dict[str, str]:
    """The Card of a method's module: the lines `- key: value` after `Card:` in its docstring."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserMistake(f"module {module!r} cannot be found; check _target_ in conf/method")
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    lines = text.partition("\nCard:\n")[2].splitlines()
    found = dict(line.removeprefix("- ").split(": ", 1) for line in lines if line.startswith("- "))
    missing = [key for key in CARD if key not in found]
    if missing:
        raise UserMistake(f"the docstring of {module} lacks {', '.join(missing)} in its Card; see CONTRIBUTING.md")
    return found


def targets(folder: Path) -> dict[str, str]:
    """The module of every method yaml, its own or the one it inherits."""

    def target(name: str) -> str:
        loaded = OmegaConf.load(folder / f"{name}.yaml")
        stated = OmegaConf.select(loaded, "method._target_")
        if stated is not None:
            return str(stated).rpartition(".")[0]
        return target(next(parent for parent in loaded.defaults if isinstance(parent, str)))

    return {path.stem: target(path.stem) for path in sorted(folder.glob("*.yaml"))}


def methods_table() -> Table:
    """Every method of conf/method with its card."""
    table = Table(title="Methods", show_lines=True)
    for column in ("method", *CARD):
        table.add_column(column, overflow="fold")
    for name, module in targets(CONF_DIR / "method").items():
        table.add_row(name, *(card(module)[key] for key in CARD))
    return table


def main(arguments: Sequence[str]) -> int:
    """Prints what was asked for; 0, or 2 for a mistake of the user's."""
    if list(arguments) != ["methods"]:
        print("usage: python -m clbench.doctor methods", file=sys.stderr)
        return 0 if "--help" in arguments or "-h" in arguments else 2
    try:
        Console().print(methods_table())
    except UserMistake as error:
        print(f"clbench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
