"""Programs, and lines of programs, compared as text. Nothing that a model wrote is run here.

A row of mbpp, and one of TRACE's Py150, whose answer is the next line:
    {"text": "Write a function to ...", "code": "def f(x):\\r\\n  return x", "test_list": ["assert f(1) == 1", ...]}
    {"prompt": "<s> import re <EOL> PATTERN = '<STR_LIT>' <EOL>", "answer": "print ( '<STR_LIT:utf-8>' )"}
"""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from rapidfuzz import fuzz

from clbench.types import Example
from tasks.hub import Row, TextTask, accepted, render, text_at

EMPTY_LITERALS = {"<NUM_LIT>": "0", "<STR_LIT>": "", "<CHAR_LIT>": ""}
LITERAL = re.compile("(<(?:STR|NUM|CHAR)_LIT:(.*?)>)", re.DOTALL)


@dataclass(kw_only=True)
class Code(TextTask):
    """`answer` is the column with the program."""

    metric: Literal["edit_similarity"]

    def example(self, row: Row, *, id: str) -> Example:
        return Example(id=id, prompt=render(self.template, row), answer=tidy(text_at(row, self.answer)))

    def score(self, example: Example, answer: str) -> float:
        """Edit similarity in [0, 1]: twice the characters in difflib's matching blocks over the characters of both."""
        given = tidy(answer)
        return max(SequenceMatcher(None, given, right, autojunk=False).ratio() for right in accepted(example))


@dataclass(kw_only=True)
class CodeLine(TextTask):
    """`answer` is the column with the line that comes next, in the tokens of CodeXGLUE."""

    metric: Literal["indel_similarity"]

    def score(self, example: Example, answer: str) -> float:
        """Similarity in [0, 1], literals written out: 1 - insertions and deletions over the characters of both."""
        given = with_literals(answer)
        return max(fuzz.ratio(given, with_literals(right)) for right in accepted(example)) / 100


def tidy(program: str) -> str:
    """The program with plain newlines, without white space at the ends of its lines, or of itself."""
    return "\n".join(line.rstrip() for line in program.strip().splitlines())


def with_literals(line: str) -> str:
    """The line with its literals in place of their marks: none for an unnamed text or character, 0 for an unnamed number.

    >>> with_literals("print ( '<STR_LIT:utf-8>' , <NUM_LIT> , '<STR_LIT>' )")
    "print ( 'utf-8' , 0 , '' )"
    """
    for mark, literal in EMPTY_LITERALS.items():
        line = line.replace(mark, literal)
    for mark, literal in LITERAL.findall(line):
        line = line.replace(mark, literal)
    return line
