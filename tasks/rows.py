"""One's own rows: a .jsonl file, a prompt, and the column of the answer; what else there is to say is read off the rows.

_target_: tasks.rows.Rows
name: mine
rows: data/mine.jsonl                     # or a folder with train.jsonl and test.jsonl
prompt: "{text}\\nIs this about sports?"
answer: label
choices: ["no", "yes"]                    # or the column that lists a row's choices; none: free text
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from clbench.data.rows import DatasetSpec, numbered_rows
from clbench.types import Example, UserMistake
from tasks.generation import ROUGE
from tasks.hub import TEST_SHARE, ClosedTask, Row, accepted, as_text, bucket, lookup, render, right_answers, texts_at

SHORT = 5
"""Words of the longest answer up to which free text is right or wrong as it stands."""


@dataclass(kw_only=True)
class Rows(ClosedTask):
    """Rows of the file or folder `rows`: `prompt` with `{column}`s, the column `answer`, `choices` as words or as the column that lists them.

    `answer` holds one of the choices, its position from 0, or, in free text, the answer or a list of right ones. A single file is cut: one row
    in ten, by a hash of its number, is for test. Closed questions are scored by accuracy, free text of at most
    SHORT words by exact match, longer text by ROUGE-L, unless `metric` says otherwise.
    """

    rows: str
    prompt: str
    answer: str
    choices: Sequence[str] | str = ()
    name: str = ""
    metric: str = ""
    metric_version: int = 1
    licence: str = "own"
    dataset: DatasetSpec | None = None
    data_dir: str | None = None
    template: str = ""
    max_train: PositiveInt | None = None
    max_test: PositiveInt | None = None
    lines: Mapping[str, Mapping[int, tuple[str, Row]]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.name = self.name or Path(self.rows).stem
        self.dataset = DatasetSpec(name=self.name, hub=Path(self.rows).name)
        self.lines = {split: self._read(split) for split in ("train", "test")}
        kinds = ("accuracy",) if self.choices else ("exact_match", "rougeL")
        if not self.metric:
            self.metric = kinds[0] if self.choices or self._longest_answer() <= SHORT else kinds[-1]
        if self.metric not in kinds:
            raise UserMistake(
                f"task {self.name!r}: metric={self.metric!r} is unknown; choose one of {', '.join(kinds)}"
            )

    def _read(self, split: str) -> Mapping[int, tuple[str, Row]]:
        """The rows of a split by their number, each with its file and line."""
        path = Path(self.rows)
        if path.is_dir():
            path = path / f"{split}.jsonl"
        if not path.is_file():
            raise UserMistake(
                f"task {self.name!r}: rows={str(path)!r} is no file; name a .jsonl file, or a folder with train.jsonl and test.jsonl"
            )
        found = {number: (f"{path}, line {line}", row) for number, (line, row) in enumerate(numbered_rows(path))}
        if not Path(self.rows).is_dir():
            held = {n: bucket(self.sample_seed, self.name, "cut", n) % TEST_SHARE == 0 for n in found}
            found = {number: row for number, row in found.items() if held[number] == (split == "test")}
        if not found:
            raise UserMistake(
                f"task {self.name!r}: rows={self.rows!r} gives no row for {split}; give a folder with train.jsonl and test.jsonl"
            )
        return found

    def _longest_answer(self) -> int:
        """Words of the longest right answer of any row."""
        longest = 0
        for split, rows in self.lines.items():
            for number, (_, row) in rows.items():
                with self._located(number, split):
                    answers = right_answers(row, self.answer)
                longest = max(longest, *(len(answer.split()) for answer in answers))
        return longest

    def _rows(self, split: str) -> dict[int, Row]:
        return {number: row for number, (_, row) in self.lines[split].items()}

    def _origin(self, index: int, split: str) -> str:
        return self.lines[split][index][0]

    @property
    def answer_columns(self) -> tuple[str, ...]:
        return (self.answer,)

    def example(self, row: Row, *, id: str) -> Example:
        """The prompt with the row's columns, its answer, and its choices where there are any."""
        prompt = render(self.prompt, row)
        if not self.choices:
            first, *others = right_answers(row, self.answer)
            return Example(id=id, prompt=prompt, answer=first, references=tuple(others))
        choices = texts_at(row, self.choices) if isinstance(self.choices, str) else list(self.choices)
        return Example(id=id, prompt=prompt, answer=chosen(row, self.answer, choices), choices=tuple(choices))

    def score(self, example: Example, answer: str) -> float:
        """1 for a right answer and 0 for another; ROUGE-L of free text that is longer."""
        if self.metric == "rougeL":
            return max(ROUGE.score(reference, answer)["rougeL"].fmeasure for reference in accepted(example))
        return super().score(example, answer)

    def is_valid(self, example: Example, answer: str) -> bool:
        return super().is_valid(example, answer) if example.choices else bool(answer.strip())


def chosen(row: Row, column: str, choices: Sequence[str]) -> str:
    """The choice that a column names, by its words or by its position from 0."""
    given: Any = lookup(row, column)
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(choices):
        return choices[given]
    if as_text(given, column) in choices:
        return as_text(given, column)
    raise UserMistake(f"column {column!r} holds {given!r}; one of {list(choices)} is due, or its position from 0")
