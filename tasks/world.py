"""The embedded world: invented people and their facts, a dictionary, cities, and the text that a model is pretrained on.

Pretraining text is statements: facts (home, job, food, pet, zone and place of work of 160 people) and skills (`tasks.world_skills`) about 60:40.
The instruction tasks of the stream are not here (`tasks.world_task`), and no statement has their form.

>>> row = fact_rows(0)[0]
>>> sorted(row), len(row["choices"])
(['answer', 'choices', 'question'], 4)
"""

import random
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

from tasks.world_skills import skill_statement
from tasks.world_words import CITIES, FOODS, JOBS, NOUNS, PEOPLE, PETS, REGIONS, VELAN, VOCABULARY, WORKPLACES, World

FACT_SHARE = 0.6
"""Share of facts among the statements."""
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


def fact_statements(here: World) -> Iterator[tuple[str, bool]]:
    """Every phrasing of every fact, and whether it is the one that the probe asks (which is never held out)."""
    for name, facts in here.facts.items():
        for kind, value in facts.items():
            for index, phrase in enumerate(PHRASES[kind]):
                yield phrase.format(name=name, value=value), index == 0


def fact_rows(seed: int, *, rows: int = 200) -> list[dict[str, object]]:
    """Four-choice rows about people whom no task trains on: the beginning of a statement and its possible ends."""
    here, rng = world(seed), random.Random(f"{seed}/fact probe")
    asked = rng.sample([(name, kind) for name in here.people_of("untrained") for kind in PROBED], rows)
    result: list[dict[str, object]] = []
    for name, kind in asked:
        value = here.facts[name][kind]
        choices = [value, *rng.sample([other for other in here.values[kind] if other != value], 3)]
        rng.shuffle(choices)
        question = PHRASES[kind][0].format(name=name, value="").strip()
        result.append({"question": question, "choices": choices, "answer": choices.index(value)})
    return result


def heldout_texts(seed: int, *, texts: int = 400) -> list[str]:
    """Statements of the pretraining kind that are not in the pretraining text, facts and skills 60:40."""
    here, rng = world(seed), random.Random(f"{seed}/held-out text")
    facts = [text for text, asked in fact_statements(here) if not asked and held_out(text, seed)]
    chosen = rng.sample(facts, min(len(facts), texts * 6 // 10))
    skills: dict[str, None] = {}
    while len(skills) < texts - len(chosen):
        text = skill_statement(here, rng)
        if held_out(text, seed):
            skills[text] = None
    result = [*chosen, *skills]
    rng.shuffle(result)
    return result


@lru_cache(maxsize=2)
def pretraining_text(seed: int, lines: int) -> tuple[str, ...]:
    """`lines` statements: facts come around again and again, skills are drawn anew."""
    here, rng = world(seed), random.Random(f"{seed}/pretraining text")
    facts = [text for text, asked in fact_statements(here) if asked or not held_out(text, seed)]
    result: list[str] = []
    while len(result) < lines:
        if rng.random() < FACT_SHARE:
            result.append(rng.choice(facts))
            continue
        text = skill_statement(here, rng)
        if not held_out(text, seed):
            result.append(text)
    return tuple(result)


class Corpus:
    """The pretraining text of one world: `lines` statements in random order."""

    def __init__(self, *, seed: int, lines: int) -> None:
        self.seed = seed
        self.lines = lines

    def texts(self) -> Sequence[str]:
        return pretraining_text(self.seed, self.lines)

    def vocabulary(self) -> Sequence[str]:
        return VOCABULARY
