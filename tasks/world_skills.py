"""The skills of the embedded world, as statements: lists, letters, sums, comparisons, words and cities.

Not here: instructions. A statement says how things are ("3 plus 4 is 7"); the tasks ask ("add 3 and 4 :").

>>> from tasks.world import world
>>> len(skill_statement(world(0), random.Random(0)).split()) <= 14
True
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from tasks.world_words import BAD, GOOD, LABELS, LETTERS, NOUNS, NUMBERS, OPTIONS, VOCABULARY

if TYPE_CHECKING:
    from tasks.world import World


def words_of(rng: random.Random, low: int, high: int) -> list[str]:
    """`low` to `high` different words: mostly nouns, sometimes labels or any words, so that every word is read and written."""
    pool = rng.choices((NOUNS, LABELS, VOCABULARY), weights=(6, 2, 2))[0]
    return rng.sample(pool, rng.randint(low, high))


def backwards(here: World, rng: random.Random) -> str:
    """A list and its reverse."""
    words = words_of(rng, 2, 4)
    return f"{' '.join(words)} backwards is {' '.join(reversed(words))}"


def ends(here: World, rng: random.Random) -> str:
    """A list's first and last item."""
    words = words_of(rng, 3, 5)
    return f"{' '.join(words)} starts with {words[0]} and ends with {words[-1]}"


def count(here: World, rng: random.Random) -> str:
    """How many words a list has."""
    words = words_of(rng, 1, 9)
    return f"{' '.join(words)} has {len(words)} words"


def member(here: World, rng: random.Random) -> str:
    """Whether a list holds a word."""
    words = words_of(rng, 3, 5)
    if rng.random() < 0.5:
        return f"{' '.join(words[:-1])} with {rng.choice(words[:-1])} is found"
    return f"{' '.join(words[:-1])} with {words[-1]} is missing"


def lettered(here: World, rng: random.Random) -> str:
    """Which letter an item of a lettered list has."""
    words = words_of(rng, 4, 4)
    place = rng.randrange(4)
    items = " ".join(f"{letter} {word}" for letter, word in zip(OPTIONS, words, strict=True))
    return f"{items} {words[place]} is {OPTIONS[place]}"


def letters_sorted(here: World, rng: random.Random) -> str:
    """Letters put in the order of the alphabet."""
    letters = rng.sample(LETTERS, rng.randint(2, 4))
    return f"{' '.join(letters)} in order is {' '.join(sorted(letters))}"


def letters_compared(here: World, rng: random.Random) -> str:
    """Whether two letters are in the order of the alphabet."""
    first, second = rng.sample(LETTERS, 2)
    return f"{first} then {second} is {'forward' if first < second else 'backward'}"


def plus(here: World, rng: random.Random) -> str:
    """A sum."""
    left, right = rng.randint(0, 12), rng.randint(0, 12)
    return rng.choice((f"{left} plus {right} is {left + right}", f"{left + right} is {left} plus {right}"))


def compared(here: World, rng: random.Random) -> str:
    """Whether a number grows or shrinks."""
    first, second = rng.sample(range(len(NUMBERS)), 2)
    return f"from {first} to {second} goes {'up' if first < second else 'down'}"


def translated(here: World, rng: random.Random) -> str:
    """A word and its meaning."""
    noun = rng.choice(NOUNS)
    velan = here.dictionary[noun]
    return rng.choice((f"{noun} in velan is {velan}", f"{velan} means {noun}", f"the velan word for {noun} is {velan}"))


def felt(here: World, rng: random.Random) -> str:
    """Whether a word is a good one."""
    good = rng.random() < 0.5
    word, noun, name = rng.choice(GOOD if good else BAD), rng.choice(NOUNS), "good" if good else "bad"
    return rng.choice((f"{word} is a {name} word", f"a {word} {noun} is {name}", f"the {noun} is {word} and {name}"))


def placed(here: World, rng: random.Random) -> str:
    """Which region a city lies in."""
    city, region = rng.choice(list(here.regions.items()))
    return rng.choice((f"{city} lies in the {region}", f"the {region} has {city}", f"from {city} is {region}"))


SKILLS = (backwards, ends, count, member, lettered, letters_sorted, letters_compared, plus, compared, translated, felt, placed)


def skill_statement(here: World, rng: random.Random) -> str:
    """One statement of a skill drawn at random, at most 14 words."""
    return rng.choice(SKILLS)(here, rng)
