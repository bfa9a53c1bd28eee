"""Seeded samples of faults: as many kills, damaged files and mistakes as are asked for, each case from its own number."""

import sys
from pathlib import Path
from random import Random

from tests.faults import damages, kills, mistakes
from tests.faults.records import ranked
from tests.faults.warm import Outcome, command


def kill(count: int, *, seed: int, folder: Path, cache: Path) -> kills.Kills:
    """Runs that are killed `count` times in all."""
    found, wholes = kills.Kills(), {}
    while found.kinds.total() < count:
        random = Random(f"{seed}/kills/{found.runs}")
        method = random.choice(kills.METHODS)
        if method not in wholes:
            wholes[method] = kills.unbroken(method, folder=folder / f"whole-{len(wholes)}", cache=cache)
        own, left = folder / f"killed-{found.runs}", count - found.kinds.total()
        kills.kill_a_run(random, method, whole=wholes[method], folder=own, cache=cache, most=left, to=found)
        shown(f"{found.kinds.total()} kills", found.wrong)
    return found


def spoil(count: int, *, seed: int, folder: Path, cache: Path) -> damages.Damages:
    """`count` damaged files, those of the states by turns."""
    found, templates = damages.Damages(), {}
    for number in range(count):
        state = [*damages.STATES][number % len(damages.STATES)]
        if state not in templates:
            templates[state] = damages.template(state, folder / state.replace(" ", "-"), cache=cache)
        if number == 0:
            command([str(templates["complete"] / "results")], folder=folder, module="clbench.leaderboard")
            expected = ranked(templates["complete"] / "results")
            assert expected.keys() == {"seq", "er"}, expected.keys()
        random, own = Random(f"{seed}/damages/{number}"), folder / f"damaged-{number}"
        damages.damage(random, state=state, template=templates[state], folder=own, expected=expected, to=found)
        shown(f"{number + 1} damaged files", found.wrong)
    return found


def mistake(count: int, *, seed: int, folder: Path, cache: Path) -> tuple[list[Outcome], list[str]]:
    """`count` mistakes of users, or all that there are."""
    template, outcomes, wrong = mistakes.folder_of_user(folder / "user"), [], []
    chosen = Random(f"{seed}/mistakes").sample(mistakes.ALL, min(count, len(mistakes.ALL)))
    for number, one in enumerate(chosen):
        outcome, faults = mistakes.told(one, template=template, folder=folder / f"mistake-{number}", cache=cache)
        outcomes.append(outcome)
        wrong += [f"{one.name}: {fault}" for fault in faults]
        shown(f"{number + 1} mistakes", wrong)
    return outcomes, wrong


def shown(done: str, wrong: list[str]) -> None:
    print(f"\r{done}, {len(wrong)} wrong", end="", file=sys.stderr, flush=True)
