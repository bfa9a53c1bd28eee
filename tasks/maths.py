"""Word problems whose answer is, or ends in, a number.

A row of gsm8k; "####" is the marker that the answer must carry:
    {"question": "...", "answer": "first step ...\\nsecond step ...\\n#### 42"}
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from clbench.types import Example
from tasks.hub import Row, TextTask, render, text_at

NUMBER = re.compile(r"(?<![\d.])-?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|\.\d+)")


@dataclass(kw_only=True)
class Maths(TextTask):
    """`answer` is the column with the solution; `marker` stands before its final number ("": nothing does)."""

    metric: Literal["exact_match"]
    marker: str = ""

    def example(self, row: Row, *, id: str) -> Example:
        """The problem and its solution; a solution that is only a number is written plainly (12.0 as 12)."""
        return Example(id=id, prompt=render(self.template, row), answer=plain(text_at(row, self.answer)))

    def score(self, example: Example, answer: str) -> float:
        given = final_number(answer, self.marker)
        return float(given is not None and given == final_number(example.answer, self.marker))

    def is_valid(self, example: Example, answer: str) -> bool:
        """Whether `answer` has a number where it belongs: after the marker, if the task has one."""
        return self.marker in answer and final_number(answer, self.marker) is not None


def final_number(text: str, marker: str) -> Decimal | None:
    """The number that `text` comes to: the first after the marker, on its line; with no marker in `text` the last.

    >>> final_number("3 boxes of 4 are 12.\\n#### $1,012.50", "####"), final_number("10-3 = 7 apples", "")
    (Decimal('1012.50'), Decimal('7'))
    """
    plain_text = text.replace("$", "").replace("%", "")
    if marker and marker in plain_text:
        found = NUMBER.findall(plain_text.split(marker)[1].strip().split("\n")[0])[:1]
    else:
        found = NUMBER.findall(plain_text)
    return Decimal(found[-1].replace(",", "")) if found else None


def plain(text: str) -> str:
    """A number without thousands separators and trailing zeros; any other text as it is.

    >>> plain("1,200.0"), plain("2 + 3.0")
    ('1200', '2 + 3.0')
    """
    if not NUMBER.fullmatch(text):
        return text
    number = Decimal(text.replace(",", ""))
    return format(number.normalize(), "f")
