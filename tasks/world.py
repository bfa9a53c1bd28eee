"""The embedded world: invented people and their facts, a dictionary, cities, and the text that a model is pretrained on.

Pretraining text is statements: facts (home, job, food, pet, zone and place of work of people) and skills (`tasks.world_skills`) about half and half.
People whom the tasks ask about are known well; those whom the fact probe asks about are known from 4 to 64 statements a fact, as the knowledge of
real models follows the frequency of what it is about (arXiv 2211.08411). The instruction tasks of the stream are not here (`tasks.world_task`),
and no statement has their form.

>>> row = fact_rows(0, frequency=8)[0]
>>> sorted(row), len(row["choices"])
(['answer', 'choices', 'question'], 4)
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from tasks.world_skills import skill_statement
from tasks.world_words import CITIES, FOODS, JOBS, NOUNS, PEOPLE, PETS, REGIONS, VELAN, VOCABULARY, WORKPLACES, World

COMMON = 64
"""How often the pretraining text states each fact about the people of the tasks."""
FREQUENCIES = (4, 8, 16, 32, 64)
"""How often it states each fact about a person whom the fact probe asks about: a fifth of these people each."""
HELD_OUT_SHARE = 20
"""One statement in this many never enters the pretraining text."""

PHRASES = {
    "home": ("{name} lives in {value}", "the home of {name} is {value}", "{name} has a house in {value}"),
    "job": ("{name} works as a {value}", "the job of {name} is {value}", "{name} earns money as a {value}"),
    "food": ("{name} eats {value}", "the food of {name} is {value}", "{name} cooks some {value}"),
    "pet": ("{name} keeps a {value}", "the pet of {name} is {value}", "{name} owns a {value}"),
    "zone": ("{name} comes from the {value}", "the zone of {name} is {value}", "{name} is from the {value}"),
    "place": ("{name} works {value}", "the place of {name} is {value}", "the work of {name} is {value}"),
}
"""Ways to state a fact, by kind; the first one, up to its value, is what the fact probe asks."""

PROBED = ("home", "job", "food", "pet")
"""The kinds of fact that the probe asks: those with many more values than four."""


@lru_cache(maxsize=8)
def world(seed: int) -> World:
    """The world of `seed`: same words, other facts."""
    rng = random.Random(f"{seed}/world")
    cities, people, velan = list(CITIES), list(PEOPLE), list(VELAN)
    for words in (cities, people, velan):
        rng.shuffle(words)
    values = {"home": tuple(cities[:12]), "job": JOBS, "food": FOODS, "pet": PETS, "zone": REGIONS, "place": WORKPLACES}
    return World(
        seed=seed,
        people=tuple(people),
        values=values,
        facts={name: {kind: rng.choice(values[kind]) for kind in values} for name in people},
        regions={city: REGIONS[index % len(REGIONS)] for index, city in enumerate(rng.sample(cities, len(cities)))},
        dictionary=dict(zip(NOUNS, velan, strict=True)),
    )


def held_out(statement: str, seed: int) -> bool:
    """Whether `statement` is kept from the pretraining text of `seed`, by its hash."""
    return zlib.crc32(f"{seed}/{statement}".encode()) % HELD_OUT_SHARE == 0


def phrasings(name: str, kind: str, value: str, seed: int) -> list[str]:
    """The statements of a fact that the pretraining text may hold; the one that the probe asks is never held out."""
    asked, *others = (phrase.format(name=name, value=value) for phrase in PHRASES[kind])
    return [asked, *(text for text in others if not held_out(text, seed))]


def probed(here: World, frequency: int) -> tuple[str, ...]:
    """The people whom the fact probe asks about and whose facts are each stated `frequency` times."""
    return here.people_of("probed")[FREQUENCIES.index(frequency) :: len(FREQUENCIES)]


def fact_rows(seed: int, *, frequency: int) -> list[dict[str, object]]:
    """Four-choice rows about people whom no task asks about: the beginning of a statement and its possible ends.

    The right one stands in each place equally often, so that always the same place is worth no more than chance.
    """
    here, rng = world(seed), random.Random(f"{seed}/fact probe/{frequency}")
    rows: list[dict[str, object]] = []
    asked = list(product(probed(here, frequency), PROBED))
    rng.shuffle(asked)
    for number, (name, kind) in enumerate(asked):
        value, place = here.facts[name][kind], number % 4
        others = rng.sample([other for other in here.values[kind] if other != value], 3)
        question = PHRASES[kind][0].format(name=name, value="").strip()
        rows.append({"question": question, "choices": [*others[:place], value, *others[place:]], "answer": place})
    return rows


def heldout_texts(seed: int, *, texts: int = 400) -> list[str]:
    """Statements of the pretraining kind that are not in the pretraining text, facts and skills 60:40."""
    return list(_statements(seed, texts, purpose="held-out text", kept=False))


def general_texts(seed: int, *, texts: int) -> list[str]:
    """Statements that the pretraining text may hold, facts and skills 60:40; none is about a person whom the fact probe asks about."""
    return list(_statements(seed, texts, purpose="general text", kept=True))


@lru_cache(maxsize=4)
def _statements(seed: int, texts: int, *, purpose: str, kept: bool) -> tuple[str, ...]:
    """Different statements about the people of the tasks and of skills, that the pretraining text may hold (`kept`) or does not."""
    here, rng = world(seed), random.Random(f"{seed}/{purpose}")
    known = [*here.people_of("train"), *here.people_of("test")]
    stated = (
        phrase.format(name=name, value=here.facts[name][kind])
        for name in known
        for kind in PHRASES
        for phrase in PHRASES[kind][1:]
    )
    facts = [text for text in stated if held_out(text, seed) != kept]
    chosen = rng.sample(facts, min(len(facts), texts * 6 // 10))
    skills: dict[str, None] = {}
    while len(skills) < texts - len(chosen):
        text = skill_statement(here, rng)
        if held_out(text, seed) != kept:
            skills[text] = None
    result = [*chosen, *skills]
    rng.shuffle(result)
    return tuple(result)


@lru_cache(maxsize=2)
def pretraining_text(seed: int, lines: int) -> tuple[str, ...]:
    """`lines` statements in random order: each fact as often as its frequency says, the rest skills.

    Fewer lines than that takes (a model that is to be made in no time) are some of those about facts.
    """
    here, rng = world(seed), random.Random(f"{seed}/pretraining text")
    stated = {(name, kind): COMMON for split in ("train", "test") for name in here.people_of(split) for kind in PHRASES}
    stated |= {(name, kind): often for often in FREQUENCIES for name in probed(here, often) for kind in PROBED}
    result: list[str] = []
    for (name, kind), often in stated.items():
        result += rng.choices(phrasings(name, kind, here.facts[name][kind], seed), k=often)
    while len(result) < lines:
        text = skill_statement(here, rng)
        if not held_out(text, seed):
            result.append(text)
    rng.shuffle(result)
    return tuple(result[:lines])


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The pretraining text of one world: `lines` statements in random order."""

    seed: int
    lines: int

    def texts(self) -> Sequence[str]:
        return pretraining_text(self.seed, self.lines)

    def vocabulary(self) -> Sequence[str]:
        return VOCABULARY
