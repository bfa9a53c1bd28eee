"""The map in clbench/README.md, held against the imports in the sources."""

from __future__ import annotations

import ast
import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "clbench" / "README.md").read_text(encoding="utf-8")
CLBENCH = sorted((ROOT / "clbench").rglob("*.py"))
OUTER = sorted([*(ROOT / "baselines").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")])
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in CLBENCH + OUTER
}
MOST_MODULES = 12


def read_map():
    """Each room and the rooms that it may import, in the order of the page."""
    lines = re.search(r"```layers\n(.*?)```", PAGE, flags=re.DOTALL)[1].splitlines()
    return {room: allowed.split() for room, _, allowed in (line.partition(":") for line in lines)}


MAP = read_map()


def imports(path, *, typing=False):
    """What a module imports wherever in it; with `typing` what type checkers alone see, too."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    if not typing:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path):
    """The room of a module: the package or module of clbench that it is (in), `__main__` for a package's command, else its folder."""
    relative = path.relative_to(ROOT).with_suffix("")
    if relative.parts[0] != "clbench":
        return relative.parts[0]
    return "__main__" if relative.name == "__main__" else relative.parts[1]


def room_of(name):
    """The room of an imported module or name; None outside the project."""
    parts = name.split(".")
    if parts[0] in ("baselines", "tasks"):
        return parts[0]
    return parts[1] if parts[0] == "clbench" and len(parts) > 1 else None


def users(package):
    """The modules of clbench that import `package`, as paths below it."""
    return {
        str(path.relative_to(ROOT / "clbench"))
        for path in CLBENCH
        if any(name.split(".")[0] == package for name in imports(path))
    }


def test_the_map_names_every_room_once_and_only_rooms_above_a_line():
    rooms = {room(path) for path in CLBENCH + OUTER if path != ROOT / "clbench" / "__init__.py"}
    assert set(MAP) == rooms
    above = set()
    for name, allowed in MAP.items():
        assert set(allowed) <= above, f"{name} may import {set(allowed) - above}, which the map has further down"
        above.add(name)


@pytest.mark.parametrize("path", CLBENCH, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_the_map_allows_its_room(path):
    here = room(path)
    for name in imports(path):
        there = room_of(name)
        assert there is None or there == here or there in MAP[here], f"{here} may not import {name}: clbench/README.md"


@pytest.mark.parametrize("path", OUTER, ids=lambda path: str(path.relative_to(ROOT)))
def test_methods_and_tasks_import_only_the_vocabulary(path):
    own = room(path)
    foreign = {
        "baselines": ("tasks", "deepspeed", "lm_eval", "transformers"),
        "tasks": ("baselines", "torch", "peft", "deepspeed"),
    }
    for name in imports(path):
        assert name.split(".")[0] not in foreign[own], f"{path.name} imports {name}"
        assert room_of(name) in (None, own, *MAP[own]), f"{path.name} imports {name}"


def test_methods_meet_no_module_that_knows_of_ranks():
    for path in OUTER:
        for name in imports(path) & MODULES.keys():
            known = imports(MODULES[name])
            assert not any(found.startswith(("deepspeed", "torch.distributed")) for found in known), (path.name, name)


def test_no_two_modules_import_each_other_not_even_for_types():
    graph = {name: imports(path, typing=True) & MODULES.keys() for name, path in MODULES.items()}
    mutual = {(one, other) for one, found in graph.items() for other in found if one < other and one in graph[other]}
    assert not mutual


def test_no_folder_of_clbench_is_crowded():
    for folder in {path.parent for path in CLBENCH}:
        modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        assert len(modules) <= MOST_MODULES, f"{folder.relative_to(ROOT)} has {len(modules)} modules"


@pytest.mark.parametrize(
    ("package", "places"),
    [
        ("deepspeed", ("train/", "models/sharding.py")),
        ("lm_eval", ("examine/",)),
        ("wandb", ("record/curves.py",)),
        ("pandas", ("report/", "record/runs.py")),
    ],
)
def test_a_heavy_package_has_one_place(package, places):
    assert all(path.startswith(places) for path in users(package)), users(package)


def test_only_the_command_line_sees_a_dictconfig():
    assert users("omegaconf") <= {"cli.py", "doctor.py", "hub.py", "config/composition.py"}


def test_no_method_or_task_is_named_in_the_harness():
    names = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")} - {"base", "single", "joint"}
    for path in CLBENCH:
        constants = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not constants & names, f"{path.name} names {constants & names}"


def test_the_files_that_the_map_names_are_there():
    named = set(re.findall(r"`([a-z_/]+\.py)`", PAGE)) - {"tests/test_layers.py"}
    assert named and not {name for name in named if not (ROOT / "clbench" / name).is_file()}


@pytest.mark.parametrize(
    "name",
    sorted(name for name, path in MODULES.items() if "\n>>> " in path.read_text() or "    >>> " in path.read_text()),
)
def test_the_examples_of_a_docstring_give_what_they_show(name):
    results = doctest.testmod(import_module(name))
    assert results.attempted and not results.failed
