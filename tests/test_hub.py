"""The check of what conf/ names on the hub, against folders that stand for repositories."""

import json

import pytest

from clbench import doctor
from clbench.data.rows import DatasetSpec
from clbench.hub import wanted, wrong
from tasks.hub import lookup


def test_a_dataset_is_right_or_its_lack_is_one_line(tmp_path):
    repository = tmp_path / "quiz"
    repository.mkdir()
    for split in ("train", "test"):
        (repository / f"{split}.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    spec = DatasetSpec(name="quiz", hub=str(repository))
    assert wrong(spec, {"train[:5]+train[-5:]", "test"}) == ""
    assert wrong(spec, {"train", "dev"}) == "has no dev; it has test, train"
    other = wrong(DatasetSpec(name="quiz", hub=str(repository), config="french"), {"test"})
    assert "french" in other and "\n" not in other


def test_the_first_row_of_a_split_must_make_an_example(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "a"}) + "\n")
    spec = DatasetSpec(name="quiz", hub=str(tmp_path))
    assert wrong(spec, {"test"}, lambda row: lookup(row, "question")) == ""
    said = wrong(spec, {"test"}, lambda row: lookup(row, "text"))
    assert said.startswith("test: column 'text' is missing") and "question" in said


def test_a_file_may_be_named_by_a_pattern(monkeypatch):
    there = ["train/task073_train.jsonl", "test/task073_test.jsonl"]
    monkeypatch.setattr("clbench.hub.HfApi.list_repo_files", lambda *_, **__: there)
    files = {"train": "train/task073_*.jsonl", "test": "test/task511_*.jsonl"}
    said = wrong(DatasetSpec(name="quiz", hub="owner/quiz", data_files=files), set())
    assert (
        said
        == "has no test/task511_*.jsonl; it has test/task073_test.jsonl, train/task073_*.jsonl, train/task073_train.jsonl"
    )


def test_every_dataset_of_a_task_and_of_a_probe_is_looked_at():
    asked = {who: (spec.hub, spec.config, splits) for who, spec, splits, _ in wanted()}
    assert asked["boolq"][0] == "google/boolq" and asked["probe: text, texts=wikitext"][2] == {"test", "train"}
    assert asked["probe mini: hellaswag"] == ("Rowan/hellaswag", None, {"validation", "train"})
    assert asked["probe mini: mmlu_anatomy"] == ("cais/mmlu", "anatomy", {"test", "dev"})
    assert asked["probe full: gsm8k"][2] == {"test", "train"} and "probe world: world_facts_x4" not in asked


def test_without_a_network_it_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        doctor.main(["hub"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "the hub cannot be reached" in said
