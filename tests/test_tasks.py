"""Tasks on real rows: prompts as documented, scores as worked out by hand or given by the library, complete yaml files."""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import os
from decimal import Decimal
from pathlib import Path
from string import Formatter

import pytest
import sacrebleu
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytest import approx
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import f1_score
from task_rows import CASES

import tasks.hub
from clbench.types import Example, UserMistake
from tasks.extraction import token_f1
from tasks.generation import Generation
from tasks.hub import HubTask, bucket, render
from tasks.maths import final_number
from tasks.multiple_choice import position

CONF = Path(__file__).parent.parent / "conf"
REAL = sorted(path.stem for path in (CONF / "task").glob("*.yaml") if "dataset" in OmegaConf.load(path))
OVERLAPPING = {"mbpp", "news_de_ntrex", "news_commentary_de"}
"""Scored by shared characters, which any two texts have some of."""


def load(name: str, data_dir: Path | str | None, **changes: object) -> HubTask:
    config = OmegaConf.create(
        {"data_dir": data_dir and str(data_dir), "task": OmegaConf.load(CONF / "task" / f"{name}.yaml")}
    )
    return instantiate(config.task, **changes)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    for name, case in CASES.items():
        for split in ("train", "test"):
            path = tmp_path / name / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in case.rows), encoding="utf-8")
    return tmp_path


def first(task: HubTask, split: str = "test") -> Example:
    return next(example for example in task.examples(split) if example.id == f"{task.name}/{split}/0")


def test_every_real_task_has_a_case():
    assert REAL == sorted(CASES)


@pytest.mark.parametrize("name", REAL)
def test_prompt_and_answer_are_exactly_as_documented(name, data_dir):
    case = CASES[name]
    for split in ("train", "test"):
        example = first(load(name, data_dir), split)
        assert (example.prompt, example.answer) == (case.prompt, case.answer)
        assert not example.choices or example.answer in example.choices


@pytest.mark.parametrize("name", REAL)
def test_reference_scores_one_wrong_scores_low_and_malformed_is_invalid(name, data_dir):
    task, case = load(name, data_dir), CASES[name]
    assert task.name == name
    for example in task.examples("test"):
        for right in (example.answer, *example.references):
            assert task.score(example, right) == approx(1)
            assert task.is_valid(example, right)
    example = first(task)
    assert task.score(example, case.wrong) == 0 or (name in OVERLAPPING and task.score(example, case.wrong) < 0.5)
    assert task.is_valid(example, case.wrong)
    assert not task.is_valid(example, case.malformed)
    assert task.score(example, "") == 0


@pytest.mark.parametrize("name", REAL)
def test_train_has_one_example_per_row_and_ids_name_the_row(name, data_dir):
    assert {example.id for example in load(name, data_dir).examples("train")} == {f"{name}/train/{i}" for i in range(3)}


@pytest.mark.parametrize("name", REAL)
def test_yaml_is_complete(name):
    config = OmegaConf.load(CONF / "task" / f"{name}.yaml")
    assert isinstance(config, DictConfig)
    assert config.name == config.dataset.name == name
    assert "/" in config.dataset.hub and config.dataset.revision and {"train", "test"} <= set(config.dataset.splits)
    assert config.dataset.splits.train != config.dataset.splits.test or config.hold_out
    assert config.licence and config.metric and config.metric_version >= 1
    assert not config.template[-1].isspace()
    package, _, version = config.metric_package.partition("==")
    assert package == "clbench" or importlib.metadata.version(package) == version


@pytest.mark.parametrize("path", sorted((CONF / "stream").glob("*.yaml")), ids=lambda path: path.stem)
def test_streams_name_known_tasks_once(path):
    stream = OmegaConf.load(path)
    assert len(set(stream.tasks)) == len(stream.tasks)
    assert {f"{name}.yaml" for name in stream.tasks} <= {file.name for file in (CONF / "task").iterdir()}


def test_banking77_labels_are_in_the_hubs_order():
    labels = list(OmegaConf.load(CONF / "task" / "banking77.yaml").labels)
    assert len(labels) == 77 and labels == sorted(labels, key=str.lower)


def test_e2e_test_groups_the_references_of_one_meaning(data_dir):
    task = load("e2e_nlg", data_dir)
    assert len(task.examples("test")) == 2
    assert first(task).references == ("There is a pub called The Oak.",)
    assert task.score(first(task), "There is a pub called The Oak") == 1


def test_rows_of_other_tasks_are_left_out(data_dir):
    stranger = {**CASES["superni_task002"].rows[0], "task_name": "task003_other"}
    with (data_dir / "superni_task002" / "test.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(stranger) + "\n")
    assert len(load("superni_task002", data_dir).examples("test")) == 3


def test_a_cap_takes_the_first_of_a_fixed_shuffle(data_dir):
    rows = [{"text": f"message {i}", "label": i % 77} for i in range(300)]
    (data_dir / "banking77" / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    everything = load("banking77", data_dir, max_train=None).examples("train")
    assert len(everything) == 300
    assert load("banking77", data_dir, max_train=40).examples("train") == everything[:40]
    assert load("banking77", data_dir, max_train=40, sample_seed=1).examples("train") != everything[:40]
    assert (
        len({example.answer for example in everything[:40]}) > 20
    )  # the file begins with 40 different labels in order
    assert [example.id for example in everything[:40]] != [f"banking77/train/{i}" for i in range(40)]


def test_one_split_on_the_hub_is_divided_by_prompt(monkeypatch):
    rows = [{"prompt": f"question {i % 200}", "answer": "1"} for i in range(400)]
    monkeypatch.setattr(tasks.hub, "load_rows", lambda spec, *, split, data_dir: rows)
    task = load("trace_numglue_ds", None)
    train, test = ({example.prompt for example in task.examples(split)} for split in ("train", "test"))
    assert len(train) + len(test) == 200 and not train & test
    assert 5 <= len(test) <= 40


def test_bucket_is_a_hash_of_the_names():
    assert bucket(0, "gsm8k", "train", 1) == bucket("0/gsm8k/train/1") != bucket(0, "gsm8k", "train", 2)


def test_a_missing_column_is_a_users_mistake_that_lists_the_columns():
    with pytest.raises(UserMistake, match="'text'"):
        render("{txt}", {"text": "x"})


def test_a_split_without_labels_is_refused(data_dir):
    (data_dir / "glue_mnli" / "test.jsonl").write_text(
        json.dumps({**CASES["glue_mnli"].rows[0], "label": -1}), encoding="utf-8"
    )
    with pytest.raises(UserMistake, match="glue_mnli/test/0: the label -1"):
        load("glue_mnli", data_dir).examples("test")


def test_options_may_be_numbered():
    assert position("2", ["1", "2", "3"], id="x") == 1
    with pytest.raises(UserMistake, match="split without answers"):
        position("", ["A", "B"], id="x")


@pytest.mark.parametrize(
    ("text", "marker", "number"),
    [
        ("so 3*4 = 12\n#### 12", "####", "12"),
        ("#### $1,234.50\nQuestion: and 7?", "####", "1234.50"),
        ("the answer is 12.", "####", "12"),
        ("10-3 = 7", "", "7"),
        ("it fell to -5%", "", "-5"),
        ("-$5", "", "-5"),
        ("1,2,3", "", "3"),
        (".5", "", "0.5"),
        ("####", "####", None),
        ("none", "", None),
    ],
)
def test_final_number(text, marker, number):
    assert final_number(text, marker) == (number and Decimal(number))


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("Old Tom", "old tom.", 1),
        ("Tom", "Old Tom", 2 / 3),
        ("the old old man", "old Tom", 0.4),
        ("", "Tom", 0),
        ("the", "a", 1),
    ],
)
def test_token_f1(answer, reference, value):
    assert token_f1(answer, reference) == approx(value)


def test_translation_agrees_with_sacrebleu(data_dir):
    task = load("news_de_ntrex", data_dir)
    examples = task.examples("test")
    answers = ["The council sat on Monday.", "It rained.", "Nobody at all came here."]
    right = [example.answer for example in examples]
    assert [task.score(e, a) for e, a in zip(examples, answers, strict=True)] == approx(
        [sacrebleu.sentence_chrf(a, [r]).score / 100 for a, r in zip(answers, right, strict=True)]
    )
    assert task.corpus_scores(examples, answers) == approx(
        {
            "corpus_bleu": sacrebleu.corpus_bleu(answers, [right]).score / 100,
            "corpus_chrf": sacrebleu.corpus_chrf(answers, [right]).score / 100,
        }
    )


def test_generation_agrees_with_rouge_score_and_multi_reference_sacrebleu(data_dir):
    task = load("e2e_nlg", data_dir)
    assert isinstance(task, Generation)
    examples = sorted(task.examples("test"), key=lambda example: example.id)
    answers = ["There is a nice pub called The Oak.", "Mira lies by the wide river."]
    oak = ["The Oak is a pub.", "There is a pub called The Oak."]
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    assert task.score(examples[0], answers[0]) == approx(
        max(rouge.score(r, answers[0])["rougeL"].fmeasure for r in oak)
    )
    references = [[oak[0], "Mira lies by the river."], [oak[1], None]]
    assert task.corpus_scores(examples, answers) == approx(
        {"corpus_bleu": sacrebleu.corpus_bleu(answers, references).score / 100}
    )


def test_macro_f1_agrees_with_scikit_learn(data_dir):
    task = load("pubmed_qa", data_dir)
    examples = sorted(task.examples("test"), key=lambda example: example.id)  # yes, no, maybe
    expected = f1_score(["yes", "no", "maybe"], ["yes", "no", "no"], average="macro")
    assert expected == approx((1 + 2 / 3 + 0) / 3)
    assert task.corpus_scores(examples, ["yes", " no", "no"]) == approx({"macro_f1": expected})


def test_edit_similarity_agrees_with_difflib(data_dir):
    task = load("mbpp", data_dir)
    answer = "def add2(y):\n\treturn 2 + y"
    assert task.score(first(task), answer + "  \r\n") == approx(
        difflib.SequenceMatcher(None, answer, first(task).answer, autojunk=False).ratio()
    )


def test_exact_match_ignores_articles_case_and_punctuation(data_dir):
    task = load("superni_task002", data_dir)
    examples = sorted(task.examples("test"), key=lambda example: example.id)
    assert task.corpus_scores(examples, ["the old tom", "Nets.", "Ida"]) == approx({"exact_match": 2 / 3})


@pytest.mark.skipif(
    "CLBENCH_DATA" not in os.environ, reason="set CLBENCH_DATA to a folder of <task>/<split>.jsonl with real rows"
)
@pytest.mark.parametrize("name", OmegaConf.load(CONF / "stream" / "seq16_local.yaml").tasks)
def test_real_rows(name, record_property):
    task = load(name, os.environ["CLBENCH_DATA"])
    train, test = task.examples("train"), task.examples("test")
    tail = list(Formatter().parse(task.template))[-1]
    ending = tail[0] if tail[1] is None else ""
    for example in (*train, *test):
        assert example.prompt.endswith(ending) and not example.prompt[-1].isspace()
        assert task.score(example, example.answer) == approx(1) and task.is_valid(example, example.answer)
        if example.choices:
            assert example.answer in example.choices
        elif len(example.answer.split()) >= 8:
            assert example.answer not in example.prompt
    prompts = {example.prompt for example in train}
    seen = sum(example.prompt in prompts for example in test)
    record_property("test_prompts_seen_in_train", seen)
    print(f"{name}: {len(train)} train, {len(test)} test, {seen} test prompts seen in train")
    assert seen <= 0.01 * len(test)
