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
    LETTERS,
    NOUNS,
    NUMBERS,
    OPTIONS,
    REGIONS,
    TRUE_FALSE,
    VELAN,
    VERDICTS,
    WORKPLACES,
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

    def lettered(self, right: str, pool: Sequence[str]) -> tuple[str, str]:
        """Four options, one of them right, and the right one's letter."""
        options = [right, *self.rng.sample([word for word in pool if word != right], 3)]
        self.rng.shuffle(options)
        text = " ".join(f"{letter} {word}" for letter, word in zip(OPTIONS, options, strict=True))
        return text, OPTIONS[options.index(right)]


Ask = Callable[[Draw], tuple[str, str]]


def home_letter(draw: Draw) -> tuple[str, str]:
    """Where somebody lives, by letter."""
    name = draw.person()
    options, letter = draw.lettered(draw.here.facts[name]["home"], draw.here.values["home"])
    return f"choose {options} the home of {name} is", letter


def meaning_letter(draw: Draw) -> tuple[str, str]:
    """What a velan word means, by letter."""
    nouns = draw.of(NOUNS)
    noun = draw.rng.choice(nouns)
    options, letter = draw.lettered(noun, NOUNS)
    return f"find {options} {draw.here.dictionary[noun]} means", letter


def job_truth(draw: Draw) -> tuple[str, str]:
    """Whether a statement about where somebody works is true."""
    name, where = draw.person(), draw.rng.choice(WORKPLACES)
    true = draw.here.workplaces[draw.here.facts[name]["job"]] == where
    return f"statement : {name} works {where} ?", TRUE_FALSE[0 if true else 1]


def review(draw: Draw) -> tuple[str, str]:
    """Whether a remark is friendly."""
    good = draw.rng.random() < 0.5
    word, noun = draw.rng.choice(draw.of(GOOD if good else BAD)), draw.rng.choice(NOUNS)
    return f"review : the {noun} is {word} verdict", VERDICTS[0 if good else 1]


def region(draw: Draw) -> tuple[str, str]:
    """The region of three neighbouring cities."""
    where = draw.rng.choice(REGIONS)
    cities = draw.rng.sample(draw.of([city for city, region in draw.here.regions.items() if region == where]), 3)
    return f"map {' , '.join(cities)} : region", where


def more(draw: Draw) -> tuple[str, str]:
    """Whether a number is more than another."""
    left, right = draw.rng.sample(range(len(NUMBERS)), 2)
    return f"compute is {left} more than {right} ?", YES_NO[0 if left > right else 1]


def before(draw: Draw) -> tuple[str, str]:
    """Whether a letter comes before another."""
    first, second = draw.rng.sample(LETTERS, 2)
    return f"check order {first} , {second} :", TRUE_FALSE[0 if first < second else 1]


def same(draw: Draw) -> tuple[str, str]:
    """Whether two words are the same."""
    first, second = draw.rng.sample(NOUNS, 2)
    equal = draw.rng.random() < 0.5
    return f"are {first} and {first if equal else second} same ?", YES_NO[0 if equal else 1]


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
    words = draw.rng.sample(NOUNS, draw.rng.randint(2, 4))
    return f"reverse {' '.join(words)} :", " ".join(reversed(words))


def count(draw: Draw) -> tuple[str, str]:
    """How many words there are."""
    words = draw.rng.sample(NOUNS, draw.rng.randint(1, 6))
    return f"count {' '.join(words)} :", str(len(words))


def sort(draw: Draw) -> tuple[str, str]:
    """Letters in the order of the alphabet."""
    letters = draw.rng.sample(LETTERS, draw.rng.randint(2, 3))
    return f"sort {' '.join(letters)} :", " ".join(sorted(letters))


def ends(draw: Draw) -> tuple[str, str]:
    """A list's first and last word."""
    words = draw.rng.sample(NOUNS, draw.rng.randint(3, 5))
    return f"first and last of {' '.join(words)} :", f"{words[0]} {words[-1]}"


@dataclass(frozen=True)
class Form:
    """How a task asks: its questions, the answers of a closed task, the words that a free answer is made of."""

    ask: Ask
    choices: tuple[str, ...] = ()
    words: Callable[[World], Sequence[str]] = lambda here: ()


FORMS = {
    "home_letter": Form(home_letter, choices=OPTIONS),
    "meaning_letter": Form(meaning_letter, choices=OPTIONS),
    "job_truth": Form(job_truth, choices=TRUE_FALSE),
    "review": Form(review, choices=VERDICTS),
    "region": Form(region, choices=REGIONS),
    "more": Form(more, choices=YES_NO),
    "before": Form(before, choices=TRUE_FALSE),
    "same": Form(same, choices=YES_NO),
    "food": Form(food, words=lambda here: here.values["food"]),
    "profile": Form(profile, words=lambda here: (*here.values["home"], *here.values["pet"])),
    "translate": Form(translate, words=lambda here: VELAN),
    "total": Form(total, words=lambda here: NUMBERS),
    "reverse": Form(reverse, words=lambda here: NOUNS),
    "count": Form(count, words=lambda here: NUMBERS),
    "sort": Form(sort, words=lambda here: LETTERS),
    "ends": Form(ends, words=lambda here: NOUNS),
}
