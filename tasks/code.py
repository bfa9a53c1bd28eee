"""Programs compared as text. Nothing that a model wrote is run here.

A row of mbpp:
    {"text": "Write a function to ...", "code": "def f(x):\\r\\n  return x", "test_list": ["assert f(1) == 1", ...]}
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher

from clbench.types import Example
from tasks.hub import HubTask, Row, accepted, lookup, render


@dataclass(kw_only=True)
class Code(HubTask):
    """`answer` is the column with the program."""

    answer: str

    @property
    def answer_columns(self) -> tuple[str, ...]:
        """Where a row keeps its answer."""
        return (self.answer,)

    def example(self, row: Row, *, id: str) -> Example:
        """The assignment and a program that solves it."""
        return Example(id=id, prompt=render(self.template, row), answer=tidy(str(lookup(row, self.answer))))

    def score(self, example: Example, answer: str) -> float:
        """Edit similarity in [0, 1]: twice the characters in difflib's matching blocks over the characters of both."""
        given = tidy(answer)
        return max(SequenceMatcher(None, given, right, autojunk=False).ratio() for right in accepted(example))


def tidy(program: str) -> str:
    """The program with plain newlines, without white space at the ends of its lines, or of itself."""
    return "\n".join(line.rstrip() for line in program.strip().splitlines())
