"""The skills of the embedded world, as statements: lists, letters, sums, comparisons, words and cities.

Not here: instructions. A statement says how things are ("3 plus 4 is 7"); the tasks ask ("add 3 and 4 :").

>>> from tasks.world import world
>>> len(skill_statement(world(0), random.Random(0)).split()) <= 14
True
"""

import random
from collections.abc import Callable, Mapping
from itertools import accumulate

from tasks.world_words import BAD, GOOD, LABELS, LETTERS, NOUNS, NUMBERS, VOCABULARY, World

Skill = Callable[[World, random.Random], str]


def words_of(rng: random.Random, low: int, high: int) -> list[str]:
    """`low` to `high` different words: mostly nouns, sometimes labels or any words, so that every word is read and written."""
    pool = rng.choices((NOUNS, LABELS, VOCABULARY), weights=(7, 2, 1))[0]
    return rng.sample(pool, rng.randint(low, high))


def _backwards(here: World, rng: random.Random) -> str:
    words = words_of(rng, 2, 3)
    return f"{' '.join(words)} backwards is {' '.join(reversed(words))}"


def _count(here: World, rng: random.Random) -> str:
    words = words_of(rng, 1, 9)
    return f"{' '.join(words)} has {len(words)} words"


def _letters_sorted(here: World, rng: random.Random) -> str:
    letters = rng.sample(LETTERS, rng.randint(2, 3))
    return f"{' '.join(letters)} in order is {' '.join(sorted(letters))}"


def _letters_compared(here: World, rng: random.Random) -> str:
    first, second = rng.sample(LETTERS, 2)
    return f"{first} then {second} is {'forward' if first < second else 'backward'}"


def _plus(here: World, rng: random.Random) -> str:
    left, right = rng.randint(0, 10), rng.randint(0, 10)
    return f"{left} plus {right} is {left + right}"


def _compared(here: World, rng: random.Random) -> str:
    first, second = rng.sample(range(len(NUMBERS)), 2)
    return f"from {first} to {second} goes {'up' if first < second else 'down'}"


def _translated(here: World, rng: random.Random) -> str:
    noun = rng.choice(NOUNS)
    velan = here.dictionary[noun]
    return rng.choice((f"{noun} in velan is {velan}", f"{velan} means {noun}", f"the velan word for {noun} is {velan}"))


def _felt(here: World, rng: random.Random) -> str:
    good = rng.random() < 0.5
    word, noun, name = rng.choice(GOOD if good else BAD), rng.choice(NOUNS), "good" if good else "bad"
    return rng.choice((f"{word} is a {name} word", f"a {word} {noun} is {name}", f"the {noun} is {word} and {name}"))


def _placed(here: World, rng: random.Random) -> str:
    city, region = rng.choice(list(here.regions.items()))
    return rng.choice((f"{city} lies in the {region}", f"the {region} has {city}", f"from {city} is {region}"))


SKILLS: Mapping[Skill, float] = {
    _backwards: 4.5,
    _plus: 2.0,
    _translated: 2.0,
    _count: 1.0,
    _letters_sorted: 1.5,
    _letters_compared: 1.0,
    _compared: 1.0,
    _felt: 1.0,
    _placed: 0.5,
}
"""All skills, with their shares of the text."""
KINDS, BOUNDS = tuple(SKILLS), tuple(accumulate(SKILLS.values()))


def skill_statement(here: World, rng: random.Random) -> str:
    """One statement of a skill drawn at random, at most 14 words."""
    return rng.choices(KINDS, cum_weights=BOUNDS)[0](here, rng)
