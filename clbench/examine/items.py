"""Which documents of a task are measured: a fixed subset that a number alone names, the same for every model, stage and machine.

A subset of `count` documents is the `count` whose hash of (task, index) is lowest, in the order of their index. The index is lm-eval's own document
id (its `--samples`), so a subset can be measured again with lm-eval itself, and a larger subset holds every smaller one.

>>> choose("quiz", size=6, wanted=3), choose("quiz", size=6, wanted=4), choose("quiz", size=6, wanted=[5, 1])
((1, 3, 5), (0, 1, 3, 5), (1, 5))
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from clbench.types import UserMistake

Wanted = int | Sequence[int] | None
"""How many documents, or which, or all (None)."""


def choose(task: str, *, size: int, wanted: Wanted) -> tuple[int, ...]:
    """The indices, ascending, of the documents of `task`, which has `size`; raises UserMistake for more than there are."""
    if wanted is None:
        return tuple(range(size))
    if isinstance(wanted, int):
        if not 1 <= wanted <= size:
            raise UserMistake(
                f"probe.probes.*.items asks for {wanted} documents of {task}, which has {size}; ask for 1 to {size} (conf/probe)"
            )
        return tuple(sorted(sorted(range(size), key=lambda index: rank(task, index))[:wanted]))
    indices = tuple(sorted(set(wanted)))
    if len(indices) != len(wanted) or not indices or indices[0] < 0 or indices[-1] >= size:
        raise UserMistake(
            f"probe.probes.*.items lists the documents {list(wanted)} of {task}; list each once, from 0 to {size - 1} (conf/probe)"
        )
    return indices


def rank(task: str, index: int) -> bytes:
    """What documents are ordered by: the SHA-256 of "task/index"."""
    return hashlib.sha256(f"{task}/{index}".encode()).digest()


def share(group: str, *, wanted: Wanted, tasks: int) -> Wanted:
    """What a group of `tasks` tasks asks of each: an equal part; raises UserMistake where that is no whole number."""
    if wanted is None or tasks == 1:
        return wanted
    if not isinstance(wanted, int):
        raise UserMistake(
            f"probe.probes.*.items lists documents of {group}, a group of {tasks} tasks; list them by task (conf/probe)"
        )
    if wanted < tasks or wanted % tasks:
        nearest = max(1, round(wanted / tasks)) * tasks
        raise UserMistake(
            f"probe.probes.*.items asks for {wanted} documents of {group}, which has {tasks} tasks; ask for a multiple, e.g. {nearest} (conf/probe)"
        )
    return wanted // tasks
