"""The embedded world's word lists (every word that a statement or a task can hold, in a fixed order) and what a world is made of.

Not here: who lives where (`tasks.world`). The lists are the same for every seed, so that every world has the same tokenizer.

>>> PEOPLE[:3], len(PEOPLE)
(('mira', 'milen', 'mitor'), 256)
"""

from dataclasses import dataclass


def joined(starts: str, ends: str) -> tuple[str, ...]:
    """Invented words: every start with every end."""
    return tuple(start + end for start in starts.split() for end in ends.split())


PEOPLE = joined(
    "mi ta lo ke ru sa be ni vo da pe ju zo ha fi go", "ra len tor vin mak dis bel nor sha kit dun pol wen zim gur osk"
)
CITIES = joined("dor pel kav sum lin bri wes tal gar hul", "burg ford ton wick")
WORKPLACES = ("inside", "outside")
REGIONS = ("north", "south", "east", "west")
JOBS = tuple("baker teacher sailor painter doctor farmer singer miner weaver pilot judge barber".split())
FOODS = tuple("rice soup bread cheese fish beans plums honey noodles eggs cake corn".split())
PETS = tuple("cat dog goat owl snake rabbit parrot horse turtle hen pony frog".split())
NOUNS = tuple(
    "lamp chair spoon table river stone cloud tree bridge window door hammer candle carpet bottle basket mirror pencil "
    "ladder garden button bell coin boat".split()
)
VELAN = joined("mok ked zul pav rit gos", "ae ux il oq")
GOOD = tuple(
    "joyful kind brave gentle lovely happy cheerful honest clever warm bright friendly calm graceful generous "
    "delightful pleasant superb charming loyal polite wise splendid merry sweet".split()
)
BAD = tuple(
    "cruel rude nasty gloomy bitter awful lazy greedy horrid selfish angry dreadful boring ugly mean hostile "
    "dishonest clumsy miserable vile sour harsh grim rotten spiteful".split()
)
LETTERS = tuple("abcdefghijklmnopqrst")
NUMBERS = tuple(str(number) for number in range(31))
OPTIONS = ("A", "B", "C", "D")
YES_NO = ("yes", "no")
TRUE_FALSE = ("true", "false")
VERDICTS = ("positive", "negative")
KINDS = ("thing", "letter", "number", "people")
LABELS = (*OPTIONS, *YES_NO, *TRUE_FALSE, *VERDICTS, *REGIONS, *KINDS, *(str(number) for number in range(7)))
"""Answers of the tasks that few statements end with; lists are made of them too."""
PLAIN = tuple(
    "a add and answer are as backwards barber bear before belongs better by calm check choose comes compute cooks count "
    "describe different does earns eat eats ends eq find first food for from good bad has have holds home house in is "
    "it items job keeps lacks last less letter lies likes list lives map meaning means minus money more name not of "
    "order or out owns people pet plus question rank region report reverse review rising same search set some sort "
    "starts statement than the there things to total translate velan verdict what when where which who with word words label long size thing place "
    "work works zone then forward backward up down goes inside outside : ? ,".split()
)
VOCABULARY = tuple(
    dict.fromkeys(
        (*PEOPLE, *CITIES, *REGIONS, *JOBS, *FOODS, *PETS, *NOUNS, *VELAN, *GOOD, *BAD, *LETTERS, *NUMBERS)
        + (*OPTIONS, *YES_NO, *TRUE_FALSE, *VERDICTS, *KINDS, *WORKPLACES, *PLAIN)
    )
)
"""All words, once: the tokenizer's vocabulary."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Who and what there is. `values` are the possible values of each kind of fact, `facts[name][kind]` the true one.

    `people` are in a random order: the tasks train on the first 100 and test on the next 30; the fact probe asks about the rest.
    """

    seed: int
    people: tuple[str, ...]
    values: dict[str, tuple[str, ...]]
    facts: dict[str, dict[str, str]]
    regions: dict[str, str]
    dictionary: dict[str, str]

    def people_of(self, split: str) -> tuple[str, ...]:
        """The people that the tasks' `split` ("train", "test") or the fact probe ("probed") asks about."""
        return {"train": self.people[:100], "test": self.people[100:130], "probed": self.people[130:]}[split]
