"""ScienceQA as TRACE poses it: the answer is a letter, a new line and the reasons; the letter is scored.

A row of ScienceQA without a picture:
    {"question": "Which is a solid?", "choices": ["air", "ice"], "answer": 1, "hint": "", "lecture": "A solid ...",
     "solution": "Ice is ..."}
"""

from dataclasses import dataclass
from itertools import takewhile
from string import ascii_uppercase
from typing import Literal

from clbench.types import Example, UserMistake
from tasks.hub import HubTask, Row, lookup, render, texts_at

LETTERS = ascii_uppercase[:5]
"""ScienceQA has up to five choices."""


@dataclass(kw_only=True)
class ScienceQA(HubTask):
    """In the template `{options}` stands for the lettered choices and `{hint}` for the hint under its heading, if there is one."""

    metric: Literal["accuracy"]

    @property
    def answer_columns(self) -> tuple[str, ...]:
        return ("answer", "lecture", "solution")

    def example(self, row: Row, *, id: str) -> Example:
        """The question; its letter with lecture and solution, which TRACE puts together without a space, as reasons."""
        choices, right = texts_at(row, "choices"), lookup(row, "answer")
        if not isinstance(right, int) or not 0 <= right < len(choices) <= len(LETTERS):
            raise UserMistake(
                f"column 'answer' holds {right!r}, which is none of {len(choices)} choices, of which there can be {len(LETTERS)}; "
                "a position from 0 is due"
            )
        options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        hint = f"Hint:\n{row['hint']}\n\n" if row.get("hint") else ""
        prompt = render(self.template, {**row, "options": options, "hint": hint})
        answer = f"{LETTERS[right]}\n{lookup(row, 'lecture')}{lookup(row, 'solution')}".strip()
        return Example(id=id, prompt=prompt, answer=answer)

    def score(self, example: Example, answer: str) -> float:
        """1 where the first character is the right letter, else 0, as TRACE does ("Because ..." counts as B)."""
        return float(answer.strip()[:1] == example.answer[0])

    def guesses(self, example: Example) -> tuple[str, ...]:
        """The letters of the choices, which stand last in the prompt."""
        options = example.prompt[example.prompt.rfind("\nA. ") :]
        return tuple(takewhile(lambda letter: f"\n{letter}. " in options, LETTERS))

    def is_valid(self, example: Example, answer: str) -> bool:
        """Whether the first line is a letter that a choice can have."""
        return answer.strip().split("\n")[0].strip() in tuple(LETTERS)
