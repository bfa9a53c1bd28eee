"""Tasks on real rows: prompts as documented, scores as worked out by hand or given by the library, complete yaml files."""

import difflib
import json
import os
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path
from string import Formatter

import pytest
import sacrebleu
import task_rows
import task_rows_published
import task_rows_trace
from datasets import ReadInstruction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytest import approx
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import f1_score

import tasks.hub
from clbench.types import Example, UserMistake
from tasks.extraction import token_f1
from tasks.generation import Generation
from tasks.hub import HubTask, bucket, render
from tasks.maths import final_number
from tasks.multiple_choice import position

CONF = Path(__file__).parent.parent / "conf"
CASES = {**task_rows.CASES, **task_rows_published.CASES, **task_rows_trace.CASES}
YAMLS = {path.stem: OmegaConf.load(path) for path in sorted((CONF / "task").glob("*.yaml"))}
REAL = sorted(name for name, config in YAMLS.items() if "dataset" in config)
OVERLAPPING = {"chrf", "edit_similarity", "indel_similarity", "sari"}
"""Metrics that score shared characters or words kept, which any two texts have some of."""


def load(name: str, data_dir: Path | str | None, **changes: object) -> HubTask:
    config = OmegaConf.create({"data_dir": data_dir and str(data_dir), "task": YAMLS[name]})
    return instantiate(config.task, **changes)


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_cases(folder: Path) -> Path:
    for name, case in CASES.items():
        for split in ("train", "test"):
            write(folder / YAMLS[name].dataset.name / f"{split}.jsonl", case.rows)
    return folder


@pytest.fixture(scope="session")
def rows_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of all cases, to be read only."""
    return write_cases(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """The rows of all cases, for one test that writes among them."""
    return write_cases(tmp_path)


def first(task: HubTask, split: str = "test") -> Example:
    return next(example for example in task.examples(split) if example.id == f"{task.name}/{split}/0")


def test_every_real_task_has_a_case():
    assert REAL == sorted(CASES)


@pytest.mark.parametrize("name", REAL)
def test_prompt_and_answer_are_exactly_as_documented(name, rows_dir):
    case = CASES[name]
    for split in ("train", "test"):
        example = first(load(name, rows_dir), split)
        assert (example.prompt, example.answer) == (case.prompt, case.answer)
        assert not example.choices or example.answer in example.choices


@pytest.mark.parametrize("name", REAL)
def test_reference_scores_one_wrong_scores_low_and_malformed_is_invalid(name, rows_dir):
    task, case = load(name, rows_dir), CASES[name]
    assert task.name == name
    for example in task.examples("test"):
        for right in (example.answer, *example.references):
            assert task.score(example, right) == approx(1)
            assert task.is_valid(example, right)
    example = first(task)
    assert task.score(example, case.wrong) == 0 or (
        task.metric in OVERLAPPING and task.score(example, case.wrong) < 0.5
    )
    assert task.is_valid(example, case.wrong)
    assert not task.is_valid(example, case.malformed)
    assert task.score(example, "") == 0 or task.metric == "sari"  # which pays for deleting


@pytest.mark.parametrize("name", REAL)
def test_train_has_one_example_per_row_and_ids_name_the_row(name, rows_dir):
    assert {example.id for example in load(name, rows_dir).examples("train")} == {f"{name}/train/{i}" for i in range(3)}


@pytest.mark.parametrize("name", REAL)
def test_yaml_is_complete(name):
    config = YAMLS[name]
    assert isinstance(config, DictConfig)
    assert config.name == name
    dataset = config.dataset
    assert dataset.name and "/" in dataset.hub and {"train", "test"} <= set(dataset.splits)
    # A commit, or one of the two that conf/task/README.md explains.
    assert re.fullmatch("[0-9a-f]{40}|main|refs/convert/parquet", dataset.revision)
    if dataset.revision == "refs/convert/parquet":  # which may vanish: its yaml says what to do then
        assert "python -m clbench.doctor hub" in (CONF / "task" / f"{name}.yaml").read_text()
    assert dataset.splits.train != dataset.splits.test or config.hold_out
    assert "data_files" not in dataset or set(dataset.splits.values()) <= set(dataset.data_files)
    for split in dataset.splits.values():
        ReadInstruction.from_spec(split)
    assert config.licence and config.metric and config.metric_version >= 1
    assert not config.template[-1].isspace()


def test_tasks_that_share_a_folder_share_the_address_and_the_rows():
    first_of: dict[str, str] = {}
    for name in REAL:
        other = first_of.setdefault(YAMLS[name].dataset.name, name)
        assert YAMLS[name].dataset == YAMLS[other].dataset, f"{name} and {other} read one folder under data_dir"
        assert CASES[name].rows == CASES[other].rows
    assert first_of["glue_sst2"] == "curlora3_sst2" and first_of["superni_task002"] == "superni15_task002"


def test_banking77_labels_are_in_the_hubs_order():
    labels = list(OmegaConf.load(CONF / "task" / "banking77.yaml").labels)
    assert len(labels) == 77 and labels == sorted(labels, key=str.lower)


def test_e2e_test_groups_the_references_of_one_meaning(rows_dir):
    task = load("e2e_nlg", rows_dir)
    assert len(task.examples("test")) == 2
    assert first(task).references == ("There is a pub called The Oak.",)
    assert task.score(first(task), "There is a pub called The Oak") == 1


def test_rows_of_other_tasks_are_left_out(data_dir):
    rows = CASES["superni_task002"].rows
    write(data_dir / "superni_task002" / "test.jsonl", [*rows, {**rows[0], "task_name": "task003_other"}])
    assert len(load("superni_task002", data_dir).examples("test")) == 3


def tweets(*codes: int) -> list[dict]:
    return [{"text": f"tweet {i}", "sentiment": code} for i, code in enumerate(codes)]


def test_a_balanced_test_has_every_label_as_often_as_the_rarest_and_train_stays_as_it_is(data_dir):
    codes = [0] * 30 + [4] * 12 + [2] * 20  # neutral tweets (2) have no label word and are left out
    for split in ("train", "test"):
        write(data_dir / "sentiment140" / f"{split}.jsonl", tweets(*codes))
    task = load("curlora3_sentiment140", data_dir)
    test = task.examples("test")
    assert Counter(example.answer for example in test) == {"negative": 12, "positive": 12}
    assert len({example.id for example in test}) == 24
    assert Counter(example.answer for example in task.examples("train")) == {"negative": 30, "positive": 12}
    for cap in (2, 8, 10):
        capped = load("curlora3_sentiment140", data_dir, max_test=cap).examples("test")
        assert capped == test[:cap]
        assert Counter(example.answer for example in capped) == {"negative": cap // 2, "positive": cap // 2}


def test_a_label_word_may_stand_for_several_codes(data_dir):
    write(data_dir / "curlora3_published_sentiment140" / "train.jsonl", tweets(0, 2, 4))
    examples = sorted(
        load("curlora3_published_sentiment140", data_dir).examples("train"), key=lambda example: example.id
    )
    assert [example.answer for example in examples] == ["negative", "negative", "positive"]
    assert {example.choices for example in examples} == {("negative", "positive")}


def test_a_code_that_is_not_listed_is_refused_even_if_it_could_be_a_position(data_dir):
    write(data_dir / "curlora3_published_sentiment140" / "train.jsonl", tweets(1))
    with pytest.raises(
        UserMistake, match=r"train.jsonl, line 1: column .sentiment. holds the label 1, which is none of \(0, 2, 4\)"
    ):
        load("curlora3_published_sentiment140", data_dir).examples("train")


def test_a_cap_takes_the_first_of_a_fixed_shuffle(data_dir):
    rows = [{"text": f"message {i}", "label": i % 77} for i in range(300)]
    write(data_dir / "banking77" / "train.jsonl", rows)
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
    write(data_dir / "glue_mnli" / "test.jsonl", [{**CASES["glue_mnli"].rows[0], "label": -1}])
    with pytest.raises(UserMistake, match="glue_mnli/test.jsonl, line 1: column .label. holds the label -1"):
        load("glue_mnli", data_dir).examples("test")


def test_options_may_be_numbered():
    assert position("2", ["1", "2", "3"], column="c") == 1
    with pytest.raises(UserMistake, match="split without answers"):
        position("", ["A", "B"], column="c")


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


def test_translation_agrees_with_sacrebleu(rows_dir):
    task = load("news_de_ntrex", rows_dir)
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


def test_generation_agrees_with_rouge_score_and_multi_reference_sacrebleu(rows_dir):
    task = load("e2e_nlg", rows_dir)
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


def test_macro_f1_agrees_with_scikit_learn(rows_dir):
    task = load("pubmed_qa", rows_dir)
    examples = sorted(task.examples("test"), key=lambda example: example.id)  # yes, no, maybe
    expected = f1_score(["yes", "no", "maybe"], ["yes", "no", "no"], average="macro")
    assert expected == approx((1 + 2 / 3 + 0) / 3)
    assert task.corpus_scores(examples, ["yes", " no", "no"]) == approx({"macro_f1": expected})


def test_edit_similarity_agrees_with_difflib(rows_dir):
    task = load("mbpp", rows_dir)
    answer = "def add2(y):\n\treturn 2 + y"
    assert task.score(first(task), answer + "  \r\n") == approx(
        difflib.SequenceMatcher(None, answer, first(task).answer, autojunk=False).ratio()
    )


def test_exact_match_ignores_articles_case_and_punctuation(rows_dir):
    task = load("superni_task002", rows_dir)
    examples = sorted(task.examples("test"), key=lambda example: example.id)
    assert task.corpus_scores(examples, ["the old tom", "Nets.", "Ida"]) == approx({"exact_match": 2 / 3})


FOLDERS = {YAMLS[name].dataset.name for name in OmegaConf.load(CONF / "stream" / "seq16_local.yaml").tasks}


@pytest.mark.skipif(
    "CLBENCH_DATA" not in os.environ, reason="set CLBENCH_DATA to a folder of <task>/<split>.jsonl with real rows"
)
@pytest.mark.parametrize("name", [name for name in REAL if YAMLS[name].dataset.name in FOLDERS])
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


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ("Er sagte: «नमस्ते» und ging.", True),
        ("12,5 %", True),
        ("यह एक वाक्य है।", False),
        ("Это the sentence предложение", False),
        (" ", False),
    ],
)
def test_a_translation_is_written_in_its_targets_script(answer, valid):
    task = load("news_commentary_de", None)
    example = Example(id="own/0", prompt="Satz", answer="A sentence.", source="Satz")
    assert task.is_valid(example, answer) is valid
