"""The worked example of CONTRIBUTING.md, literally as it is printed."""

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
METHOD = PAGE.partition("## A method\n")[2].partition("\n## ")[0]
FILES = dict(re.findall(r"`(my_\w+/[\w/.]+)`:\n\n```\w+\n(.*?)```", METHOD, re.DOTALL))
CONTRACT, RUN = re.findall(r"^    (python -m .*)$", METHOD, re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert {*FILES} == {"my_methods/shrink.py", "my_conf/method/shrink.yaml"}
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_example_runs_as_it_is_printed_and_is_ranked(folder, tiny):
    bin = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{bin}{os.pathsep}{os.environ['PATH']}"}
    line = f"{RUN} {shlex.join(tiny)}"
    answer = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    (row,) = csv.DictReader((folder / "results" / "leaderboard.csv").open())
    assert (row["method"], row["n_blocks"]) == ("shrink", "1") and 0 <= float(row["average_accuracy"]) <= 1


def test_the_example_keeps_the_contract_and_what_breaks_it_is_named(folder, command, monkeypatch):
    monkeypatch.chdir(folder)
    words = shlex.split(CONTRACT)[2:]
    code, out, errors = command(*words)
    held = out.splitlines()
    assert code == 0 and len(held) == 9 and all(line.startswith("held    ") for line in held), out + errors
    path = folder / "my_methods" / "shrink.py"
    path.write_text(path.read_text().replace("tensor.grad += ", "tensor.grad += 2 * "))
    monkeypatch.delitem(sys.modules, "my_methods.shrink")
    code, out, _ = command(*words)
    broken = [line for line in out.splitlines() if line.startswith("BROKEN")]
    assert code == 1 and len(broken) == 1 and "the penalty has the gradient of its value" in broken[0], out


def test_a_method_that_is_not_there_is_one_line(command):
    code, _, errors = command("clbench.contract", "method=nonesuch")
    assert code == 2 and "nonesuch" in errors and errors.count("\n") == 1, errors
