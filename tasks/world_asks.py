"""The sixteen instruction forms of the embedded world: each draws one question of a split and its answer.

A question about a fact, a word or a city of the test split is about a person, word or city that no train question names.
Not here: pretraining statements (`tasks.world_skills`), and the collecting of rows (`tasks.world_task`).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tasks import world_words as lists
from tasks.world_words import World


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


def _kind(draw: Draw) -> Asked:
    pools = dict(zip(lists.KINDS, (lists.NOUNS, lists.LETTERS, lists.NUMBERS, draw.here.people), strict=True))
    label = draw.rng.choice(lists.KINDS)
    return f"label {draw.rng.choice(draw.of(pools[label]))} {draw.rng.choice(draw.of(pools[label]))} :", label


def _length(draw: Draw) -> Asked:
    words = draw.rng.sample(lists.NOUNS, draw.rng.randint(1, 6))
    return f"size {' '.join(words)} : long ?", lists.YES_NO[0 if len(words) > 3 else 1]


def _review(draw: Draw) -> Asked:
    good = draw.rng.random() < 0.5
    word, noun = draw.rng.choice(draw.of(lists.GOOD if good else lists.BAD)), draw.rng.choice(lists.NOUNS)
    return f"review : the {noun} is {word} verdict", lists.VERDICTS[0 if good else 1]


def _more(draw: Draw) -> Asked:
    left, right = draw.rng.sample(range(len(lists.NUMBERS)), 2)
    return f"compute is {left} more than {right} ?", lists.YES_NO[0 if left > right else 1]


def _before(draw: Draw) -> Asked:
    first, second = draw.rng.sample(lists.LETTERS, 2)
    return f"check order {first} , {second} :", lists.TRUE_FALSE[0 if first < second else 1]


def _translate(draw: Draw) -> Asked:
    first, second = draw.rng.sample(lists.NOUNS, 2)
    return f"translate {first} {second} :", f"{draw.here.dictionary[first]} {draw.here.dictionary[second]}"


def _total(draw: Draw) -> Asked:
    left, right = draw.rng.randint(0, 10), draw.rng.randint(0, 10)
    return f"add {left} and {right} :", str(left + right)


def _reverse(draw: Draw) -> Asked:
    first, second = draw.rng.sample(lists.NOUNS, 2)
    return f"reverse {first} {second} :", f"{second} {first}"


def _count(draw: Draw) -> Asked:
    words = draw.rng.sample(lists.NOUNS, draw.rng.randint(1, 6))
    return f"count {' '.join(words)} :", str(len(words))


def _sort(draw: Draw) -> Asked:
    letters = draw.rng.sample(lists.LETTERS, draw.rng.randint(2, 3))
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
    "zone": Form(about("zone", "zone of {} :", "question zone {} answer"), choices=lists.REGIONS),
    "place": Form(about("place", "label place of work {} :", "label work of {} :"), choices=lists.WORKPLACES),
    "pet_choice": Form(out_of_four("pet", "choose {} pet of {} :", " , "), choices=lists.PETS, listed=True),
    "home_choice": Form(out_of_four("home", "find {} home of {} ?", " or "), choices=lists.CITIES, listed=True),
    "kind": Form(_kind, choices=lists.KINDS),
    "length": Form(_length, choices=lists.YES_NO),
    "review": Form(_review, choices=lists.VERDICTS),
    "more": Form(_more, choices=lists.YES_NO),
    "before": Form(_before, choices=lists.TRUE_FALSE),
    "food": Form(
        about("food", "question what does {} eat answer", "question which food for {} answer"),
        words=lambda here: here.values["food"],
    ),
    "job": Form(
        about("job", "describe job of {} :", "report what work for {} :"), words=lambda here: here.values["job"]
    ),
    "translate": Form(_translate, words=lambda here: lists.VELAN),
    "total": Form(_total, words=lambda here: lists.NUMBERS),
    "reverse": Form(_reverse, words=lambda here: lists.NOUNS),
    "count": Form(_count, words=lambda here: lists.NUMBERS),
    "sort": Form(_sort, words=lambda here: lists.LETTERS),
}
