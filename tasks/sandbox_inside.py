"""The inside of the sandbox: a script that `tasks.sandbox` starts in a process of its own, and that nothing imports.

It shuts itself off and then becomes the program: argv holds seconds and bytes of memory, stdin the program.
Three processes: this one, which makes the namespaces; the first of the new process namespace, whose end ends all in it; the
program. stdout says "ready" when the program begins, or why the kernel refused; the exit status is PASSED after its last line.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from typing import NoReturn

NEW_MOUNT, NEW_IPC, NEW_USER, NEW_PROCESS, NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
READ_ONLY, NO_SETUID, NO_DEVICES, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 0x1000, 0x4000, 0x40000
MOUNT_SETATTR, FROM_HERE, WHOLE_TREE = 442, -100, 0x8000
"""The system call's number is the same on every architecture; it is there since Linux 5.12."""
DIE_WITH_PARENT, NO_NEW_PRIVILEGES = 1, 38
NOBODY = 65534
PLACE = "/run"
"""Where the program's directory is put. It hides the sockets of services, which a read-only mount does not shut."""
FILE_BYTES, OPEN_FILES = 1 << 20, 64
PROGRAM = """
from os import O_RDWR, _exit, close, devnull, dup2, open as open_descriptor, write
write(1, b"ready")
null = open_descriptor(devnull, O_RDWR)
for stream in (0, 1, 2):
    dup2(null, stream)
close(null)
exec(compile(open("program.py", encoding="utf-8").read(), "program.py", "exec"), {"__name__": "program"})
_exit(47)
"""
"""A status that no program comes to by itself: leaving early, even with status 0, is not passing."""

libc = ctypes.CDLL(None, use_errno=True)


def main(seconds: str, memory: str) -> NoReturn:
    """Ends as the program on stdin ends, or says why it was not begun."""
    os.umask(0o022)
    program = sys.stdin.buffer.read()
    try:
        isolate()
        for _ in range(2):
            checked(libc.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0), "prctl")
            if child := os.fork():
                follow(child)
        os.chdir(PLACE)
        with open("program.py", "wb") as file:
            file.write(program)
        give_up_rights()
        limit(seconds=int(seconds), memory=int(memory))
        python = os.path.relpath(os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix))
        # The order of sets of words is the same at every run, so that a score is.
        os.execve(f"{PLACE}/python/{python}", ["python", "-s", "-S", "-c", PROGRAM], {"PYTHONHASHSEED": "0"})
    except OSError as error:
        os.write(1, f"{error}".encode())
        os._exit(1)


def follow(child: int) -> NoReturn:
    """Ends when `child` ends, with its status."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 1)


def isolate() -> None:
    """No network, no other process, and no file that can be written, but for 16 MiB of memory at PLACE."""
    uid, gid = os.getuid(), os.getgid()
    ours = 0 if os.geteuid() == 0 else NEW_USER
    checked(libc.unshare(NEW_MOUNT | NEW_IPC | NEW_PROCESS | NEW_NETWORK | ours), "unshare")
    if ours:
        for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    mount("none", "/", flags=RECURSIVE | PRIVATE)
    mount("tmpfs", PLACE, kind=b"tmpfs", flags=NO_SETUID | NO_DEVICES, options=b"size=16m,mode=1777")
    # The interpreter may lie where nobody can go (/root), so it is shown here.
    os.mkdir(f"{PLACE}/python")
    mount(os.path.realpath(sys.base_prefix), f"{PLACE}/python", flags=BIND | RECURSIVE)
    set_mount("/", switched_on=READ_ONLY, flags=WHOLE_TREE)
    set_mount(PLACE, switched_off=READ_ONLY)
    mount("tmpfs", "/proc", kind=b"tmpfs", flags=READ_ONLY, options=b"size=4k")


def give_up_rights() -> None:
    """Root becomes nobody; any other user loses at the next exec the rights that the namespaces gave. None can be had back."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    checked(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")


def limit(*, seconds: int, memory: int) -> None:
    """`seconds` of processor time, `memory` bytes, small files, and no further process or thread."""
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for which, most in limits.items():
        resource.setrlimit(which, (most, most))


def mount(source: str, target: str, *, flags: int, kind: bytes | None = None, options: bytes | None = None) -> None:
    """mount(2)."""
    checked(libc.mount(source.encode(), target.encode(), kind, flags, options), f"mount {target}")


def set_mount(target: str, *, switched_on: int = 0, switched_off: int = 0, flags: int = 0) -> None:
    """mount_setattr(2), which glibc has no name for before 2.36."""
    attributes = struct.pack("QQQQ", switched_on, switched_off, 0, 0)
    result = libc.syscall(MOUNT_SETATTR, FROM_HERE, target.encode(), flags, attributes, len(attributes))
    checked(result, f"mount_setattr {target}")


def checked(result: int, what: str) -> None:
    """Raises OSError where the kernel refused `what`."""
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
