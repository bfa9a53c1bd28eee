"""Short answers that are right or wrong as they stand.

A row of TRACE's NumGLUE-cm, and one of BIG-bench's object_counting, which lists every right answer:
    {"prompt": "Solve the following math problem. ... Answer:", "answer": "Friday"}
    {"inputs": "Q: I have a flute and two drums. ... A: ", "targets": ["three", "3"]}
"""

from __future__ import annotations

from dataclasses import dataclass

from clbench.types import Example, UserMistake
from tasks.hub import HubTask, Row, accepted, lookup, render


@dataclass(kw_only=True)
class ExactMatch(HubTask):
    """`answer` is the column with the right answer, or with a list of them, of which the first is trained on."""

    answer: str

    @property
    def answer_columns(self) -> tuple[str, ...]:
        """Where a row keeps its answer."""
        return (self.answer,)

    def example(self, row: Row, *, id: str) -> Example:
        """The question and its right answers."""
        first, *others = right_answers(lookup(row, self.answer), id=id)
        return Example(id=id, prompt=render(self.template, row), answer=first, references=tuple(others))

    def score(self, example: Example, answer: str) -> float:
        """1 for a right answer, character by character but for white space around it, else 0."""
        return float(answer.strip() in accepted(example))


def right_answers(given: str | list[str], *, id: str) -> list[str]:
    """The right answers, each once, without white space around them.

    >>> right_answers(["three ", "3", "3"], id="x")
    ['three', '3']
    """
    answers = list(dict.fromkeys(answer.strip() for answer in ([given] if isinstance(given, str) else given)))
    if not answers:
        raise UserMistake(f"{id}: the row lists no right answer; a split without answers cannot be used")
    return answers
