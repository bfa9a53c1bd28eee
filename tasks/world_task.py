"""A task of the embedded world: its train and test rows, and how an answer is scored.

>>> task = WorldTask(skill="total", seed=0)
>>> task.name, task.metric, task.score(task.examples("test")[0], task.examples("test")[0].answer)
('world_total', 'exact_match', 1.0)
"""

import random
from collections.abc import Sequence

from pydantic import PositiveInt

from clbench.protocols import Task
from clbench.types import Example, UserMistake
from tasks.world import world
from tasks.world_asks import FORMS, Draw, Form
from tasks.world_words import World

EXHAUSTED = 500
"""So many draws in a row without a new question: there are taken to be no more."""


class WorldTask(Task):
    """One instruction form asked about the world of `seed`; no test prompt is a train prompt.

    Where there are fewer different questions than rows asked for, the split has them all.
    """

    def __init__(self, *, skill: str, seed: int, train_rows: PositiveInt = 400, test_rows: PositiveInt = 40) -> None:
        if skill not in FORMS:
            raise UserMistake(f"skill={skill!r} is unknown; choose one of {sorted(FORMS)} in conf/task")
        form, here = FORMS[skill], world(seed)
        self.name = f"world_{skill}"
        self.metric = "accuracy" if form.choices else "exact_match"
        self._words = frozenset(form.words(here))
        test = rows(form, here, name=self.name, split="test", wanted=test_rows, taken=frozenset())
        taken = frozenset(row.prompt for row in test)
        self._examples = {
            "test": test,
            "train": rows(form, here, name=self.name, split="train", wanted=train_rows, taken=taken),
        }

    def examples(self, split: str) -> Sequence[Example]:
        return self._examples[split]

    def score(self, example: Example, answer: str) -> float:
        return float(answer.split() == example.answer.split())

    def is_valid(self, example: Example, answer: str) -> bool:
        """Whether `answer` is one of the choices, or as many words as asked for of the kind asked for."""
        words = answer.split()
        if example.choices:
            return " ".join(words) in example.choices
        return len(words) == len(example.answer.split()) and self._words.issuperset(words)


def rows(form: Form, here: World, *, name: str, split: str, wanted: int, taken: frozenset[str]) -> tuple[Example, ...]:
    """Up to `wanted` different questions of `split` that are not in `taken`."""
    draw = Draw(here=here, split=split, rng=random.Random(f"{here.seed}/{name}/{split}"))
    found: dict[str, str] = {}
    misses = 0
    while len(found) < wanted and misses < EXHAUSTED:
        prompt, answer = form.ask(draw)
        if prompt in taken or prompt in found:
            misses += 1
        else:
            found[prompt], misses = answer, 0
    return tuple(
        Example(id=f"{name}/{split}/{index}", prompt=prompt, answer=answer, choices=form.choices_of(prompt))
        for index, (prompt, answer) in enumerate(found.items())
    )
