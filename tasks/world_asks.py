"""The sixteen instruction forms of the embedded world: each draws one question of a split and its answer.

A question about a fact, a word or a city of the test split is about a person, word or city that no train question names.
Not here: pretraining statements (`tasks.world_skills`), and the collecting of rows (`tasks.world_task`).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tasks.world_words import (
    BAD,
    CITIES,
    GOOD,
    KINDS,
    LETTERS,
    NOUNS,
    NUMBERS,
    PETS,
    REGIONS,
    TRUE_FALSE,
    VELAN,
    VERDICTS,
    WORKPLACES,
    YES_NO,
    World,
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
        return self.rng.choice(self.here.people_of(self.split))

    def options(self, name: str, fact: str) -> tuple[str, ...]:
        """Four possible values of somebody's fact in random order, the true one among them."""
        right = self.here.facts[name][fact]
        options = [right, *self.rng.sample([value for value in self.here.values[fact] if value != right], 3)]
        self.rng.shuffle(options)
        return tuple(options)


Asked = tuple[str, str]
"""A prompt and its answer."""
Ask = Callable[[Draw], Asked]


def about(fact: str, *prompts: str) -> Ask:
    """One of the `prompts` about a fact of somebody's."""

    def ask(draw: Draw) -> Asked:
        name = draw.person()
        return draw.rng.choice(prompts).format(name), draw.here.facts[name][fact]

    return ask


def out_of_four(fact: str, prompt: str, separator: str) -> Ask:
    """A fact of somebody's, out of four possible values that the prompt lists."""

    def ask(draw: Draw) -> Asked:
        name = draw.person()
        return prompt.format(separator.join(draw.options(name, fact)), name), draw.here.facts[name][fact]

    return ask


def kind(draw: Draw) -> Asked:
    pools = dict(zip(KINDS, (NOUNS, LETTERS, NUMBERS, draw.here.people), strict=True))
    label = draw.rng.choice(KINDS)
    return f"label {draw.rng.choice(draw.of(pools[label]))} {draw.rng.choice(draw.of(pools[label]))} :", label


def length(draw: Draw) -> Asked:
    words = draw.rng.sample(NOUNS, draw.rng.randint(1, 6))
    return f"size {' '.join(words)} : long ?", YES_NO[0 if len(words) > 3 else 1]


def review(draw: Draw) -> Asked:
    good = draw.rng.random() < 0.5
    word, noun = draw.rng.choice(draw.of(GOOD if good else BAD)), draw.rng.choice(NOUNS)
    return f"review : the {noun} is {word} verdict", VERDICTS[0 if good else 1]


def more(draw: Draw) -> Asked:
    left, right = draw.rng.sample(range(len(NUMBERS)), 2)
    return f"compute is {left} more than {right} ?", YES_NO[0 if left > right else 1]


def before(draw: Draw) -> Asked:
    first, second = draw.rng.sample(LETTERS, 2)
    return f"check order {first} , {second} :", TRUE_FALSE[0 if first < second else 1]


def translate(draw: Draw) -> Asked:
    first, second = draw.rng.sample(NOUNS, 2)
    return f"translate {first} {second} :", f"{draw.here.dictionary[first]} {draw.here.dictionary[second]}"


def total(draw: Draw) -> Asked:
    left, right = draw.rng.randint(0, 10), draw.rng.randint(0, 10)
    return f"add {left} and {right} :", str(left + right)


def reverse(draw: Draw) -> Asked:
    first, second = draw.rng.sample(NOUNS, 2)
    return f"reverse {first} {second} :", f"{second} {first}"


def count(draw: Draw) -> Asked:
    words = draw.rng.sample(NOUNS, draw.rng.randint(1, 6))
    return f"count {' '.join(words)} :", str(len(words))


def sort(draw: Draw) -> Asked:
    letters = draw.rng.sample(LETTERS, draw.rng.randint(2, 3))
    return f"sort {' '.join(letters)} :", " ".join(sorted(letters))


@dataclass(frozen=True)
class Form:
    """How a task asks: its questions, the answers of a closed task, the words that a free answer is made of.

    With `listed`, a question lists the choices that it allows; otherwise all of them are allowed.
    """

    ask: Ask
    choices: tuple[str, ...] = ()
    listed: bool = False
    words: Callable[[World], Sequence[str]] = lambda here: ()

    def choices_of(self, prompt: str) -> tuple[str, ...]:
        return tuple(word for word in prompt.split() if word in self.choices) if self.listed else self.choices


FORMS = {
    "zone": Form(about("zone", "zone of {} :", "question zone {} answer"), choices=REGIONS),
    "place": Form(about("place", "label place of work {} :", "label work of {} :"), choices=WORKPLACES),
    "pet_choice": Form(out_of_four("pet", "choose {} pet of {} :", " , "), choices=PETS, listed=True),
    "home_choice": Form(out_of_four("home", "find {} home of {} ?", " or "), choices=CITIES, listed=True),
    "kind": Form(kind, choices=KINDS),
    "length": Form(length, choices=YES_NO),
    "review": Form(review, choices=VERDICTS),
    "more": Form(more, choices=YES_NO),
    "before": Form(before, choices=TRUE_FALSE),
    "food": Form(
        about("food", "question what does {} eat answer", "question which food for {} answer"),
        words=lambda here: here.values["food"],
    ),
    "job": Form(
        about("job", "describe job of {} :", "report what work for {} :"), words=lambda here: here.values["job"]
    ),
    "translate": Form(translate, words=lambda here: VELAN),
    "total": Form(total, words=lambda here: NUMBERS),
    "reverse": Form(reverse, words=lambda here: NOUNS),
    "count": Form(count, words=lambda here: NUMBERS),
    "sort": Form(sort, words=lambda here: LETTERS),
}
