"""The kinds of task that TRACE and BIG-bench need, by hand-made rows and numbers worked out by hand."""

from difflib import SequenceMatcher
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pytest import approx
from rouge_score.rouge_scorer import RougeScorer
from task_rows_trace import CASES, closed, free

import tasks.hub
from clbench.examine.matrix import floors
from clbench.protocols import Stage
from clbench.types import UserMistake
from tasks.code import with_literals

CONF = Path(__file__).parent.parent / "conf"


def load(name, rows, monkeypatch, **changes):
    monkeypatch.setattr(tasks.hub, "load_rows", lambda spec, *, split, data_dir: rows)
    task = OmegaConf.load(CONF / "task" / f"{name}.yaml")
    return instantiate(OmegaConf.create({"data_dir": None, "task": task}).task, **changes)


def in_order(task, split="test"):
    return sorted(task.examples(split), key=lambda example: int(example.id.rpartition("/")[2]))


@pytest.mark.parametrize(
    ("line", "written_out"),
    [
        ("f ( <NUM_LIT> )", "f ( 0 )"),
        ("f ( <NUM_LIT:16> , '<CHAR_LIT:x>' )", "f ( 16 , 'x' )"),
        ("'<STR_LIT>' + '<STR_LIT:a>' + '<STR_LIT:a>'", "'' + 'a' + 'a'"),
        ("<STR_LIT:two\nlines>", "two\nlines"),
        ("<STR_LIT:<NUM_LIT>>", "0"),
        ("<EOL> <OTHER_LIT:x>", "<EOL> <OTHER_LIT:x>"),
    ],
)
def test_literals_are_written_out(line, written_out):
    assert with_literals(line) == written_out


def test_a_line_of_code_is_scored_by_insertions_and_deletions_after_literals_are_written_out(monkeypatch):
    task = load(
        "trace_py150",
        [{"prompt": "<s> x <EOL>", "answer": "abc "}, {"prompt": "<s>", "answer": "<NUM_LIT>"}],
        monkeypatch,
        hold_out=None,
    )
    plain, number = in_order(task)
    assert task.score(plain, "ab") == approx(1 - 1 / 5)  # one insertion over 3 + 2 characters
    assert task.score(plain, "axc") == approx(1 - 2 / 6)  # a deletion and an insertion
    assert task.score(number, "0") == task.score(number, "<NUM_LIT:0>") == 1
    assert task.score(plain, "") == 0


def test_a_line_of_code_is_scored_higher_than_by_traces_own_code_so_the_metric_has_another_name(monkeypatch):
    task = load("trace_py150", [{"prompt": "<s>", "answer": "abc12345"}], monkeypatch, hold_out=None)
    (example,) = task.examples("test")
    theirs = SequenceMatcher(None, "12-34-5abc", "abc12345").ratio()  # what fuzzywuzzy rounds, as TRACE installs it
    assert theirs == approx(2 * 3 / 18)  # the longest block in common, abc
    assert task.score(example, "12-34-5abc") == approx(2 * 5 / 18)  # the longest subsequence, 12345
    assert task.metric == "indel_similarity"


def test_a_summary_is_scored_over_all_words_with_stemming_so_the_metric_has_another_name_than_traces(monkeypatch):
    rows = [{"prompt": "A meeting.", "answer": "the cats sat the cats sat"}]
    task = load("trace_meetingbank", rows, monkeypatch, hold_out=None)
    (example,) = task.examples("test")
    # TRACE's counts different words as they stand: 1 and 2/3.
    assert task.score(example, "the cats sat") == approx(2 * 1 * 0.5 / (1 + 0.5))  # of all words of the reference half
    assert task.score(example, "the cat sat the cat sat") == 1  # cat is the stem of cats
    assert task.metric == "rougeL_stemmed"


def test_scienceqa_shows_a_hint_only_where_there_is_one(monkeypatch):
    first, second, third = in_order(load("trace_scienceqa", CASES["trace_scienceqa"].rows, monkeypatch))
    assert "Hint" not in first.prompt and "Hint" not in third.prompt
    assert second.prompt.endswith(
        "What can Ana test?\n\nHint:\nAna has a stove.\n\nChoices:\nA. heat\nB. taste\nC. price\n\nAnswer:"
    )
    assert (second.answer, third.answer) == ("A\nLook at the stove.", "A")


def test_floors_of_scienceqa_are_those_of_its_letters(monkeypatch):
    row = CASES["trace_scienceqa"].rows[1]
    counts = ((2, 0), (4, 1), (4, 1), (4, 3))  # choices, and which is right
    rows = [
        {
            **row,
            "question": f"Which?\nA. {i}",
            "choices": [f"thing {k}" for k in range(count)],
            "answer": right,
            "solution": f"By {i}.",
        }
        for i, (count, right) in enumerate(counts)
    ]
    task = load("trace_scienceqa", rows, monkeypatch)
    tests = task.examples("test")
    assert [task.guesses(example) for example in in_order(task)] == [tuple("AB"), *[tuple("ABCD")] * 3]
    found = floors(Stage(index=1, name="s", task=task, train=tests, test=tests, collate=None, whole_stream=tests))
    assert found["chance"] == approx((1 / 2 + 3 / 4) / 4)
    assert found["majority"] == 2 / 4  # always B, whatever the reasons


def test_scienceqa_scores_the_first_character_and_says_when_it_was_no_letter(monkeypatch):
    task = load("trace_scienceqa", CASES["trace_scienceqa"].rows, monkeypatch)
    example = in_order(task)[0]
    assert task.score(example, " B") == task.score(example, "B\nbecause") == task.score(example, "Because") == 1
    assert task.score(example, "A") == task.score(example, "b") == 0
    assert task.is_valid(example, "B\nbecause") and task.is_valid(example, "E")
    assert (
        not task.is_valid(example, "Because") and not task.is_valid(example, "F") and not task.is_valid(example, "AB")
    )


@pytest.mark.parametrize("answer", [3, -1])
def test_scienceqa_refuses_an_answer_that_is_no_choice(answer, monkeypatch):
    row = {**CASES["trace_scienceqa"].rows[1], "answer": answer}
    with pytest.raises(UserMistake, match="split .test., row 0: column .answer. holds .* none of 3 choices"):
        load("trace_scienceqa", [row], monkeypatch).examples("test")


def test_exact_match_takes_every_listed_answer_and_trains_on_the_first(monkeypatch):
    rows = free(("Q: How many?\nA: ", ["three ", "3", "3"]))
    task = load("bigbench_object_counting", rows, monkeypatch)
    (example,) = task.examples("test")
    assert (example.answer, example.references) == ("three", ("3",))
    assert [task.score(example, answer) for answer in ("three", " 3\n", "Three", "three.", "", "33")] == [
        1,
        1,
        0,
        0,
        0,
        0,
    ]


def test_a_row_without_a_right_answer_is_refused(monkeypatch):
    with pytest.raises(UserMistake, match="split .test., row 0: column .targets. lists no right answer"):
        load("bigbench_object_counting", free(("Q", [])), monkeypatch).examples("test")
    with pytest.raises(UserMistake, match=r"singles out none of 2 choices"):
        load(
            "bigbench_winowhy", [{**closed(("Q", ["a", "b"], 0))[0], "multiple_choice_scores": [0, 0]}], monkeypatch
        ).examples("test")


def test_equally_good_choices_are_both_right(monkeypatch):
    row = {**closed(("Q", ["a ", "b", "c"], 0))[0], "multiple_choice_scores": [1, 0, 1]}
    task = load("bigbench_winowhy", [row], monkeypatch)
    (example,) = task.examples("test")
    assert (example.answer, example.references, example.choices) == ("a", ("c",), ("a", "b", "c"))
    assert [task.score(example, choice) for choice in example.choices] == [1, 0, 1]


def test_free_text_agrees_with_rouge_score(monkeypatch):
    task = load(
        "bigbench_linguistics_puzzles", free(("Q", ["a tall crow sees a dog", "tall crows see dogs"])), monkeypatch
    )
    (example,) = task.examples("test")
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    values = [
        rouge.score(right, "tall crows saw dogs")["rougeL"].fmeasure for right in (example.answer, *example.references)
    ]
    assert task.score(example, "tall crows saw dogs") == approx(max(values)) == approx(0.75)


@pytest.mark.parametrize("name", list(CASES))
def test_another_rows_answer_changes_the_answer_and_never_the_prompt(name, monkeypatch):
    task = load(name, CASES[name].rows, monkeypatch, hold_out=None)
    pairs = task.answer_swaps("test", 3)
    assert pairs
    for example, other in pairs:
        assert other.prompt == example.prompt and other.answer != example.answer


@pytest.mark.parametrize("name", ["trace_numglue_cm", "trace_numglue_ds", "trace_fomc"])
def test_rows_that_the_mirror_repeats_are_tested_once_and_trained_on_as_often_as_they_come(name, monkeypatch):
    rows = [
        {"prompt": f"question {i % 100}", "answer": "A" if name == "trace_fomc" else str(i % 100)} for i in range(300)
    ]
    task = load(name, rows, monkeypatch)
    train, test = ([example.prompt for example in task.examples(split)] for split in ("train", "test"))
    assert len(test) == len(set(test)) > 1 and len(train) == 3 * len(set(train)) and not set(train) & set(test)
    assert len(set(train)) + len(test) == 100


def stream(name):
    return list(OmegaConf.load(CONF / "stream" / f"{name}.yaml").tasks)


def test_traces_orders_are_the_published_ones():
    short = {order: [name.removeprefix("trace_") for name in stream(f"trace_order{order}")] for order in (1, 2)}
    assert short[1] == [
        "c_stance",
        "fomc",
        "meetingbank",
        "py150",
        "scienceqa",
        "numglue_cm",
        "numglue_ds",
        "20minuten",
    ]
    assert short[2] == [
        "numglue_cm",
        "numglue_ds",
        "fomc",
        "20minuten",
        "c_stance",
        "py150",
        "meetingbank",
        "scienceqa",
    ]


def test_the_secura_like_stream_has_eight_closed_and_eight_free_tasks_and_says_that_it_is_an_inference():
    names = stream("secura_like_16")
    kinds = {name: OmegaConf.load(CONF / "task" / f"{name}.yaml")["_target_"] for name in names}
    closed_tasks = [name for name, kind in kinds.items() if kind.endswith(("BigBenchChoice", "MultipleChoice"))]
    assert len(names) == 16 and len(closed_tasks) == 8
    assert {"gsm8k", "cnn_dailymail", "news_commentary_de", "logiqa"} <= set(names)
    assert (
        (CONF / "stream" / "secura_like_16.yaml").read_text(encoding="utf-8").startswith("# INFERENCE, no reproduction")
    )
