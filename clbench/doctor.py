"""What is there, and what an experiment will cost: `python -m clbench.doctor methods`, `python -m clbench.doctor +experiment=NAME`.

The table of methods is read from the sources: the Card at the end of each method's module docstring, and `conf/method/`. Nothing of a
method is imported for it. Of an experiment it prints the licences of its datasets and its cost (`clbench.forecast`), without loading a model.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from clbench.build import make_tasks
from clbench.cli import CONF_DIR, USERS_MISTAKES, compose
from clbench.protocols import Task
from clbench.stream import address
from clbench.types import UserMistake

PAGE = """# Datasets of the tasks

Written by `python -m clbench.doctor datasets > conf/task/README.md`; a test holds it against the yamls. The project holds none of
these rows. Terms are those that the dataset's card states; ask your own counsel. A revision "main" is a branch: no commit is pinned.

"""
USAGE = "usage: python -m clbench.doctor methods | datasets | [+experiment=NAME] [key=value ...] [gpu=h100] [utilisation=0.4] [engine.processes=8]"
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
        """The module that the yaml states, or else that its parent does."""
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


def task_rows(folder: Path) -> Iterator[tuple[str, ...]]:
    """(task, dataset, splits, licence, metric, rows) of every yaml in `folder` that reads a dataset."""
    for path in sorted(folder.glob("*.yaml")):
        task = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if "dataset" not in task:
            continue
        dataset = task["dataset"]
        source = f"{dataset['hub']}{' : ' + dataset['config'] if dataset.get('config') else ''} @ {dataset['revision']}"
        splits = f"{dataset['splits']['train']} / {dataset['splits']['test']}"
        metric = f"{task['metric']} v{task['metric_version']} ({task['metric_package']})"
        yield path.stem, source, splits, task["licence"], metric, f"{task['max_train']} / {task['max_test']}"


def datasets_page() -> str:
    """conf/task/README.md: what every task reads, under which terms, and how it is scored."""
    head = ("task", "hub dataset @ revision", "hub splits train / test", "licence", "metric", "rows at most")
    rows = [head, ("---",) * len(head), *task_rows(CONF_DIR / "task")]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return PAGE + "\n".join(lines) + "\n"


def licence_warning(licence: str) -> str:
    """What a user must know before training on data under `licence`; "" where nothing is."""
    if re.search(r"\bNC\b|non-?commercial", licence, flags=re.IGNORECASE):
        return "non-commercial"
    if not licence or re.search(r"unstated|unknown", licence, flags=re.IGNORECASE):
        return "no licence stated"
    return ""


def datasets_table(tasks: Mapping[str, Task]) -> Table:
    """Where each task's rows come from and under which terms."""
    table = Table(title="Datasets of the stream", title_justify="left", box=None)
    for heading in ("task", "dataset", "licence", "warning"):
        table.add_column(heading, overflow="fold")
    for name, task in tasks.items():
        source = address(task.dataset) if task.dataset is not None else "made here"
        warning = licence_warning(task.licence) if task.dataset is not None else ""
        table.add_row(name, source, task.licence, warning)
    return table


def main(arguments: Sequence[str]) -> int:
    """Prints what was asked for; 0, or 2 for a mistake of the user's."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(USAGE, file=sys.stderr)
        return 0 if arguments else 2
    try:
        if list(arguments) == ["methods"]:
            Console().print(methods_table())
        elif list(arguments) == ["datasets"]:
            print(datasets_page(), end="")
        else:
            Console(highlight=False, soft_wrap=True).print(datasets_table(make_tasks(compose(arguments))))
    except USERS_MISTAKES as error:
        print(f"clbench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
