"""BIG-bench rows with choices in words, as its JSON tasks are exported. Its rows of free text fit `exact` and `generation`.

A row of logical_deduction:
    {"inputs": "... there are three birds: ...", "targets": ["The owl is the leftmost."],
     "multiple_choice_targets": ["The owl is the leftmost.", ...], "multiple_choice_scores": [1, 0, 0]}
"""

from dataclasses import dataclass
from typing import Literal

from clbench.data.rows import kind_of
from clbench.types import Example, UserMistake
from tasks.hub import ClosedTask, Row, lookup, render, texts_at

CHOICES, SCORES, TARGETS = "multiple_choice_targets", "multiple_choice_scores", "targets"


@dataclass(kw_only=True)
class BigBenchChoice(ClosedTask):
    """The choices are the answers, in words. `{options}` in the template lists them as BIG-bench does, where `inputs` does not."""

    metric: Literal["accuracy"]

    @property
    def answer_columns(self) -> tuple[str, ...]:
        return (SCORES, TARGETS)

    def example(self, row: Row, *, id: str) -> Example:
        """The question, its choices and the one with the best score; equally good ones count as right, too."""
        choices = tuple(choice.strip() for choice in texts_at(row, CHOICES))
        scores = lookup(row, SCORES)
        if kind_of(scores) != "list of number" or len(scores) != len(choices) or max(scores) <= 0:
            raise UserMistake(
                f"column {SCORES!r} holds {scores!r}, which singles out none of {len(choices)} choices; not a closed task"
            )
        right = [choice for choice, score in zip(choices, scores, strict=True) if score == max(scores)]
        prompt = render(self.template, {**row, "options": [f"choice: {choice}" for choice in choices]})
        return Example(id=id, prompt=prompt, answer=right[0], choices=choices, references=tuple(right[1:]))
