"""Files that were damaged: in records, checkpoints and caches, of a run that is complete, between two stages, or within one.

Right is one of these: the run ends with the numbers of an untouched one; one line names what is wrong and what to do, and that done it ends so; a
run that was complete is named in the tables and has no rank. The run beside it is ranked with its numbers in any case.
"""

import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from clbench.record.ledger import Checkpoint, Ledger
from tests.faults.records import ranked
from tests.faults.warm import TINY, command

OWN = ("method=seq", "train.checkpoint_steps=1")
OTHER = ("method=er",)


def stop_between(folder: Path) -> None:
    """Has this process ask itself to end after stage 1."""
    append = Ledger.append

    def stopping(self, scores) -> None:
        if scores[0].stage == 2:
            signal.raise_signal(signal.SIGTERM)
        append(self, scores)

    Ledger.append = stopping


def stop_within(folder: Path) -> None:
    """Has this process killed after the second of three steps of stage 2."""
    save = Ledger.save

    def stopping(self, checkpoint: Checkpoint) -> None:
        save(self, checkpoint)
        if (checkpoint.stage, checkpoint.step) == (2, 2):
            os.kill(os.getpid(), signal.SIGKILL)

    Ledger.save = stopping


STATES: dict[str, Callable[[Path], None] | None] = {
    "complete": None,
    "between stages": stop_between,
    "within a stage": stop_within,
}


def flip(content: bytes, random: Random) -> bytes:
    changed = bytearray(content)
    changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def digit(content: bytes, random: Random) -> bytes:
    """Another digit in place of one; a flipped bit where there is none."""
    places = [found.start() for found in re.finditer(rb"\d", content)]
    if not places:
        return flip(content, random)
    place = random.choice(places)
    other = random.choice([one for one in b"0123456789" if one != content[place]])
    return content[:place] + bytes([other]) + content[place + 1 :]


def page(content: bytes, random: Random) -> bytes:
    place = random.randrange(len(content))
    return content[:place] + b"\0" * min(512, len(content) - place) + content[place + 512 :]


def line(content: bytes, random: Random) -> bytes:
    """One line less."""
    lines = content.splitlines(keepends=True)
    del lines[random.randrange(len(lines))]
    return b"".join(lines)


CONTENTS: dict[str, Callable[[bytes, Random], bytes]] = {
    "a flipped bit": flip,
    "another digit": digit,
    "cut": lambda content, random: content[: random.randrange(len(content))],
    "its last line cut": lambda content, random: content[: -random.randint(1, min(40, len(content)))],
    "empty": lambda content, random: b"",
    "garbage": lambda content, random: random.randbytes(len(content)),
    "zeros": page,
    "a line less": line,
    "twice": lambda content, random: content + content,
    "a torn line more": lambda content, random: content + b'{"stage": 3, "val',
    "text": lambda content, random: b"mine\n",
    "a list": lambda content, random: b"[1]\n",
}


def swapped(path: Path, random: Random, root: Path) -> None:
    """In place of the file another of its kind."""
    others = [one for one in root.rglob(f"*{path.suffix}") if one.is_file() and one.read_bytes() != path.read_bytes()]
    if others:
        shutil.copy(random.choice(sorted(others)), path)
    else:
        path.write_bytes(b"")


def folder_instead(path: Path, random: Random, root: Path) -> None:
    path.unlink()
    path.mkdir()


PLACES: dict[str, Callable[[Path, Random, Path], None]] = {
    "gone": lambda path, random, root: path.unlink(),
    "another of its kind": swapped,
    "a folder instead": folder_instead,
    "a stray file beside it": lambda path, random, root: (path.parent / "notes.txt").write_text("mine"),
}


@dataclass
class Damages:
    """What came of damaged files: how many of each outcome, what went wrong."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def arguments(method: tuple[str, ...], folder: Path) -> list[str]:
    return [*TINY, *method, f"results_dir={folder / 'results'}", f"cache_dir={folder / 'cache'}"]


def template(state: str, folder: Path, *, cache: Path) -> Path:
    """A results directory and a cache: one run complete, the other in that state."""
    shutil.copytree(cache, folder / "cache")
    for method, stop in ((OTHER, None), (OWN, STATES[state])):
        found = command(
            arguments(method, folder), folder=folder, first=lambda stop=stop: stop(folder) if stop else None
        )
        assert not found.faults and (found.code == 0) == (stop is None), found
    return folder


def damage(random: Random, *, state: str, template: Path, folder: Path, expected: dict[str, set], to: Damages) -> None:
    """Damages a file in a copy of the template, builds the tables and starts the run again, and where that is refused does what the line says and
    starts it once more. `expected`: the scores by method."""
    shutil.copytree(template, folder)
    (own,) = (path for path in (folder / "results" / "runs").iterdir() if "-seq-" in path.name)
    files = sorted(path for root in (own, folder / "cache") for path in root.rglob("*") if path.is_file())
    path, kind = random.choice([path for path in files if path.stat().st_size]), random.choice([*CONTENTS, *PLACES])
    if kind in CONTENTS:
        path.write_bytes(CONTENTS[kind](path.read_bytes(), random))
    else:
        PLACES[kind](path, random, folder)
    what = f"{path.relative_to(folder)} of a run that is {state}: {kind}"
    wrong = [f"the tables: {one}" for one in table_faults(folder, expected, may_lack={"seq"})]
    found = command(arguments(OWN, folder), folder=folder)
    outcome = "ended with equal numbers"
    if any(f"{verb} again" in found.err for verb in ("made", "measured", "done")):
        outcome = "something was done again, equal numbers"
    if found.code:
        outcome = "one line, and what it says led to equal numbers"
        wrong += found.faults + ([f"exit code {found.code}"] if found.code not in (1, 2) else [])
        wrong += [] if found.line and str(folder) in found.line else [f"no single line: {found.err[-600:]!r}"]
        wrong += [f"the tables after it: {one}" for one in table_faults(folder, expected, may_lack={"seq"})]
        remove(path if folder / "cache" in path.parents or "remove it" in found.line else own)
        found = command(arguments(OWN, folder), folder=folder)
    wrong += found.faults + ([f"exit code {found.code}: {found.err[-600:]!r}"] if found.code else [])
    if named := f"unreadable: {own.name} (" in (folder / "results" / "leaderboard.md").read_text():
        outcome = "named in the tables and not ranked"
    faults = table_faults(folder, expected, may_lack={"seq"} if named and state == "complete" else set())
    wrong += [f"the tables afterwards: {one}" for one in faults]
    to.outcomes[outcome] += 1
    to.wrong += [f"{what}: {one}" for one in wrong]
    if not wrong:
        shutil.rmtree(folder)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def table_faults(folder: Path, expected: dict[str, set], *, may_lack: set[str]) -> list[str]:
    """What is wrong with the tables of a results directory."""
    made = command([str(folder / "results")], folder=folder, module="clbench.leaderboard")
    faults = made.faults + ([f"exit code {made.code}: {made.err[-600:]!r}"] if made.code else [])
    if faults:
        return faults
    rows = ranked(folder / "results")
    faults += [f"{method} has no rank" for method in expected.keys() - rows.keys() - may_lack]
    return faults + [
        f"{method} is ranked with other numbers" for method, own in rows.items() if own != expected[method]
    ]
