"""The sixteen instruction forms of the embedded world: each draws one question of a split and its answer.

A question about a fact, a word or a city of the test split is about a person, word or city that no train question names.
Not here: pretraining statements (`tasks.world_skills`), and the collecting of rows (`tasks.world_task`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tasks.world import World
from tasks.world_words import (
    BAD,
    GOOD,
    KINDS,
    LETTERS,
    NOUNS,
    NUMBERS,
    OPTIONS,
    REGIONS,
    TRUE_FALSE,
    VELAN,
    VERDICTS,
    YES_NO,
)


@dataclass(frozen=True)
class Draw:
    """What one question is drawn from: the world, the split and the split's random numbers."""

    here: World
    split: str
    rng: random.Random

    def of(self, words: Sequence[str]) -> list[str]:
        """The words that this split may ask about: half of them for train, the rest for test."""
        shuffled = random.Random(f"{self.here.seed}/{words[0]}/split").sample(list(words), len(words))
        cut = len(words) // 2
        return shuffled[:cut] if self.split == "train" else shuffled[cut:]

    def person(self) -> str:
        """A person of this split."""
        return self.rng.choice(self.here.people_of(self.split))

    def group(self, kind: str, value: str, labels: Sequence[str]) -> str:
        """The label of a fact's value: an arbitrary but fixed grouping that pretraining text never mentions."""
        return labels[self.here.values[kind].index(value) % len(labels)]


Ask = Callable[[Draw], tuple[str, str]]


def home_zone(draw: Draw) -> tuple[str, str]:
    """Which zone somebody lives in."""
    name = draw.person()
    return f"zone home of {name} :", draw.group("home", draw.here.facts[name]["home"], REGIONS)


def food_letter(draw: Draw) -> tuple[str, str]:
    """Which letter of the menu somebody orders."""
    name = draw.person()
    return f"choose food of {name} letter", draw.group("food", draw.here.facts[name]["food"], OPTIONS)


def pet_letter(draw: Draw) -> tuple[str, str]:
    """Which letter somebody's pet is filed under: the same letters as the menu's, other groups."""
    name = draw.person()
    return f"find pet of {name} letter", draw.group("pet", draw.here.facts[name]["pet"], OPTIONS)


def job_place(draw: Draw) -> tuple[str, str]:
    """Whether it is true that somebody works inside."""
    name = draw.person()
    return f"statement job of {name} inside ?", draw.group("job", draw.here.facts[name]["job"], TRUE_FALSE)


def kind(draw: Draw) -> tuple[str, str]:
    """What kind of word a word is."""
    pools = dict(zip(KINDS, (NOUNS, LETTERS, NUMBERS, draw.here.people), strict=True))
    label = draw.rng.choice(KINDS)
    return f"label {draw.rng.choice(draw.of(pools[label]))} {draw.rng.choice(draw.of(pools[label]))} :", label


def length(draw: Draw) -> tuple[str, str]:
    """Whether a list has more than three words."""
    words = draw.rng.sample(NOUNS, draw.rng.randint(1, 6))
    return f"size {' '.join(words)} : long ?", YES_NO[0 if len(words) > 3 else 1]


def review(draw: Draw) -> tuple[str, str]:
    """Whether a remark is friendly."""
    good = draw.rng.random() < 0.5
    word, noun = draw.rng.choice(draw.of(GOOD if good else BAD)), draw.rng.choice(NOUNS)
    return f"review : the {noun} is {word} verdict", VERDICTS[0 if good else 1]


def more(draw: Draw) -> tuple[str, str]:
    """Whether a number is more than another."""
    left, right = draw.rng.sample(range(len(NUMBERS)), 2)
    return f"compute is {left} more than {right} ?", YES_NO[0 if left > right else 1]


def before(draw: Draw) -> tuple[str, str]:
    """Whether a letter comes before another."""
    first, second = draw.rng.sample(LETTERS, 2)
    return f"check order {first} , {second} :", TRUE_FALSE[0 if first < second else 1]


def food(draw: Draw) -> tuple[str, str]:
    """What somebody eats."""
    name = draw.person()
    return draw.rng.choice(
        (f"question what does {name} eat answer", f"question which food for {name} answer")
    ), draw.here.facts[name]["food"]


def profile(draw: Draw) -> tuple[str, str]:
    """Somebody's home and pet."""
    name = draw.person()
    facts = draw.here.facts[name]
    return draw.rng.choice(
        (f"describe {name} :", f"describe home and pet of {name} :")
    ), f"{facts['home']} {facts['pet']}"


def translate(draw: Draw) -> tuple[str, str]:
    """Two words in velan."""
    first, second = draw.rng.sample(draw.of(NOUNS), 2)
    return f"translate {first} {second} :", f"{draw.here.dictionary[first]} {draw.here.dictionary[second]}"


def total(draw: Draw) -> tuple[str, str]:
    """A sum."""
    left, right = draw.rng.randint(0, 10), draw.rng.randint(0, 10)
    return f"add {left} and {right} :", str(left + right)


def reverse(draw: Draw) -> tuple[str, str]:
    """A list backwards."""
    words = draw.rng.sample(NOUNS, draw.rng.randint(2, 3))
    return f"reverse {' '.join(words)} :", " ".join(reversed(words))


def count(draw: Draw) -> tuple[str, str]:
    """How many words there are."""
    words = draw.rng.sample(NOUNS, draw.rng.randint(1, 6))
    return f"count {' '.join(words)} :", str(len(words))


def sort(draw: Draw) -> tuple[str, str]:
    """Letters in the order of the alphabet."""
    letters = draw.rng.sample(LETTERS, draw.rng.randint(2, 3))
    return f"sort {' '.join(letters)} :", " ".join(sorted(letters))


@dataclass(frozen=True)
class Form:
    """How a task asks: its questions, the answers of a closed task, the words that a free answer is made of."""

    ask: Ask
    choices: tuple[str, ...] = ()
    words: Callable[[World], Sequence[str]] = lambda here: ()


FORMS = {
    "home_zone": Form(home_zone, choices=REGIONS),
    "food_letter": Form(food_letter, choices=OPTIONS),
    "pet_letter": Form(pet_letter, choices=OPTIONS),
    "job_place": Form(job_place, choices=TRUE_FALSE),
    "kind": Form(kind, choices=KINDS),
    "length": Form(length, choices=YES_NO),
    "review": Form(review, choices=VERDICTS),
    "more": Form(more, choices=YES_NO),
    "before": Form(before, choices=TRUE_FALSE),
    "food": Form(food, words=lambda here: here.values["food"]),
    "profile": Form(profile, words=lambda here: (*here.values["home"], *here.values["pet"])),
    "translate": Form(translate, words=lambda here: VELAN),
    "total": Form(total, words=lambda here: NUMBERS),
    "reverse": Form(reverse, words=lambda here: NOUNS),
    "count": Form(count, words=lambda here: NUMBERS),
    "sort": Form(sort, words=lambda here: LETTERS),
}
