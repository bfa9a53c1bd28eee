"""The embedded world: its rows, its text, and that no question can be answered from the training rows."""

import random
from collections import Counter

import pytest

from clbench.types import UserMistake
from tasks.world import Corpus, fact_rows, heldout_texts, world
from tasks.world_asks import FORMS
from tasks.world_skills import skill_statement
from tasks.world_task import WorldTask
from tasks.world_words import VOCABULARY


def task(skill, seed=0):
    return WorldTask(skill=skill, seed=seed)


def test_sixteen_forms_nine_closed_seven_generated():
    assert len(FORMS) == 16
    assert sum(bool(form.choices) for form in FORMS.values()) == 9


@pytest.mark.parametrize("skill", FORMS)
def test_no_test_question_is_trained_on(skill):
    trained = {example.prompt for example in task(skill).examples("train")}
    tested = [example.prompt for example in task(skill).examples("test")]
    assert len(set(tested)) == len(tested) == 40
    assert not trained & set(tested)


@pytest.mark.parametrize("skill", FORMS)
def test_every_word_has_a_token_and_prompts_are_short(skill):
    words = set(VOCABULARY)
    for split in ("train", "test"):
        for example in task(skill).examples(split):
            assert set(example.prompt.split()) | set(example.answer.split()) <= words
            assert len(example.prompt.split()) <= 20 and len(example.answer.split()) <= 5
            assert all(len(choice.split()) == 1 for choice in example.choices)


@pytest.mark.parametrize("skill", FORMS)
def test_the_right_answer_scores_one_a_wrong_one_zero_a_malformed_one_is_invalid(skill):
    asked = task(skill)
    example = asked.examples("test")[0]
    assert asked.score(example, f" {example.answer} ") == 1.0 and asked.is_valid(example, example.answer)
    assert asked.score(example, "the the the") == 0.0
    assert not asked.is_valid(example, "the the the the the the the") and not asked.is_valid(example, "")


@pytest.mark.parametrize("skill", [name for name, form in FORMS.items() if form.choices])
def test_no_closed_task_is_mostly_one_answer(skill):
    answers = Counter(example.answer for example in task(skill).examples("test"))
    assert all(example.answer in example.choices for example in task(skill).examples("test"))
    assert max(answers.values()) / 40 <= 0.7


@pytest.mark.parametrize("skill", ["zone", "place", "pet_choice", "home_choice", "food", "job"])
def test_people_asked_about_are_never_trained_on(skill):
    here = world(0)
    people = {
        split: {word for e in task(skill).examples(split) for word in e.prompt.split() if word in here.facts}
        for split in ("train", "test")
    }
    assert people["train"] and people["test"] and not people["train"] & people["test"]


def test_the_fact_probe_asks_about_people_outside_all_training_rows():
    here = world(0)
    probed = {row["question"].split()[0] for row in fact_rows(0)}
    assert probed <= set(here.people_of("untrained")) and len(fact_rows(0)) == 200
    for row in fact_rows(0):
        assert len(set(row["choices"])) == 4 and 0 <= row["answer"] < 4


def test_heldout_text_is_not_in_the_pretraining_text():
    read = set(Corpus(seed=0, lines=30000).texts())
    assert not read & set(heldout_texts(0)) and len(heldout_texts(0)) == 400


def test_statements_are_short_and_never_questions():
    rng = random.Random(0)
    for _ in range(2000):
        statement = skill_statement(world(0), rng)
        assert len(statement.split()) <= 14 and not {"?", ":"} & set(statement.split())


def test_worlds_differ_in_their_facts_and_share_their_words():
    first, second = world(0), world(1)
    assert first.facts != second.facts and set(first.people) == set(second.people)
    assert Corpus(seed=0, lines=10).vocabulary() == Corpus(seed=1, lines=10).vocabulary()


def test_an_unknown_skill_is_a_mistake():
    with pytest.raises(UserMistake, match="nonesuch"):
        task("nonesuch")
