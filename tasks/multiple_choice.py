"""Lettered multiple choice: the options are part of the prompt, the answer is a letter.

A row of commonsense_qa:
    {"question": "...", "choices": {"label": ["A", "B", ...], "text": ["...", "...", ...]}, "answerKey": "B"}
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Literal

from clbench.types import Example, UserMistake
from tasks.hub import ClosedTask, Row, TextTask, lookup, render, text_at, texts_at


@dataclass(kw_only=True)
class MultipleChoice(ClosedTask, TextTask):
    """`options` is the column that lists the options, or several columns with one option each.

    `{options}` in the template stands for them, a line each: "A. ...". `answer` is the column of the right one: its
    letter, its position from 0, or its entry in the column `option_labels`.
    """

    metric: Literal["accuracy"]
    options: str | Sequence[str]
    option_labels: str | None = None

    def example(self, row: Row, *, id: str) -> Example:
        """The question with its lettered options."""
        own = self.options
        texts = texts_at(row, own) if isinstance(own, str) else [text_at(row, column) for column in own]
        if len(texts) > len(ascii_uppercase):
            raise UserMistake(
                f"column {own!r} holds {len(texts)} options; there are letters for {len(ascii_uppercase)}"
            )
        letters = ascii_uppercase[: len(texts)]
        labels = texts_at(row, self.option_labels) if self.option_labels else list(letters)
        right = position(lookup(row, self.answer), labels, column=self.answer)
        lines = [f"{letter}. {without_letter(text, letter)}" for letter, text in zip(letters, texts, strict=True)]
        prompt = render(self.template, {**row, "options": lines})
        return Example(id=id, prompt=prompt, answer=letters[right], choices=tuple(letters))


def position(answer: Any, labels: Sequence[str], *, column: str) -> int:
    """Where the right option stands, from 0."""
    place = labels.index(answer) if answer in labels else answer
    if not isinstance(place, int) or not 0 <= place < len(labels):
        raise UserMistake(
            f"column {column!r} holds {answer!r}; one of {labels} is due, or a position from 0 to {len(labels) - 1}; a split without "
            "answers cannot be used"
        )
    return place


def without_letter(option: str, letter: str) -> str:
    """The option's text without the letter that some datasets put before it.

    >>> without_letter("B)18", "B")
    '18'
    """
    return re.sub(rf"^{letter}\s*\)", "", option.strip()).strip()
