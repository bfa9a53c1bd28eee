"""What a person sees of a run: one line per stage without a terminal, a live line above which they stand with one."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import TINY_MODEL, TINY_STREAM

ROOT = Path(__file__).resolve().parent.parent


def command(cache_dir, tmp_path) -> list[str]:
    places = (f"cache_dir={cache_dir}", f"results_dir={tmp_path / 'results'}")
    return [sys.executable, "-m", "clbench", *TINY_MODEL, *TINY_STREAM, "engine.threads=1", *places]


def test_without_a_terminal_every_stage_is_one_plain_line(cache_dir, tmp_path):
    answer = subprocess.run(command(cache_dir, tmp_path), capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert answer.returncode == 0, answer.stderr
    lines = [line for line in answer.stderr.splitlines() if re.search(r"stage \d/3", line)]
    assert [re.search(r"stage (\d)/3", line).group(1) for line in lines] == ["0", "1", "2", "3"]
    assert all("knowledge acc" in line and "perplexity" in line for line in lines)
    assert "\x1b" not in answer.stderr and "\r" not in answer.stderr
    assert "leaderboard.csv" in answer.stdout and "seq" in answer.stdout


def test_in_a_terminal_a_live_line_below_a_line_for_every_stage(cache_dir, tmp_path):
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
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
        assert re.search(rf"stage {stage}/3 \w+ +loss \d[^\r\n]*knowledge acc", text)
    assert re.search(r"stage \d/3 (examining: \w+ \w+ +\d+/\d+|\w+ +step 3/3 +loss \d)", text)
    assert "Leaderboard" in text and "leaderboard.csv" in text
