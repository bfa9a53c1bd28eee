"""What a person sees of a run: two lines a stage without a terminal, above a live line with one, and something at once."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import psutil

from tests.conftest import TINY_MODEL, TINY_STREAM

ROOT = Path(__file__).resolve().parent.parent


def command(cache_dir, tmp_path) -> list[str]:
    places = (f"cache_dir={cache_dir}", f"results_dir={tmp_path / 'results'}")
    return [sys.executable, "-m", "clbench", *TINY_MODEL, *TINY_STREAM, "engine.threads=1", *places]


def test_without_a_terminal_a_line_within_two_seconds_and_two_after_every_stage(cache_dir, tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    environment = {**os.environ, "COLUMNS": "80"}
    with subprocess.Popen([*command(cache_dir, tmp_path), "tracking.tasks=true"], env=environment, **pipes) as process:
        first = process.stderr.readline()
        computed = psutil.Process(process.pid).cpu_times()  # unlike the time that passed, the same beside other work
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert re.fullmatch(r"seq16-seq-s0-\w{8}: seq, 3 tasks of seq16, model world\n", first)
    assert computed.user + computed.system < 2
    lines = stderr.splitlines()
    numbers = [number for number, line in enumerate(lines) if re.search(r"stage \d/3", line)]
    assert [re.search(r"stage (\d)/3", lines[number]).group(1) for number in numbers] == ["0", "1", "2", "3"]
    assert all(re.match(r"  learned .+ kept .+ retention .+ perplexity x\d", lines[number + 1]) for number in numbers)
    assert [len(re.findall(r"kept \S+ +world", stderr[stderr.index(f"stage {stage}/3") :])) for stage in (3, 2)] == [
        3,
        5,
    ]
    assert max(len(line) for line in (first, *lines[numbers[0] :], *stdout.splitlines()[:-1])) <= 80
    (path,) = (tmp_path / "results" / "runs").iterdir()
    assert not re.search(r"\bnan\b", stderr + stdout + (path / "run.log").read_text())
    assert "\x1b" not in stderr and "\r" not in stderr
    assert "leaderboard.csv" in stdout and "seq" in stdout


def test_in_a_terminal_of_eighty_columns_a_live_line_below_what_is_said_of_every_stage(cache_dir, tmp_path):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm-256color"}
    process = subprocess.Popen(
        command(cache_dir, tmp_path), stdout=slave, stderr=slave, cwd=ROOT, env=environment, close_fds=True
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # the terminal closes with the process
            break
        if not piece:
            break
        shown += piece
    assert process.wait(timeout=300) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))
    for stage in (1, 2, 3):
        assert re.search(rf"stage {stage}/3 \w+ +loss \d[^\r\n]*[\r\n]+  learned", text)
    for phase in (
        "loading libraries",
        "reading the rows",
        "checking the data",
        "loading the model",
        "canaries",
        "writing",
    ):
        assert phase in text
    live = [line for line in re.split(r"[\r\n]+", text) if "━" in line]
    assert live and max(map(len, live)) <= 80
    assert any(re.match(r"stage \d/3 examining: \w+ \w+ +\d+/\d+.* about [\d.]+ s left", line) for line in live)
    assert "Leaderboard" in text and "leaderboard.csv" in text
