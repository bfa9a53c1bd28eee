"""What a user sees on the command line: help at once, mistakes in one line with exit code 2."""

import resource
import shutil
import subprocess
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

import pytest

from clbench.__main__ import main as start

ROOT = Path(__file__).resolve().parent.parent


def clbench(*arguments: str, module: str = "clbench", cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, cwd=cwd, timeout=120
    )


def computing_seconds() -> float:
    """What ended child processes computed; unlike the time that passed, the same beside other work."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_answers_in_two_seconds_and_lists_the_groups():
    before = computing_seconds()
    answer = clbench("--help")
    assert answer.returncode == 0
    assert computing_seconds() - before < 2.0
    for group in ("method", "stream", "task", "model", "probe", "engine", "train", "tracking"):
        assert f"{group}:" in answer.stdout
    assert "  ewc                 EWC: elastic weight consolidation\n" in answer.stdout
    assert max(map(len, answer.stdout.splitlines())) <= 80


def test_help_lists_the_options_of_a_folder_of_ones_own(tmp_path):
    (tmp_path / "stream").mkdir()
    (tmp_path / "stream" / "mine.yaml").write_text("# Two tasks of my own. They are short.\nname: mine\n")
    answer = clbench("--config-dir", str(tmp_path), "--help")
    assert "  mine                Two tasks of my own\n" in answer.stdout


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("method=seqq", ("method/seqq", "did you mean seq", "choose one of agem, base, ")),
        ("train.stpes=3", ("train.stpes", "did you mean steps? choose one of batch_size, ")),
        ("+train.stpes=3", ("train.stpes", "steps")),
        ("+stpes=3", ("stpes", "seed")),
        ("data_dir=/nonesuch", ("data_dir", "/nonesuch")),
        ("results_dir=/dev/null/x", ("results_dir", "/dev/null/x")),
        ("cache_dir=/dev/null/x", ("cache_dir", "/dev/null/x")),
        ("train.steps=-1", ("train.steps=-1", "least")),
        ("train.steps=many", ("train.steps", "many")),
        ("train.lr=-1", ("train.lr=-1",)),
        ("stream.tasks=[world_total,world_sort,world_total]", ("world_total", "more than once")),
        ("stream.tasks=[world_totl]", ("world_totl", "did you mean world_total", "choose one of alpaca, ")),
        ("stream.tasks=[]", ("stream.tasks", "empty")),
        ("order=sideways", ("order='sideways'", "reversed", "latin:K")),
        ("resume=perhaps", ("resume='perhaps'", "auto", "never", "must")),
        ("method._target_=mine.Method", ("method.name",)),
        ("train.epochs=1", ("train.steps", "train.epochs")),
        ("seed=-1", ("seed=-1",)),
        ("engine.processes=2", ("engine.processes=2", "engine=local")),
        ("engine.zero_stage=2", ("engine.zero_stage=2",)),
        ("train.checkpoint_steps=0", ("train.checkpoint_steps=0", "least allowed is 1")),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(mistake, words, tmp_path):
    answer = clbench(mistake, *([] if mistake.startswith("results_dir") else [f"results_dir={tmp_path}"]))
    assert answer.returncode == 2, answer.stderr
    lines = [line for line in answer.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, answer.stderr
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in answer.stderr


def test_a_mistake_in_one_job_of_a_multirun_exits_with_two(tmp_path):
    answer = clbench("-m", "method=seq,nonesuch", f"results_dir={tmp_path}")
    assert answer.returncode == 2
    assert "nonesuch" in answer.stderr and "Traceback" not in answer.stderr


def test_the_leaderboard_of_a_missing_folder_is_a_mistake(tmp_path):
    answer = clbench(str(tmp_path / "nonesuch"), module="clbench.leaderboard")
    assert answer.returncode == 2 and len(answer.stderr.strip().splitlines()) == 1


def test_configuration_is_found_from_any_working_directory(tmp_path):
    answer = clbench("--cfg", "job", cwd=tmp_path)
    assert answer.returncode == 0 and "baselines.seq.Seq" in answer.stdout


class Interrupting(MetaPathFinder):
    """Ctrl-C, at the moment at which a module is looked for."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "clbench.cli":
            raise KeyboardInterrupt


def test_a_checkout_runs_its_own_methods_though_another_one_is_installed(tmp_path):
    for part in ("clbench", "baselines", "tasks", "conf"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    method = tmp_path / "baselines" / "base.py"
    method.write_text(method.read_text().replace("- memory: none", "- memory: MINE"))
    words = [sys.executable, "-m", "clbench.doctor", "methods"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "MINE" in done.stdout, done.stdout + done.stderr


def test_ctrl_c_while_the_command_line_is_imported_is_one_line(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "clbench.cli", raising=False)
    monkeypatch.delattr("clbench.cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as end:
        start()
    assert end.value.code == 130
    assert capsys.readouterr().err == "clbench: interrupted; the same command continues\n"
