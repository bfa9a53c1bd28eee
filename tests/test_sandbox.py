"""The sandbox: right programs pass, and none harms the machine, outlives its time or runs unasked."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

import tasks.sandbox
from clbench.types import UserMistake
from tasks.sandbox import INSIDE, PassAtOne, check_that_programs_run, passes

CONF = Path(__file__).parent.parent / "conf"


def refusal() -> str:
    try:
        passes("", seconds=5, memory_mb=512)
    except UserMistake as mistake:
        return str(mistake)
    return ""


REFUSAL = refusal()
sandboxed = pytest.mark.skipif(bool(REFUSAL), reason=REFUSAL)


def run(program: str, *, seconds: int = 5, memory_mb: int = 512) -> bool:
    return passes(program, seconds=seconds, memory_mb=memory_mb)


def run_watched(program: str, *, seconds: int) -> tuple[bool, set[psutil.Process]]:
    """Whether the program passes, and every process that was started for it."""
    started: set[psutil.Process] = set()
    with ThreadPoolExecutor(1) as pool:
        passed = pool.submit(run, program, seconds=seconds)
        while not passed.done():
            started |= set(psutil.Process().children(recursive=True))
            time.sleep(0.01)
    return passed.result(), started


def assert_gone(processes: set[psutil.Process]) -> None:
    assert len(processes) >= 3, "the outer process, the first of the namespace, the program"
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@sandboxed
@pytest.mark.parametrize(
    "program",
    [
        "def double(x):\n\treturn 2 * x\n\nassert double(3) == 6",
        "from __future__ import annotations\nimport collections, heapq, math, re\nassert math.gcd(4, 6) == 2",
        "if __name__ == '__main__':\n    input()",
        "print('aloud' * 100_000)",
        "with open('notes', 'w') as file:\n    file.write('x')\nassert open('notes').read() == 'x'",
        "class Row:\n    pass\n\nassert isinstance(Row(), Row)",
    ],
)
def test_a_right_program_passes(program):
    assert run(program)


@sandboxed
@pytest.mark.parametrize(
    "program",
    [
        "assert 1 == 2",
        "def double(x) return 2 * x",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "import sys\nsys.exit()",
        "input()",
        "import os\nos.kill(os.getpid(), 9)",
        "import numpy",
        "x = '\0'",
    ],
)
def test_a_program_that_fails_or_leaves_before_its_last_line_does_not_pass(program):
    assert not run(program)


@sandboxed
@pytest.mark.parametrize(
    "program",
    ["while True:\n    pass", "import time\ntime.sleep(60)", "import os\nos.setsid()\nimport time\ntime.sleep(60)"],
)
def test_an_endless_program_ends_in_time_with_all_its_processes(program):
    began = time.monotonic()
    passed, processes = run_watched(program, seconds=1)
    assert not passed and time.monotonic() - began < 20
    assert_gone(processes)


@sandboxed
@pytest.mark.parametrize("program", ["x = bytearray(1 << 30)", "x = [0]\nwhile True:\n    x += x"])
def test_a_memory_bomb_does_not_pass(program):
    assert run("x = bytearray(1 << 20)", memory_mb=256)
    assert not run(program, memory_mb=256)


@sandboxed
def test_no_process_and_no_thread_can_be_started():
    assert run("import os\ntry:\n    os.fork()\nexcept OSError:\n    pass\nelse:\n    os._exit(1)")
    assert not run("import threading\nthreading.Thread(target=print).start()")
    # It goes on trying until its time is over, so that whoever watches sees it.
    forking = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    passed, processes = run_watched(forking, seconds=2)
    assert not passed and len(processes) == 3


@sandboxed
def test_no_network_is_there_not_even_this_machines_own():
    connect = "import socket\ntry:\n    socket.create_connection(('127.0.0.1', {}), timeout=2)\nexcept OSError:\n    pass\nelse:\n    raise SystemExit(1)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        probe = subprocess.run([sys.executable, "-c", connect.format(port)], check=False)
        assert probe.returncode == 1, "outside the sandbox the server can be reached"
        assert run(connect.format(port))
    assert run("import socket\nassert [name for _, name in socket.if_nameindex()] == ['lo']")


@sandboxed
def test_nothing_outside_its_directory_can_be_written(tmp_path):
    tmp_path.chmod(0o777)
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "kept").chmod(0o666)
    attempt = "try:\n    open({!r}, 'w')\nexcept OSError:\n    pass\nelse:\n    raise SystemExit(1)"
    for place in (
        tmp_path / "new",
        tmp_path / "kept",
        "/dev/shm/clbench_test",
        "/tmp/clbench_test",
        "/var/tmp/clbench_test",
    ):
        assert run(attempt.format(str(place))), place
    assert (tmp_path / "kept").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert not run("open('large', 'wb').write(bytes(2 << 20))")


@sandboxed
def test_what_shuts_the_program_in_cannot_be_undone():
    undo = "\n".join(
        [
            "import ctypes, os, struct",
            "libc = ctypes.CDLL(None)",
            "libc.unshare(0x10000000 | 0x20000)",  # rights in namespaces of its own are no rights here
            "assert libc.mount(b'none', b'/', None, 32 | 0x1000, None) != 0",
            "assert libc.syscall(442, -100, b'/', 0x8000, struct.pack('QQQQ', 0, 1, 0, 0), 32) != 0",
            "try:",
            "    open('/tmp/clbench_test', 'w')",
            "except OSError:",
            "    pass",
            "else:",
            "    os._exit(1)",
        ]
    )
    assert run(undo)
    assert not run("import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (9, 9))")
    assert run("import os\nassert os.getuid() != 0 and os.listdir('/proc') == []")


@sandboxed
def test_the_order_of_sets_is_the_same_at_every_run():
    order = next(str(n) for n in range(1000) if run(f"import os\nassert next(iter({{'a', 'b'}})) == {'ab'[n % 2]!r}"))
    assert all(run(f"assert next(iter({{'a', 'b'}})) == {'ab'[int(order) % 2]!r}") for _ in range(6))


@sandboxed
def test_its_processes_end_with_the_run_that_started_them():
    driver = (
        "import subprocess, sys\n"
        f"p = subprocess.Popen([sys.executable, '-I', '-S', {str(INSIDE)!r}, '60', '500000000'],\n"
        "    stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}, start_new_session=True)\n"
        "p.stdin.write(b'import time; time.sleep(60)'); p.stdin.close()\n"
        "print(p.stdout.read(5).decode(), flush=True); p.wait()\n"
    )
    with subprocess.Popen([os.path.realpath(sys.executable), "-c", driver], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.read(5) == b"ready"
        processes = set(psutil.Process(process.pid).children(recursive=True))
        process.send_signal(signal.SIGKILL)
    assert_gone(processes)


def test_where_the_kernel_refuses_nothing_is_run(monkeypatch, tmp_path):
    refusing = tmp_path / "inside.py"
    refusing.write_text(INSIDE.read_text().replace("libc.unshare(", "refused("))
    refusing.write_text(
        "def refused(flags):\n    return -1\n"
        + "".join(refusing.read_text().split("from __future__ import annotations"))
    )
    monkeypatch.setattr(tasks.sandbox, "INSIDE", refusing)
    with pytest.raises(UserMistake, match="cannot be run safely here .*unshare.*take task mbpp"):
        run("assert True")


def load(name: str, data_dir: Path):
    task = OmegaConf.load(CONF / "task" / f"{name}.yaml")
    return instantiate(OmegaConf.create({"data_dir": str(data_dir), "task": task}).task)


@pytest.fixture
def rows(tmp_path):
    row = {
        "task_id": 1,
        "text": "Write a function to halve a number.",
        "code": "def halve(x):\r\n  return part(x, 2)",
        "test_list": ["assert halve(4) == 2", "assert halve(1) == 0.5"],
        "test_setup_code": "part = lambda x, n: x / n",
        "challenge_test_list": [],
    }
    (tmp_path / "mbpp").mkdir()
    for split in ("train", "test"):
        (tmp_path / "mbpp" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


@sandboxed
def test_pass_at_one_runs_the_setup_and_all_the_tests(rows):
    task = load("mbpp_pass", rows)
    assert isinstance(task, PassAtOne)
    (example,) = task.examples("test")
    assert task.score(example, example.answer) == 1
    assert task.score(example, "halve = lambda x: x / 2") == 1
    assert task.score(example, "halve = lambda x: x // 2") == 0
    assert task.score(example, "") == 0
    assert "lambda" not in example.prompt and "assert halve(1) == 0.5" in example.prompt


@sandboxed
def test_too_little_memory_for_python_is_a_users_mistake():
    with pytest.raises(UserMistake, match="interpreter did not start"):
        check_that_programs_run(seconds=5, memory_mb=1)


def test_nothing_runs_without_the_opt_in(rows, tmp_path):
    mark = tmp_path / "ran"
    task = load("mbpp", rows)
    (example,) = task.examples("test")
    task.score(example, f"open({str(mark)!r}, 'w')")
    task.is_valid(example, f"open({str(mark)!r}, 'w')")
    assert not mark.exists()


def test_no_stream_has_the_task_that_runs_programs():
    for path in (CONF / "stream").glob("*.yaml"):
        assert "mbpp_pass" not in OmegaConf.load(path).tasks, path.name
    assert "WARNING" in (CONF / "task" / "mbpp_pass.yaml").read_text().splitlines()[0]
