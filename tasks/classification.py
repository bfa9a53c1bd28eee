"""Classification into a closed set of label words, which are the answers.

A row of boolq, with the labels [no, yes]:
    {"question": "is ...", "passage": "...", "answer": true}
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sklearn.metrics import f1_score

from clbench.types import Example, UserMistake
from tasks.hub import ClosedTask, Row, lookup, render


@dataclass(kw_only=True)
class Classification(ClosedTask):
    """`labels` are the words that the model writes.

    `label` is the column of the right one: its position in `labels`, or the word itself. Where the rows have other codes, `codes` lists
    the code of each label word; a word may then stand for several codes.
    """

    metric: Literal["accuracy"]
    labels: Sequence[str]
    label: str
    codes: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        if wrong := [label for label in self.labels if not isinstance(label, str)]:
            raise UserMistake(
                f"labels of task {self.name!r} have {wrong[0]!r}, as yaml reads yes, no, true, false and numbers without quotes; "
                f'put each label in quotes, labels: ["yes", "no"] (conf/task/{self.name}.yaml)'
            )

    @property
    def answer_columns(self) -> tuple[str, ...]:
        return (self.label,)

    def example(self, row: Row, *, id: str) -> Example:
        """The text to classify and its label word."""
        given, known = lookup(row, self.label), tuple(self.codes or self.labels)
        if given in known:
            place = known.index(given)
        elif not self.codes and isinstance(given, int) and 0 <= given < len(known):
            place = given
        else:
            raise UserMistake(
                f"column {self.label!r} holds the label {given!r}, which is none of {known}; a split without labels cannot be used"
            )
        choices = tuple(dict.fromkeys(self.labels))
        return Example(id=id, prompt=render(self.template, row), answer=self.labels[place], choices=choices)

    def corpus_scores(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
        """Macro-F1 in [0, 1]: the plain mean of F1 over the labels that occur among the right ones."""
        right = [example.answer for example in examples]
        given = [answer.strip() for answer in answers]
        labels = sorted(set(right))
        return {"macro_f1": float(f1_score(right, given, labels=labels, average="macro", zero_division=0.0))}
