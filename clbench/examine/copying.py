"""Readers that know nothing and only copy words out of a prompt: what they get right stands in the prompt.

A reader sees the prompt, the number of words of the right answer and, to choose its cues, the right answers of a few examples. Words
are runs of letters and digits, or single other signs; upper and lower case count.

>>> from clbench.types import Example
>>> examples = [Example(id=str(i), prompt=f"sum of 1 and {i} ( {i + 1} ) :", answer=str(i + 1)) for i in range(3)]
>>> [reader for reader, answers in copies(examples) if answers == ["1", "2", "3"]]
['the words that stand 2 words before the end', 'the last number', "the words after the first '('", "the words after the last '('"]
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from os.path import commonprefix

from clbench.types import Example

WORD = re.compile(r"\w+|[^\w\s]")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
CUE_EXAMPLES = 3
"""A cue is looked for around the right answers of so many examples: the first may be an exception."""


class Words:
    """The words of a text, and where they stand in it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._found = list(WORD.finditer(text))
        self.words = [found.group() for found in self._found]

    def copy(self, first: int, count: int) -> str:
        """The text of up to `count` words from number `first` (from 0) on; "" where there are none."""
        chosen = self._found[max(first, 0) : max(first + count, 0)]
        return self.text[chosen[0].start() : chosen[-1].end()] if chosen else ""

    def before_last(self, count: int) -> str:
        return self.text[: self._found[-count].start()] if count else self.text

    def places(self, words: Sequence[str]) -> list[int]:
        """The numbers of the words at which `words`, one at least, begin."""
        starts = range(len(self.words) - len(words) + 1)
        return [first for first in starts if words and self.words[first : first + len(words)] == list(words)]


def copies(examples: Sequence[Example]) -> Iterator[tuple[str, list[str]]]:
    """(what a reader copies, its answer to each example), for every reader.

    What all prompts end in is the template's ("Answer:"), so readers look behind it, too.
    """
    prompts = [Words(example.prompt) for example in examples]
    right = [WORD.findall(example.answer) for example in examples]

    def read(starts: Iterable[int]) -> list[str]:
        pairs = zip(prompts, starts, right, strict=True)
        return [prompt.copy(start, len(answer)) for prompt, start, answer in pairs]

    ends = [len(prompt.words) - len(answer) for prompt, answer in zip(prompts, right, strict=True)]
    tail = common_tail(prompts)
    for skipped in range(tail + 1):
        yield f"the words that stand {skipped} words before the end", read(end - skipped for end in ends)
    yield "the first words", read([0] * len(prompts))
    yield "the last number", [(NUMBER.findall(example.prompt) or [""])[-1] for example in examples]
    for skipped in sorted({0, tail}):
        shown = [prompt.before_last(skipped) for prompt in prompts]
        yield f"the last lines without their last {skipped} words", [text.rstrip().split("\n")[-1] for text in shown]
        if examples[0].choices:
            named = [named_last(example.choices, text) for example, text in zip(examples, shown, strict=True)]
            yield f"the choices named last, the last {skipped} words aside,", named
    for cue in cues(prompts, right):
        behind = [[place + 1 for place in prompt.places([cue])] or [len(prompt.words)] for prompt in prompts]
        yield f"the words after the first {cue!r}", read(places[0] for places in behind)
        yield f"the words after the last {cue!r}", read(places[-1] for places in behind)


def common_tail(prompts: Sequence[Words]) -> int:
    """How many words at their ends all prompts share."""
    return len(commonprefix([prompt.words[::-1] for prompt in prompts]))


def cues(prompts: Sequence[Words], right: Sequence[Sequence[str]]) -> list[str]:
    """The words that stand before the right answer in the first prompts, each once."""
    first = list(zip(prompts, right, strict=True))[:CUE_EXAMPLES]
    found = [prompt.words[place - 1] for prompt, answer in first for place in prompt.places(answer) if place > 0]
    return list(dict.fromkeys(found))


def named_last(choices: Sequence[str], text: str) -> str:
    """The choice that ends last in `text` as whole words, the longer of two that end together; the first choice where none occurs."""
    ends = [
        (found.end(), len(choice), choice)
        for choice in choices
        for found in re.finditer(rf"(?<!\w){re.escape(choice)}(?!\w)", text)
    ]
    return max(ends, default=(0, 0, choices[0]))[2]
