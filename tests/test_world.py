"""The embedded world: its rows, its text, and that no question can be answered from the training rows."""

import random
from collections import Counter

import pytest

from clbench.types import UserMistake
from tasks.world import (
    COMMON,
    FREQUENCIES,
    PHRASES,
    PROBED,
    Corpus,
    fact_rows,
    heldout_texts,
    pretraining_text,
    probed,
    world,
)
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


def test_the_fact_probe_asks_about_people_whom_no_task_asks_about():
    here = world(0)
    asked = [row for frequency in FREQUENCIES for row in fact_rows(0, frequency=frequency)]
    people = {row["question"].split()[0] for row in asked}
    assert people == set(here.people_of("probed")) and len(here.people) == 256
    assert not people & {*here.people_of("train"), *here.people_of("test")}
    assert len(asked) == len({row["question"] for row in asked}) == 126 * 4
    for row in asked:
        assert len(set(row["choices"])) == 4 and 0 <= row["answer"] < 4
        name, kind = row["question"].split()[0], next(kind for kind in PROBED if row["choices"][0] in here.values[kind])
        assert row["choices"][row["answer"]] == here.facts[name][kind]


@pytest.mark.parametrize("frequency", FREQUENCIES)
def test_always_the_same_place_is_worth_chance_in_the_fact_probe(frequency):
    places = Counter(row["answer"] for row in fact_rows(0, frequency=frequency))
    assert len(places) == 4 and len(set(places.values())) == 1


def test_the_pretraining_text_states_each_fact_as_often_as_its_frequency_says():
    here, text = world(0), Counter(pretraining_text(0, 70_000))

    def stated(name, kind):
        return sum(text[phrase.format(name=name, value=here.facts[name][kind])] for phrase in PHRASES[kind])

    for frequency in FREQUENCIES:
        people = probed(here, frequency)
        assert len(people) >= 25 and {stated(name, kind) for name in people for kind in PROBED} == {frequency}
        assert {stated(name, kind) for name in people for kind in PHRASES if kind not in PROBED} == {0}
    assert {stated(name, kind) for name in here.people_of("test") for kind in PHRASES} == {COMMON}


def test_heldout_text_is_not_in_the_pretraining_text():
    read = set(Corpus(seed=0, lines=70000).texts())
    assert not read & set(heldout_texts(0)) and len(heldout_texts(0)) == 400


def test_statements_are_short_and_never_questions():
    rng = random.Random(0)
    for _ in range(2000):
        statement = skill_statement(world(0), rng)
        words = set(statement.split())
        # Lists may hold any word, a mark as well.
        assert len(statement.split()) <= 14 and (not {"?", ":"} & words or {"backwards", "words"} & words)


def test_worlds_differ_in_their_facts_and_share_their_words():
    first, second = world(0), world(1)
    assert first.facts != second.facts and set(first.people) == set(second.people)
    assert Corpus(seed=0, lines=10).vocabulary() == Corpus(seed=1, lines=10).vocabulary()


def test_an_unknown_skill_is_a_mistake():
    with pytest.raises(UserMistake, match="nonesuch"):
        task("nonesuch")
