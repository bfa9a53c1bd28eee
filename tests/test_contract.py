"""The data contract: hashes that change when data do, text found where it should not be, probes of what is trained on."""

import pytest

from clbench.data.rows import DatasetSpec
from clbench.protocols import Stage, Task
from clbench.record.overlaps import (
    Overlap,
    dataset_name,
    measured_texts,
    normalised,
    overlaps,
    stream_hash,
    trained_probes,
)
from clbench.types import Example, UserMistake

LONG = "the quick brown fox jumps over the lazy dog while seven wizards quietly boil blue soup"
OTHER = "a completely different sentence about ships harbours sails ropes anchors captains maps storms and cold northern islands"


class Plain(Task):
    """A task whose rows come from `dataset`."""

    metric = "accuracy"

    def __init__(self, name: str, dataset: DatasetSpec | None = None) -> None:
        self.name = name
        self.dataset = dataset

    def examples(self, split: str) -> list[Example]:
        return []

    def score(self, example: Example, answer: str) -> float:
        return float(example.answer == answer)


def rows(name: str, split: str, *texts: str) -> tuple[Example, ...]:
    return tuple(
        Example(id=f"{name}/{split}/{i}", prompt=text, answer=f"answer {len(text)}") for i, text in enumerate(texts)
    )


def stage(name: str, *, train: tuple[str, ...], test: tuple[str, ...], dataset: DatasetSpec | None = None) -> Stage:
    return Stage(
        index=1,
        name=name,
        task=Plain(name, dataset),
        train=rows(name, "train", *train),
        test=rows(name, "test", *test),
        collate=lambda examples: pytest.fail("not needed"),
        whole_stream=(),
    )


def test_duplicates_and_test_prompts_in_train_are_counted_whatever_their_punctuation():
    found, touching = overlaps([stage("a", train=("One, two!", "one two", "three"), test=("ONE TWO", "four"))], {})
    assert found == (Overlap(kind="test in train", where="test of a", also_in="train of a", count=1, of=2),), (
        "the answers of the two train rows differ, so they are no duplicates"
    )
    assert touching == {"a/train/0", "a/train/1"}


def test_a_repeated_row_is_a_duplicate():
    found, _ = overlaps([stage("a", train=("x y", "x y", "x y"), test=("z", "z"))], {})
    assert [(overlap.where, overlap.count, overlap.of) for overlap in found] == [
        ("train of a", 2, 3),
        ("test of a", 1, 2),
    ]


def test_thirteen_shared_words_between_tasks_or_with_a_probe_are_an_overlap_whatever_stands_around_them():
    one = stage("one", train=(f"Read this. {LONG} Answer:", "short"), test=("nothing",))
    two = stage("two", train=("unrelated",), test=(f"Passage: {LONG}?", OTHER))
    found, touching = overlaps([one, two], {"knowledge facts": [OTHER, f"{LONG} indeed", "short"]})
    assert {(o.kind, o.where, o.also_in, o.count, o.of) for o in found} == {
        ("test and train of two tasks", "test of two", "one", 1, 2),
        ("probe and train", "knowledge facts", "one", 2, 3),
    }
    assert touching == {"one/train/0", "one/train/1"}


def test_twelve_shared_words_are_not():
    twelve = " ".join(LONG.split()[:12])
    one = stage("one", train=(f"{twelve} zebra",), test=("nothing",))
    assert overlaps([one], {"probe": [f"{twelve} yak"]}) == ((), frozenset())


def test_a_template_that_all_rows_share_is_no_overlap():
    template = "please read the following passage with care and then answer the question that follows it in one word"
    one = stage("one", train=tuple(f"{template} {i}" for i in range(5)), test=("nothing",))
    two = stage("two", train=("unrelated",), test=tuple(f"{template} {i}" for i in "abcde"))
    found, _ = overlaps([one, two], {})
    assert found == ()


def test_the_stream_hash_changes_with_any_fingerprint_and_not_with_the_order_of_tasks():
    data = {"a": {"train_sha256": "1", "metric": "accuracy v1"}, "b": {"train_sha256": "2", "metric": "accuracy v1"}}
    assert stream_hash(data) == stream_hash(dict(reversed(data.items())))
    for changed in ("train_sha256", "metric"):
        assert stream_hash(data) != stream_hash(data | {"a": data["a"] | {changed: "other"}})


@pytest.mark.parametrize(
    ("hub", "config", "name", "found"),
    [
        ("google/boolq", None, "boolq", "boolq"),
        ("aps/super_glue", "boolq", "", "boolq"),
        ("allenai/ai2_arc", "ARC-Challenge", "arc", "arcchallenge"),
        ("cais/mmlu", "anatomy", "mmlu", "mmlu"),
        ("Muennighoff/natural-instructions", None, "superni_task002", "supernitask002"),
        ("winogrande", "winogrande_xl", "w", "winogrande"),
    ],
)
def test_a_dataset_is_known_by_its_name_not_its_owner(hub, config, name, found):
    assert dataset_name(DatasetSpec(name=name, hub=hub, config=config)) == found


def test_a_probe_of_a_trained_dataset_is_refused_unless_forced():
    trained = stage("reading", train=("x",), test=("y",), dataset=DatasetSpec(name="boolq", hub="google/boolq"))
    made_here = stage("world", train=("x",), test=("y",))
    probes = {"knowledge": [DatasetSpec(name="b", hub="aps/super_glue", config="boolq")]}
    with pytest.raises(UserMistake, match=r"knowledge aps/super_glue: reading.*probe.allow_overlap=true"):
        trained_probes([trained, made_here], probes, allow=False)
    assert trained_probes([trained, made_here], probes, allow=True) == ["knowledge aps/super_glue: reading"]
    assert trained_probes([made_here], probes, allow=False) == []
    cb = DatasetSpec(name="c", hub="aps/super_glue", config="cb")  # of one repository, before and behind
    for specs in ([cb, *probes["knowledge"]], [*probes["knowledge"], cb]):
        assert trained_probes([trained], {"knowledge": specs}, allow=True) == ["knowledge aps/super_glue: reading"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"Ships sail. {LONG} indeed", True),  # thirteen words in a row, wherever they stand
        (" ".join(LONG.split()[1:13]) + " zebra", False),
        (" ".join(LONG.split()[:5]), True),  # fewer, with which a probe's text begins
        (" ".join(LONG.split()[1:6]), False),
        ("= The Quick = ", True),
        ("the quickest", False),
        ("", False),
    ],
)
def test_text_that_a_method_trains_on_and_a_probe_measures_is_refused_unless_forced(text, found):
    documents = {"perplexity pages": [OTHER, f"The quick, {LONG.partition('quick ')[2]}"], "knowledge facts": ["x"]}
    texts = ["what no probe holds", text]
    if found:
        with pytest.raises(UserMistake, match=r"probe measures \(perplexity pages\); .*probe.allow_overlap=true"):
            measured_texts(texts, documents, allow=False)
    assert measured_texts(texts, documents, allow=True) == ["perplexity pages: the method's texts"] * found


def test_normalised_text_keeps_letters_of_every_language():
    assert normalised("Größe: 12 支持!") == "größe 12 支持"
