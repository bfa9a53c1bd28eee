"""A dataset of the hub as a task: its rows in a fixed fair order, its prompt template, what the record says about it.

Each kind of answer has a class and a file of its own, which add how a row becomes an Example and how an answer is scored. Sampling recipe: rows
are put in the order of a hash of (seed, task, split, index), so that any first n of them are a fair sample that no random number library can
change; the cap of the split then takes the first n. Ids keep the index that the row has in its file.

>>> render("{q}\\n{options[text][1]}: {lines}", {"q": "Which?", "options": {"text": ["a", "b"]}, "lines": ["1", "2"]})
'Which?\\nb: 1\\n2'
"""

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from string import Formatter
from typing import Any

from pydantic import PositiveInt

from clbench.data.rows import DatasetSpec, load_rows, place
from clbench.protocols import Task
from clbench.types import Example, UserMistake

Row = Mapping[str, Any]
TEST_SHARE = 10
"""One row in this many is held out for test where the hub has a single split."""


@dataclass(kw_only=True)
class HubTask(Task):
    """What every task on real rows states in its yaml.

    `template` is filled with the row's columns, outer white space removed; `{column[key][0]}` reaches inside, a list is joined by newlines.
    `max_words` cuts a column to its first words. `where` keeps the rows whose columns have these values, or one of them where it lists several.
    `group_by` makes the test rows that share a column's value one example with several references. `balance_by` names the column of which the test
    has every value equally often. `hold_out` names the column by whose hash test rows are taken from a hub dataset that has one split; rows with
    the same value go to the same side. `max_new_tokens` bounds a written answer.
    """

    name: str
    dataset: DatasetSpec
    data_dir: str | None
    template: str
    metric: str
    metric_version: int
    licence: str
    max_train: PositiveInt | None
    max_test: PositiveInt | None
    sample_seed: int = 0
    max_new_tokens: PositiveInt | None = None
    max_words: Mapping[str, int] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)
    group_by: str | None = None
    balance_by: str | None = None
    hold_out: str | None = None

    @abstractmethod
    def example(self, row: Row, *, id: str) -> Example:
        """The example that one row makes."""

    @property
    @abstractmethod
    def answer_columns(self) -> tuple[str, ...]:
        """The columns (or paths like `translation[en]`) that hold the right answer and nothing that the prompt may show."""

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of `split`, capped, in the order of the sampling recipe."""
        rows = self._rows(split)
        return tuple(
            self._merged([(index, rows[index]) for index in members], split) for members in self._chosen(rows, split)
        )

    def origin(self, example: Example) -> str:
        *_, split, index = example.id.split("/")
        return self._origin(int(index), split)

    def _chosen(self, rows: Mapping[int, Row], split: str) -> list[list[int]]:
        """The indices of the rows of each example."""
        groups: dict[Any, list[int]] = {}
        by = self.group_by if split != "train" else None
        for index, row in rows.items():
            groups.setdefault(self._value(by, row, index, split) if by else index, []).append(index)
        chosen = sorted(groups.values(), key=lambda members: bucket(self.sample_seed, self.name, split, members[0]))
        if self.balance_by and split != "train":
            first = [members[0] for members in chosen]
            chosen = balanced(chosen, [self._value(self.balance_by, rows[index], index, split) for index in first])
        return chosen[: self.max_train if split == "train" else self.max_test]

    def answer_swaps(self, split: str, count: int) -> Sequence[tuple[Example, Example]]:
        """Pairs of examples of one row, the second with the answer columns of another row that answers otherwise."""
        rows = [stripped(row, self.max_words) for row in list(self._rows(split).values())[: 4 * count]]
        pairs = []
        for index, row in enumerate(rows[:count]):
            example = self.example(row, id=f"{self.name}/{split}/swap")
            swapped = (self._swapped(row, other) for other in (*rows[index + 1 :], *rows[:index]))
            other = next((made for made in swapped if made is not None and made.answer != example.answer), None)
            if other is not None:
                pairs.append((example, other))
        return tuple(pairs)

    def _swapped(self, row: Row, other: Row) -> Example | None:
        """The example of `row` with the answer of `other`; None where that is no answer to `row` (option E of four)."""
        for column in self.answer_columns:
            row = replaced(row, column, lookup(other, column))
        try:
            return self.example(row, id=f"{self.name}/swap")
        except UserMistake:
            return None

    def _rows(self, split: str) -> dict[int, Row]:
        """The rows that belong to `split`, by their index in the file."""
        rows: dict[int, Row] = dict(enumerate(load_rows(self.dataset, split=split, data_dir=self.data_dir)))
        for column, wanted in self.where.items():
            allowed = [wanted] if isinstance(wanted, (str, int, float)) else wanted
            rows = {i: row for i, row in rows.items() if self._value(column, row, i, split) in allowed}
        if self.hold_out and self.data_dir is None:
            column, is_test = self.hold_out, split == "test"
            held = {i: bucket(self._value(column, row, i, split)) % TEST_SHARE == 0 for i, row in rows.items()}
            rows = {i: row for i, row in rows.items() if held[i] == is_test}
        return rows

    def _merged(self, members: Sequence[tuple[int, Row]], split: str) -> Example:
        """One example of rows that ask the same; the answers of all but the first become references."""
        read = []
        for index, row in members:
            with self._located(index, split):
                read.append(self.example(stripped(row, self.max_words), id=f"{self.name}/{split}/{index}"))
        others = dict.fromkeys(example.answer for example in read[1:] if example.answer != read[0].answer)
        return replace(read[0], references=(*read[0].references, *others))

    def _value(self, column: str, row: Row, index: int, split: str) -> Any:
        """What decides which split, group or filter takes the row."""
        with self._located(index, split):
            return lookup(row, column)

    @contextmanager
    def _located(self, index: int, split: str) -> Iterator[None]:
        """What is wrong with row `index` of `split` is said with its file and line."""
        try:
            yield
        except UserMistake as mistake:
            raise UserMistake(f"{self._origin(index, split)}: {mistake} (task {self.name})") from mistake

    def _origin(self, index: int, split: str) -> str:
        return place(self.dataset, split=split, data_dir=self.data_dir, row=index)


@dataclass(kw_only=True)
class TextTask(HubTask):
    """A task whose answer is text: `answer` is its column, or one that lists every right answer, the first of which is trained on."""

    answer: str

    @property
    def answer_columns(self) -> tuple[str, ...]:
        return (self.answer,)

    def example(self, row: Row, *, id: str) -> Example:
        first, *others = right_answers(row, self.answer)
        return Example(id=id, prompt=render(self.template, row), answer=first, references=tuple(others))


class ClosedTask(HubTask):
    """A task whose answer is one of the example's choices: 1 for a right one, else 0."""

    def score(self, example: Example, answer: str) -> float:
        return float(answer.strip() in accepted(example))

    def is_valid(self, example: Example, answer: str) -> bool:
        return answer.strip() in example.choices


class _Joining(Formatter):
    """str.format, except that a list prints as its items on lines of their own, and that null and NaN are refused."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            value, first = super().get_field(field_name, args, kwargs)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserMistake(f"column {field_name!r} is missing ({error}); the row has {sorted(kwargs)}") from error
        items = value if isinstance(value, (list, tuple)) else [value]
        if any(item is None or item != item for item in items):
            raise UserMistake(f"column {field_name!r} is {value!r}; null and NaN are not allowed in what a task reads")
        return value, first

    def format_field(self, value: Any, format_spec: str) -> str:
        return "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else format(value, format_spec)


def render(template: str, row: Row) -> str:
    """`template` with the row's columns in place of its {fields}."""
    try:
        return _Joining().vformat(template, (), row)
    except UserMistake:
        raise
    except ValueError as error:
        raise UserMistake(
            f"the prompt {template!r} is not well formed ({error}); write {{column}}, and {{{{ for a brace"
        ) from error


def lookup(row: Row, path: str) -> Any:
    """The value at `path`, for instance `choices[text]`; raises UserMistake where there is none."""
    return _Joining().get_field(path, (), row)[0]


def text_at(row: Row, path: str) -> str:
    """The text, or the number, at `path`, without white space around it."""
    return as_text(lookup(row, path), path)


def as_text(value: Any, path: str) -> str:
    """A text or a number of a row as text; raises UserMistake for anything else."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserMistake(f"column {path!r} holds {value!r}; text or a number is due")
    return str(value).strip()


def texts_at(row: Row, path: str) -> list[str]:
    """The list of texts at `path`."""
    found = lookup(row, path)
    if not isinstance(found, (list, tuple)) or not all(isinstance(item, str) for item in found):
        raise UserMistake(f"column {path!r} holds {found!r}; a list of texts is due, numbers in quotes")
    return list(found)


def replaced(row: Row, path: str, value: Any) -> Row:
    """The row with `value` at `path`.

    >>> replaced({"translation": {"de": "ja", "en": "yes"}}, "translation[en]", "no")
    {'translation': {'de': 'ja', 'en': 'no'}}
    """
    column, _, inner = path.partition("[")
    if not inner:
        return {**row, column: value}
    return {**row, column: {**row[column], inner.rstrip("]"): value}}


def balanced(items: Sequence[Any], labels: Sequence[Any]) -> list[Any]:
    """As many items of each label as the rarest has, in turn, so that the first n are balanced to within one.

    >>> balanced(["a1", "a2", "b1", "a3", "b2"], "aabab")
    ['a1', 'b1', 'a2', 'b2']
    """
    turns: list[list[Any]] = []
    seen: Counter[Any] = Counter()
    for item, label in zip(items, labels, strict=True):
        if seen[label] == len(turns):
            turns.append([])
        turns[seen[label]].append(item)
        seen[label] += 1
    return [item for turn in turns if len(turn) == len(seen) for item in turn]


def right_answers(row: Row, path: str) -> list[str]:
    """The right answers at `path`, each once, without white space around them.

    >>> right_answers({"a": ["three ", "3", "3"]}, "a"), right_answers({"a": " yes"}, "a")
    (['three', '3'], ['yes'])
    """
    given = lookup(row, path)
    listed = given if isinstance(given, (list, tuple)) else [given]
    answers = list(dict.fromkeys(as_text(answer, path) for answer in listed))
    if not answers:
        raise UserMistake(f"column {path!r} lists no right answer; a split without answers cannot be used")
    return answers


def accepted(example: Example) -> tuple[str, ...]:
    """Every answer that counts as right: the one trained on and the further references."""
    return (example.answer, *example.references)


def stripped(row: Row, max_words: Mapping[str, int]) -> Row:
    """The row without white space around its texts, the columns of `max_words` cut to that many words."""
    texts = {column: value.strip() if isinstance(value, str) else value for column, value in row.items()}
    return texts | {column: first_words(text_at(texts, column), count) for column, count in max_words.items()}


def first_words(text: str, count: int) -> str:
    """The first `count` words of `text`.

    >>> first_words("one two three", 2)
    'one two'
    """
    words = text.split(maxsplit=count)
    return text if len(words) <= count else text[: len(text) - len(words[-1])].rstrip()


def bucket(*names: object) -> int:
    """A number in [0, 2**64) that depends on the names alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:8], "big")


def ragged(examples: Iterable[Example]) -> list[list[Any]]:
    """The references of `examples` as sacrebleu wants them: one list per place, None (which it does not declare) where an example has fewer."""
    return [list(answers) for answers in zip_longest(*map(accepted, examples))]
