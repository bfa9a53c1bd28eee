"""What is installed: every import declared, every dependency imported, one line where an extra is missing (test_tracking runs without any)."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from clbench import cli
from clbench.record.manifest import versions, versions_of

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"clbench", "baselines", "tasks", "tests"}
OTHERWISE = {"hydra": "hydra-core", "sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Modules that another distribution brings than their name says."""


def plain(name: str) -> str:
    """A distribution's name as all of its spellings are compared."""
    return name.lower().replace("_", "-")


def named(requirements: list[str]) -> set[str]:
    return {plain(re.match(r"[\w-]+", line)[0]) for line in requirements} - OURS


BASE = named(PROJECT["dependencies"])
EXTRAS = {name: named(lines) for name, lines in PROJECT["optional-dependencies"].items()}
OPTIONAL = EXTRAS["deepspeed"] | EXTRAS["wandb"] | EXTRAS["tensorboard"]


def imported(*folders: str) -> set[str]:
    """The distributions that the modules of these folders import, wherever in them."""
    modules: set[str] = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module)
    inside = {path.stem for path in (ROOT / "tests").glob("*.py")} | OURS
    tops = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names - inside
    found = {plain(OTHERWISE.get(top, top)) for top in tops}
    return found | ({"tensorboard"} if "torch.utils.tensorboard" in modules else set())


def test_the_product_imports_all_of_its_dependencies_and_nothing_else():
    assert imported("clbench", "baselines", "tasks") == BASE | OPTIONAL


def test_the_tests_import_only_what_dev_installs():
    assert imported("tests") <= BASE | OPTIONAL | EXTRAS["sweep"] | EXTRAS["dev"]
    assert "clbench[all]" in PROJECT["optional-dependencies"]["dev"]
    assert PROJECT["optional-dependencies"]["all"] == ["clbench[deepspeed,wandb,tensorboard,sweep,slurm]"]


def test_what_is_installed_is_pinned_and_its_licence_is_listed():
    everything = BASE.union(*EXTRAS.values())
    pinned = {plain(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().split()}
    assert everything - pinned == EXTRAS["ray"]
    rows = re.findall(
        r"^\| (?:Apache|BSD|MIT|MPL)\S* \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    assert sorted(", ".join(rows).split(", ")) == sorted(everything)


def test_pre_commit_runs_the_ruff_that_is_pinned():
    (pinned,) = re.findall(r"^ruff==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"rev: v{pinned}\n" in (ROOT / ".pre-commit-config.yaml").read_text()


@pytest.mark.parametrize(
    ("package", "given", "is_folder"),
    [
        ("deepspeed", "engine=deepspeed", False),
        ("tensorboard", "tracking.tensorboard=true", False),
        ("wandb", "tracking.wandb=offline", False),
        ("wandb", "tracking.wandb=offline", True),  # a folder of that name lies beside, as W&B makes one
    ],
)
def test_a_missing_extra_is_one_line_that_names_it(package, given, is_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["clbench", given, f"results_dir={tmp_path / 'results'}"])
    if is_folder:
        (tmp_path / package).mkdir()
        monkeypatch.delitem(sys.modules, package, raising=False)
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
    else:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = f"clbench: {given} needs {package}, which is not installed; pip install 'clbench[{package}]'\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("given", "plugin", "extra"),
    [
        ("hydra/launcher=joblib", "hydra/launcher/joblib", "sweep"),
        ("+experiment=tune/optuna", "hydra/sweeper/optuna", "sweep"),
        ("hydra/launcher=slurm", "hydra/launcher/submitit_slurm", "slurm"),
        ("hydra/launcher=ray_cluster", "hydra/launcher/ray", "ray"),
    ],
)
def test_a_missing_plugin_of_hydra_is_one_line_that_names_its_extra(given, plugin, extra, tmp_path):
    without = "import sys; sys.modules['hydra_plugins'] = None; from clbench.cli import main; main()"
    words = [sys.executable, "-c", without, "-m", given, f"results_dir={tmp_path}"]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=120)
    said = f"clbench: {plugin} comes with a plugin that is not installed; pip install 'clbench[{extra}]'\n"
    assert (answer.returncode, answer.stderr) == (2, said)


def test_a_manifest_has_the_versions_of_clbench_and_of_the_packages_that_the_users_classes_are_in(
    tmp_path, monkeypatch
):
    for name, brings in (("my_methods-1.2", "mine\n"), ("edited-0.3", None)):
        (tmp_path / f"{name}.dist-info").mkdir()
        own, _, number = name.partition("-")
        (tmp_path / f"{name}.dist-info" / "METADATA").write_text(f"Name: {own}\nVersion: {number}\n")
        if brings:
            (tmp_path / f"{name}.dist-info" / "top_level.txt").write_text(brings)
    monkeypatch.syspath_prepend(tmp_path)
    assert versions_of(["mine.shrink", "mine.other", "edited", "nowhere.near"]) == {
        "my_methods": "1.2",
        "edited": "0.3",
    }
    assert versions()["clbench"] == PROJECT["version"]


def test_every_target_of_make_that_a_page_names_can_be_made():
    pages = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))
    stated = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    targets = sorted({*re.findall(r"\bmake ([a-z-]+)", pages)} & {*stated})
    assert {"setup", "check", "test", "run", "help"} <= {*targets}, targets
    subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, capture_output=True, timeout=60)
