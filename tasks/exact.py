"""Short answers that are right or wrong as they stand.

A row of TRACE's NumGLUE-cm, and one of BIG-bench's object_counting, which lists every right answer:
    {"prompt": "Solve the following math problem. ... Answer:", "answer": "Friday"}
    {"inputs": "Q: I have a flute and two drums. ... A: ", "targets": ["three", "3"]}
"""

from dataclasses import dataclass
from typing import Literal

from clbench.types import Example
from tasks.hub import TextTask, accepted


@dataclass(kw_only=True)
class ExactMatch(TextTask):
    """`answer` is the column with the right answer, or with a list of them."""

    metric: Literal["exact_match"]

    def score(self, example: Example, answer: str) -> float:
        """1 for a right answer, character by character but for white space around it, else 0."""
        return float(answer.strip() in accepted(example))
