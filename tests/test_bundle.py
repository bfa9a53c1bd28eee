"""An offline copy gives the very examples that its source gave."""

import json

import pytest

from clbench.bundle import gathered, main
from clbench.data import DatasetSpec, indexed_rows
from tasks.classification import Classification

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def task(name: str, data_dir: str | None, **changes: object) -> Classification:
    fields = {
        "name": name,
        "dataset": DatasetSpec(name="letters", hub="nobody/letters"),
        "data_dir": data_dir,
        "template": "{text}:",
        "label": "label",
        "labels": ["no", "yes"],
        "metric": "accuracy",
        "metric_package": "clbench",
        "metric_version": 1,
        "licence": "none",
        "max_train": 5,
        "max_test": 4,
    }
    return Classification(**(fields | changes))


@pytest.fixture
def rows(tmp_path):
    folder = tmp_path / "hub" / "letters"
    folder.mkdir(parents=True)
    for split, letters in (("train", LETTERS), ("test", LETTERS.upper())):
        text = "".join(json.dumps({"text": letter, "label": i % 3 // 2}) + "\n" for i, letter in enumerate(letters))
        (folder / f"{split}.jsonl").write_text(text)
    return str(tmp_path / "hub")


def write(found, out):
    for (name, split), members in found.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        indices = sorted(members)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(members[i]) + "\n" for i in indices))
        (folder / f"{split}.index.json").write_text(json.dumps(indices))


def test_tasks_that_share_a_dataset_get_their_own_examples_from_its_copy(rows, tmp_path):
    tasks = [task("one", rows), task("two", rows, max_train=9), task("even", rows, balance_by="label", max_test=6)]
    write(gathered(tasks, []), tmp_path / "copy")
    kept = indexed_rows(tasks[0].dataset, split="train", data_dir=str(tmp_path / "copy"))
    assert 9 <= len(kept) < 26 and kept != dict(enumerate(kept.values()))
    for before in tasks:
        caps = {"max_train": before.max_train, "max_test": before.max_test, "balance_by": before.balance_by}
        after = task(before.name, str(tmp_path / "copy"), **caps)
        for split in ("train", "test"):
            assert after.examples(split) == before.examples(split)


def test_a_bundle_without_a_place_is_a_mistake(capsys):
    assert main(["stream=seq16"]) == 2
    assert "out=DIR" in capsys.readouterr().err


def test_a_bundle_of_the_embedded_world_holds_its_tokens_only(overrides, tmp_path, capsys):
    out = tmp_path / "bundle"
    assert main([*overrides, "stream.limit=2", f"out={out}"]) == 0
    assert [path.name for path in out.iterdir()] == ["tokens"] and len(list((out / "tokens").iterdir())) == 2
    assert f"data_dir={out}" in capsys.readouterr().out
