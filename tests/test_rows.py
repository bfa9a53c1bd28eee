"""Rows as people have them: read right, or one line that names the file, the line, the column and what is allowed."""

import json

import pytest
from datasets import load_dataset

from clbench.build import build
from clbench.config import StreamConfig
from clbench.config.composition import compose
from clbench.data.encoder import Encoder
from clbench.data.rows import DatasetSpec, load_rows
from clbench.examine.canaries import check_stream
from clbench.examine.knowledge import Knowledge
from clbench.models.tiny import Recipe, bpe_tokenizer
from clbench.stream import CutPrompts, build_stream, cut_prompts, said_of
from clbench.types import Unusable, UserMistake
from tasks.classification import Classification
from tasks.generation import Generation
from tasks.multiple_choice import MultipleChoice

SPEC = DatasetSpec(name="own", hub="nobody/own")
GOOD = [{"text": f"It is {word}.", "label": "yes", "choices": ["a", "b"], "answer": 1} for word in ("late", "dark")]
QUIZ = """task: quiz
dataset_path: nobody/own
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(folder, content: bytes):
    (folder / "own").mkdir(exist_ok=True)
    for split in ("train", "test"):
        (folder / "own" / f"{split}.jsonl").write_bytes(content)
    return str(folder)


def read(folder, content: bytes):
    return load_rows(SPEC, split="train", data_dir=write(folder, content))


def task(kind, folder, **own):
    common = {
        "name": "own",
        "dataset": SPEC,
        "data_dir": str(folder),
        "metric": "m",
        "metric_version": 1,
        "licence": "",
    }
    return kind(**common, max_train=None, max_test=None, **own)


def classes(folder):
    return task(Classification, folder, template="{text} So?", label="label", labels=["yes", "no"])


def letters(folder):
    return task(MultipleChoice, folder, template="{text}\n{options}", options="choices", answer="answer")


def texts(folder):
    return task(Generation, folder, template="{text}", answer="label")


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + lines(*GOOD),
        lines(*GOOD).replace(b"\n", b"\r\n"),
        lines(*GOOD).replace(b"\n", b"\n\n  \n"),
        lines(*GOOD).rstrip(b"\n"),
    ],
    ids=["byte order mark", "CRLF", "blank lines", "no last newline"],
)
def test_what_an_editor_leaves_in_a_file_changes_no_row(content, tmp_path):
    assert read(tmp_path, content) == GOOD


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    row = {"text": "one\u2028two\u0085three"}
    assert read(tmp_path, (json.dumps(row, ensure_ascii=False) + "\n").encode()) == [row]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (b'{"text": "a",\n', r"line 4, character 14: no JSON .*one whole object"),
        (b'[{"text": "a"}]\n', r"line 4: no object, but 'list of object'; a line must hold one object"),
        (b'"a"\n', r"line 4: no object, but 'text'"),
        ('{"text": "café"}\n'.encode("latin-1"), r"line 4: byte 0xe9 is not UTF-8; save it so"),
        (b'{"text": "bad \\ud800 end"}\n', r"line 4: column 'text' holds .* surrogate pair; allowed are"),
        (b'{"label": "yes", "text": NaN}\n', r"line 4: column 'text' holds NaN"),
        (b'{"answer": -Infinity}\n', r"line 4: column 'answer' holds NaN, Infinity"),
        (b'{"answer": 1e999}\n', r"line 4: column 'answer' holds NaN, Infinity"),
        (b'{"text": %s}\n' % (b"[" * 900 + b"]" * 900), r"line 4: lists or objects lie too deep"),
        (b'{"text": %s}\n' % (b"[" * 100_000 + b"]" * 100_000), r"line 4: lists or objects lie too deep"),
        (b'{"text": 3}\n', r"line 4: column 'text' has the type number, in line 1 it is text; one type"),
        (
            b'{"choices": [1, 2]}\n',
            r"line 4: column 'choices' has the type list of number, in line 1 it is list of text",
        ),
    ],
)
def test_a_line_that_is_no_row_is_named_with_file_line_and_column(bad, said, tmp_path):
    # The blank line counts as a line of the file.
    with pytest.raises(UserMistake, match=rf"own/train.jsonl, {said}") as mistake:
        read(tmp_path, lines(GOOD[0]) + b"\n" + lines(GOOD[1]) + bad)
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize(
    ("kind", "changed", "said"),
    [
        (classes, {"text": None}, "column 'text' is None; null and NaN are not allowed"),
        (classes, {"label": None}, "column 'label' is None"),
        (classes, {"label": "perhaps"}, r"column 'label' holds the label 'perhaps', which is none of \('yes', 'no'\)"),
        (texts, {"label": None}, "column 'label' is None"),
        (letters, {"text": None}, "column 'text' is None"),
        (letters, {"choices": None}, "column 'choices' is None"),
        (letters, {"choices": ["a", None]}, r"column 'choices' is \['a', None\]"),
        (letters, {"answer": 2}, r"column 'answer' holds 2; one of \['A', 'B'\] is due, or a position from 0 to 1"),
        (letters, {"answer": -1}, "column 'answer' holds -1"),
        (letters, {"choices": ["a"] * 27}, "column 'choices' holds 27 options; there are letters for 26"),
    ],
)
def test_a_row_that_makes_no_example_is_named_with_file_line_and_column(kind, changed, said, tmp_path):
    write(tmp_path, b"\n" + lines(*GOOD, GOOD[0] | changed))
    with pytest.raises(UserMistake, match=rf"own/train.jsonl, line 4: {said}.*\(task own\)"):
        kind(tmp_path).examples("train")


@pytest.mark.parametrize("kind", [classes, letters, texts])
def test_a_column_that_a_row_lacks_is_named(kind, tmp_path):
    write(tmp_path, lines(*GOOD, {"choices": ["a", "b"], "answer": 1, "label": "yes"}))
    with pytest.raises(UserMistake, match=r"line 3: column 'text' is missing .* the row has \["):
        kind(tmp_path).examples("train")


def test_choices_that_are_numbers_or_one_text_are_refused(tmp_path):
    for choices in ([3, 14], "ab"):
        write(tmp_path, lines({**GOOD[0], "choices": choices}))
        with pytest.raises(
            UserMistake, match=r"line 1: column 'choices' holds .*; a list of texts is due, numbers in quotes"
        ):
            letters(tmp_path).examples("test")


def test_an_answer_that_is_no_text_is_refused(tmp_path):
    write(tmp_path, lines({**GOOD[0], "label": {"text": "yes"}}))
    with pytest.raises(UserMistake, match=r"line 1: column 'label' holds {'text': 'yes'}; text or a number is due"):
        texts(tmp_path).examples("train")


def test_a_filter_on_a_column_that_a_row_lacks_names_the_row(tmp_path):
    write(tmp_path, lines(GOOD[0], {"text": "It is.", "label": "no"}))
    with pytest.raises(UserMistake, match="own/train.jsonl, line 2: column 'answer' is missing"):
        task(Generation, tmp_path, template="{text}", answer="label", where={"answer": 1}).examples("train")


def test_labels_without_quotes_are_said_to_need_them(tmp_path):
    with pytest.raises(UserMistake, match=r'labels of task .own. have True.*labels: \["yes", "no"\]'):
        task(Classification, tmp_path, template="{text}", label="label", labels=[True, False])


@pytest.fixture()
def quiz(tmp_path, monkeypatch):
    (tmp_path / "row_quizzes").mkdir()
    (tmp_path / "row_quizzes" / "__init__.py").touch()
    (tmp_path / "row_quizzes" / "quiz.yaml").write_text(QUIZ)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda *rows: Knowledge(
        name="quiz",
        tasks=["quiz"],
        include="row_quizzes:.",
        data_dir=write(tmp_path, lines(*rows)),
        folders={"nobody/own": "own"},
    )


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"text": None}, "column 'text' is missing or holds null"),
        ({"choices": None}, "column 'choices' is missing or holds null"),
        ({"choices": ["a", None]}, "column 'choices' is missing or holds null"),
        ({"answer": 2}, r"column 'answer' holds 2, which is no position from 0 to 1 and none of \['a', 'b'\]"),
        ({"answer": -1}, "column 'answer' holds -1"),
    ],
)
def test_a_row_that_a_probe_cannot_ask_is_named(changed, said, place, quiz):
    rows = list(GOOD)
    rows.insert(place, GOOD[0] | changed)
    with pytest.raises(UserMistake, match=rf"'quiz'.*own/test.jsonl, line {place + 1}: {said}"):
        quiz(*rows)


@pytest.mark.parametrize("column", ["text", "choices", "answer"])
def test_a_column_that_a_probe_asks_for_and_no_row_has_is_named(column, quiz):
    with pytest.raises(UserMistake, match=f"'quiz'.*own/test.jsonl, line 1: column '{column}' is missing"):
        quiz(*[{name: value for name, value in row.items() if name != column} for row in GOOD])


def test_a_probe_takes_no_text_for_a_position_and_no_number_for_a_choice(quiz):
    assert len(quiz(*[row | {"answer": "b"} for row in GOOD]).ledger_rows[0].chosen[0]) == 2
    with pytest.raises(UserMistake, match="line 1: column 'answer' holds '1', which is none of .* without quotes"):
        quiz(*[row | {"answer": "1"} for row in GOOD])
    with pytest.raises(UserMistake, match=r"line 1: column 'choices' holds \[3, 14\]; a list of texts is due"):
        quiz(*[row | {"choices": [3, 14]} for row in GOOD])


def test_a_column_that_a_probe_does_not_read_may_be_empty(quiz):
    for column in ("label", "Question"):  # the second is a word of the template, and no name in it
        assert len(quiz({**GOOD[0], column: None}, GOOD[1]).ledger_rows[0].chosen[0]) == 2


@pytest.mark.parametrize(
    ("config", "split", "said"),
    [
        (None, "nope", "Unknown split .nope.. Should be one of"),
        ("nope", "train", "BuilderConfig .nope. not found. Available"),
    ],
)
def test_a_configuration_or_split_that_the_hub_has_not_is_one_line(config, split, said, tmp_path, monkeypatch):
    write(tmp_path, lines(*GOOD))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    spec = DatasetSpec(name="own", hub=str(tmp_path / "own"), config=config)
    with pytest.raises(UserMistake, match=rf"could not be loaded from the hub \({said}") as mistake:
        load_rows(spec, split=split, data_dir=None)
    assert "\n" not in str(mistake.value)


def test_a_dataset_with_a_script_is_one_line(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "own.py").write_text("")
    with pytest.raises(RuntimeError):
        load_dataset(str(tmp_path / "own"))
    with pytest.raises(UserMistake, match=r"Dataset scripts are no longer supported.*conf/task"):
        load_rows(DatasetSpec(name="own", hub=str(tmp_path / "own")), split="train", data_dir=None)


@pytest.fixture(scope="module")
def encoder():
    """Of single bytes, so that a token is a character."""
    return Encoder(bpe_tokenizer(["ab"], 260), max_length=40)


def stream(folder, train, test, encoder, **config):
    """The stream of one task, whose rows have these answers."""
    (folder / "own").mkdir()
    for split, answers in (("train", train), ("test", test)):
        rows = [{"text": f"Number {i}", "label": answer} for i, answer in enumerate(answers)]
        (folder / "own" / f"{split}.jsonl").write_bytes(lines(*rows))
    return build_stream(
        StreamConfig(name="s", **config), order="default", tasks={"own": texts(folder)}, encoder=encoder
    )


def test_an_answer_that_does_not_fit_is_refused_before_a_model_is_loaded(tmp_path, encoder):
    # A space before the answer, BOS and EOS: 37 characters fit 40 tokens, 38 do not.
    with pytest.raises(
        UserMistake, match=r"own/train.jsonl, line 2: an answer has 39 tokens.*train.max_length=40.*too_long=drop"
    ):
        stream(tmp_path, ["a" * 37, "a" * 38], ["a"], encoder)


def test_an_answer_that_does_not_fit_is_dropped_and_counted_on_request(tmp_path, encoder):
    made = stream(tmp_path, ["a" * 37, "a" * 38, "a", "b"], ["a" * 50], encoder, too_long="drop")
    (stage,) = made.stages
    assert sorted(len(example.answer) for example in stage.train) == [1, 1, 37]
    assert len(stage.test) == 1  # a test answer is compared, not read
    why = "the answer does not fit train.max_length"
    assert made.unusable == (Unusable(task="own", split="train", why=why, count=1, of=4, dropped=True),)


def test_the_row_after_a_dropped_one_takes_its_place(tmp_path, encoder):
    made = stream(tmp_path, ["a" * 38] + ["a"] * 20, ["a"], encoder, too_long="drop", train_rows=20)
    assert len(made.stages[0].train) == 20


def test_a_choice_that_does_not_fit_counts_as_one_that_cannot_be_scored(tmp_path, encoder):
    write(tmp_path, b"\n" + lines(*GOOD))
    task_of = task(Classification, tmp_path, template="{text}", label="label", labels=["yes", "n" * 40])
    first = 2 + int(task_of.examples("test")[0].id.rpartition("/")[2])
    with pytest.raises(UserMistake, match=rf"own/test.jsonl, line {first}: an answer has 41 tokens.*\(task own\)"):
        build_stream(StreamConfig(name="s"), order="default", tasks={"own": task_of}, encoder=encoder)


def test_the_few_rows_whose_own_answer_their_metric_refuses_are_dropped_and_counted(tmp_path, encoder):
    # ROUGE-L knows letters and digits only: "**" scores 0 against itself, and so does an empty answer.
    made = stream(tmp_path, ["a b"] * 30 + ["**"], ["a c"] * 29 + [""], encoder)
    (stage,) = made.stages
    assert {example.answer for example in stage.train} == {"a b"} and {example.answer for example in stage.test} == {
        "a c"
    }
    why = "the task's own metric does not count the answer as right"
    assert made.unusable == (
        Unusable(task="own", split="train", why=why, count=1, of=31, dropped=True),
        Unusable(task="own", split="test", why=why, count=1, of=30, dropped=True),
    )
    assert [canary.passed for canary in check_stream(made, encoder) if canary.name == "reference"] == [True]


def test_many_such_rows_stay_and_fail_the_canary_wherever_they_stand(tmp_path, encoder):
    # 4 of 61 rows are more than 5 per cent; none is among the test rows, which the canary looks at.
    made = stream(tmp_path, ["a b"] * 27 + ["**"] * 4, ["a c"] * 30, encoder)
    assert len(made.stages[0].train) == 31 and [one.dropped for one in made.unusable] == [False]
    (canary,) = (canary for canary in check_stream(made, encoder) if canary.name == "reference")
    assert not canary.passed and canary.detail.endswith("of the train rows 4 of 31 do not")


def test_cut_prompts_are_counted_with_what_they_lose(tmp_path, encoder):
    # "Number 7" is BOS and 8 tokens; room is 40 less the answer, its space and EOS: 3 tokens for an answer of 35 characters.
    made = stream(tmp_path, ["a" * 35, "a b"], ["b", "a" * 50], encoder)
    cuts = cut_prompts(made, encoder)
    assert cuts == {"own": CutPrompts(of=3, share=1 / 3, median_tokens=6, median_length=9)}
    line = said_of(cuts["own"], "own", encoder)
    assert line.startswith(
        "33% of 3 prompts of own do not fit train.max_length=40 and lose 6 of 9 tokens (medians) at their beginning"
    )
    assert "train.cut=middle" in line
    (tmp_path / "short").mkdir()
    assert cut_prompts(stream(tmp_path / "short", ["a"], ["b"], encoder), encoder) == {}


def test_a_damaged_row_is_said_before_a_model_is_pretrained(tmp_path, monkeypatch):
    def pretrained(self, cache_dir):
        raise AssertionError("the model was asked for")

    monkeypatch.setattr(Recipe, "load_tokenizer", pretrained)
    write(tmp_path, lines({**GOOD[0], "text": None}))
    (tmp_path / "own").rename(tmp_path / "boolq")
    config = compose(
        [f"data_dir={tmp_path}", f"results_dir={tmp_path}", f"cache_dir={tmp_path}", "stream.tasks=[boolq]"]
    )
    with pytest.raises(UserMistake, match="boolq/train.jsonl, line 1: column"):
        build(config)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("train.max_length=100000", "the model has 256 positions"),
        ("method.lora.rank=1000", "method.lora.rank=1000 is more than"),
        ("method.lora.targets=[nonesuch]", "target 'nonesuch' is in no layer's name"),
    ],
)
def test_what_a_model_does_not_allow_is_said_before_it_is_pretrained(given, said, overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(Recipe, "make", lambda *_: pytest.fail("the model is pretrained"))
    with pytest.raises(UserMistake, match=said):
        build(compose([*overrides, f"cache_dir={tmp_path}", given]))
