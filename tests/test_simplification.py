"""SARI: equal to the implementation that Hugging Face's `evaluate` ships, and to sums done by hand."""

import json
from pathlib import Path

import pytest
from pytest import approx

from tasks.simplification import Simplification, ngrams, operations, sari, tokens

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sari.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["answer"][:20])
def test_sari_is_the_librarys_on_every_string(case):
    assert sari(case["source"], case["answer"], case["references"]) == approx(case["sari"], abs=1e-9)


def test_the_golden_cases_cover_german_empty_and_several_references():
    cases = GOLDEN["cases"]
    assert len(cases) >= 20
    assert any("ß" in case["source"] for case in cases) and any(not case["answer"] for case in cases)
    assert {1, 2, 3} <= {len(case["references"]) for case in cases}


def test_unigram_operations_worked_out_by_hand():
    # Source a b b c, answer a b d, references "a d" and "a b e"; source and answer count twice, once per reference.
    texts = [ngrams(text.split(), 1) for text in ("a b b c", "a b d", "a d", "a b e")]
    keep, delete, add = operations(*texts)
    # Kept: a 2, b 2. Wanted and in the source: a 2, b 1. Precision (2/2 + 1/2) / 2 = 3/4, recall (2 + 1) / (2 + 1) = 1.
    assert keep == approx(2 * 0.75 / 1.75)
    # Deleted: b 2, c 2; b is wanted once. (1/2 + 2/2) / 2.
    assert delete == approx(0.75)
    # Added: d. To be added: d, e. Precision 1, recall 1/2.
    assert add == approx(2 / 3)


def test_what_was_not_there_to_keep_delete_or_add_counts_as_done():
    texts = [ngrams(text.split(), 2) for text in ("a", "a", "a")]
    assert operations(*texts) == (1, 1, 1)


def test_tokens_are_lower_case_13a_and_an_empty_text_has_one():
    assert tokens("Es kostet 3,50 Franken.") == ["es", "kostet", "3,50", "franken", "."]
    assert tokens("") == [""]


def test_a_lone_reference_scores_one_unless_it_repeats_a_word_less_often_than_the_source():
    assert sari("the big dog", "the dog", ["the dog"]) == 1
    # Of the three deletions of "the" one is undone by the reference's "the": (2/3 + 1) / 2 for single words.
    assert sari("the the the the cat", "the", ["the"]) == approx((4 + (2 / 3 + 1) / 2 + 3 + 4) / 12)


def test_the_task_scores_against_its_source_column():
    row = {"prompt": "Vereinfache: Der Rat beschloss eine Abgabe", "answer": "Es wird teurer\n"}
    # Only `example` and `score` are looked at, which read neither rows nor caps.
    task = Simplification.__new__(Simplification)
    task.template, task.source, task.answer = "{prompt}\nEinfach:", "prompt", "answer"
    example = task.example(row, id="x")
    assert (example.prompt, example.answer, example.source) == (
        row["prompt"] + "\nEinfach:",
        "Es wird teurer",
        row["prompt"],
    )
    assert task.score(example, "Es regnet") == approx(sari(row["prompt"], "Es regnet", ["Es wird teurer"]))
    assert 0 < task.score(example, "") < 1
