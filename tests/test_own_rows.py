"""A task of one's own rows: what is read off them, and what is said of rows that do not fit."""

import json

import pytest

from clbench.types import UserMistake
from tasks.rows import Rows


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def task(path, **more):
    return Rows(rows=path, prompt="{text}\nAbout sports?", answer="label", **more)


@pytest.fixture
def labelled(tmp_path):
    return written(tmp_path / "mine.jsonl", [{"text": f"match {n}", "label": ("no", "yes")[n % 2]} for n in range(100)])


def test_one_file_is_cut_into_train_and_test_by_a_hash_of_the_row(labelled):
    made = task(labelled, choices=["no", "yes"])
    train, test = made.examples("train"), made.examples("test")
    assert (made.name, made.metric, len(train) + len(test)) == ("mine", "accuracy", 100)
    assert 3 <= len(test) <= 20 and not {row.prompt for row in train} & {row.prompt for row in test}
    first = next(row for row in train if row.prompt == "match 1\nAbout sports?")
    assert (first.answer, first.choices) == ("yes", ("no", "yes"))
    assert made.origin(first) == f"{labelled}, line 2"
    assert [row.id for row in task(labelled, choices=["no", "yes"]).examples("test")] == [row.id for row in test]
    assert made.score(first, " yes") == 1 and made.score(first, "no") == 0 and not made.is_valid(first, "maybe")


def test_a_folder_has_a_file_for_each_split_and_answers_may_be_positions(tmp_path):
    for split in ("train", "test"):
        written(tmp_path / f"{split}.jsonl", [{"text": split, "label": 1}])
    made = task(str(tmp_path), choices=["no", "yes"], name="two")
    assert [made.examples(split)[0].prompt.split()[0] for split in ("train", "test")] == ["train", "test"]
    assert made.examples("test")[0].answer == "yes"


def test_choices_may_be_a_column(tmp_path):
    rows = [
        {"text": "Which?", "options": ["red", "blue"], "label": "blue"},
        {"text": "W?", "options": ["a", "b", "c"], "label": "a"},
    ]
    for split in ("train", "test"):
        written(tmp_path / f"{split}.jsonl", rows)
    found = {row.choices: row.answer for row in task(str(tmp_path), choices="options").examples("test")}
    assert found == {("red", "blue"): "blue", ("a", "b", "c"): "a"}


@pytest.mark.parametrize(
    ("answer", "metric", "near"),
    [("Friday", "exact_match", 0.0), ("the home side won the last match of the year", "rougeL", 18 / 19)],
)
def test_free_text_is_right_or_wrong_if_short_and_compared_if_long(tmp_path, answer, metric, near):
    for split in ("train", "test"):
        written(tmp_path / f"{split}.jsonl", [{"text": "When?", "label": [answer, answer]}])
    made = task(str(tmp_path))
    (row,) = made.examples("test")
    assert (made.metric, row.answer, row.choices, made.score(row, answer)) == (metric, answer, (), 1.0)
    # Of ten words nine are written: precision 1, recall 9/10.
    assert made.score(row, " ".join(answer.split()[:-1])) == pytest.approx(near)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a", "label": "maybe"}, ("line 3", "'label' holds 'maybe'", "['no', 'yes']")),
        ({"text": "a", "label": 2}, ("line 3", "the type number, in line 1 it is text")),
        ({"text": None, "label": "yes"}, ("line 3", "'text' is None")),
        ({"label": "yes"}, ("line 3", "'text' is missing")),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_its_line(tmp_path, row, words):
    for split in ("train", "test"):
        written(tmp_path / f"{split}.jsonl", [{"text": "a", "label": "no"}, {"text": "b", "label": "yes"}, row])
    with pytest.raises(UserMistake) as told:
        task(str(tmp_path), choices=["no", "yes"]).examples("train")
    assert all(word in str(told.value) for word in words), told.value


def test_free_text_without_an_answer_is_named_with_its_line(tmp_path):
    for split in ("train", "test"):
        written(tmp_path / f"{split}.jsonl", [{"text": "a", "label": "b"}, {"text": "a", "label": None}])
    with pytest.raises(UserMistake, match=r"train.jsonl, line 2: column 'label' is None"):
        task(str(tmp_path))


@pytest.mark.parametrize("prompt", ["{text ?", "{text} }", "{text:d}", "{text!x}"])
def test_a_prompt_that_is_not_well_formed_is_named(labelled, prompt):
    with pytest.raises(UserMistake, match=r"the prompt '.*' is not well formed"):
        Rows(rows=labelled, prompt=prompt, answer="label", choices=["no", "yes"]).examples("train")


def test_a_prompt_that_asks_for_a_part_of_a_text_is_named(labelled):
    with pytest.raises(UserMistake, match=r"line \d+: column 'text.nonesuch' is missing"):
        Rows(rows=labelled, prompt="{text.nonesuch}", answer="label", choices=["no", "yes"]).examples("train")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserMistake, match=r"nowhere.jsonl' is no file"):
        task(str(tmp_path / "nowhere.jsonl"))
