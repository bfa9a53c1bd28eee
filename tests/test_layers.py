"""Who may import whom, read from the syntax trees."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROWS = (
    {"types", "metrics"},
    {"protocols", "config_engine", "config", "contract"},
    {
        "world",
        "packing",
        "batches",
        "tokens",
        "data",
        "architecture",
        "last_layer",
        "loss",
        "sharding",
        "generation",
        "reading",
        "model",
        "pretrain",
        "adapters",
        "cur",
        "pairs",
        "meta",
        "memory",
        "optim",
        "parts",
        "ledger",
        "tracking",
        "runs",
    },
    {"engine", "engine_zero", "engine_shards", "engine_deepspeed"},
    {"student", "student_ranks", "vllm_writer", "cells", "stream", "statistics"},
    {"probes", "train", "canaries", "manifest"},
    {"build"},
    {"experiment", "estimate", "dry_run", "footprint"},
    {
        "launch",
        "worker",
        "cli",
        "leaderboard",
        "published",
        "report",
        "doctor",
        "forecast",
        "tuning",
        "bundle",
        "__main__",
    },
)
LEVEL = {name: level for level, names in enumerate(ROWS) for name in names}
VOCABULARY = {"types", "protocols", "data", "loss", "adapters", "cur", "pairs", "memory", "metrics"}


def imports(path: Path) -> set[str]:
    """What runs when the module runs: imports for type checkers alone do not count."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module(path: Path) -> str:
    relative = path.relative_to(ROOT / "clbench")
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


CLBENCH = sorted((ROOT / "clbench").rglob("*.py"))
OUTER = sorted([*(ROOT / "baselines").glob("*.py"), *(ROOT / "tasks").glob("*.py")])


@pytest.mark.parametrize("path", CLBENCH, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_its_own_row_and_lower_ones(path):
    name = module(path)
    if name == "__init__":
        return
    assert name in LEVEL, f"{name} has no row: add it to ROWS where it belongs"
    for imported in imports(path):
        parts = imported.split(".")
        assert parts[0] not in ("baselines", "tasks"), f"{name} imports {imported}"
        if parts[0] == "clbench" and len(parts) > 1 and parts[1] in LEVEL:
            assert LEVEL[parts[1]] <= LEVEL[name], f"{name} imports {imported}, which is above it"


@pytest.mark.parametrize("path", OUTER, ids=lambda path: str(path.relative_to(ROOT)))
def test_methods_and_tasks_import_only_the_vocabulary(path):
    own = path.parent.name
    for imported in imports(path):
        parts = imported.split(".")
        if parts[0] == "clbench" and len(parts) > 1:
            assert parts[1] in VOCABULARY, f"{path.name} imports {imported}"
        if own == "baselines":
            assert parts[0] not in ("tasks", "baselines", "deepspeed", "lm_eval", "transformers"), (
                f"{path.name} imports {imported}"
            )
        if own == "tasks":
            assert parts[0] not in ("baselines", "torch", "peft", "deepspeed"), f"{path.name} imports {imported}"


@pytest.mark.parametrize(
    ("package", "places"),
    [
        ("deepspeed", {"engine", "engine_deepspeed"}),
        ("lm_eval", {"probes"}),
        ("wandb", {"tracking"}),
        ("pandas", {"leaderboard", "report"}),
        ("matplotlib", {"report"}),
    ],
)
def test_a_heavy_package_has_one_place(package, places):
    users = {module(path) for path in CLBENCH if any(name.split(".")[0] == package for name in imports(path))}
    assert users <= places


def test_only_the_command_line_sees_a_dictconfig():
    users = {module(path) for path in CLBENCH if any(name.split(".")[0] == "omegaconf" for name in imports(path))}
    assert users <= {"cli", "doctor"}


def test_no_method_or_task_is_named_in_the_harness():
    names = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")} - {"base", "single", "joint"}
    for path in CLBENCH:
        constants = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not constants & names, f"{path.name} names {constants & names}"
