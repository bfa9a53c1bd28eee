"""Canaries: sound streams pass, and every canary is shown to bite by planting its fault in a tiny task of ours."""

import copy
import json
import os
import random
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from tokenizers import processors
from torch.nn.utils.rnn import pad_sequence

import baselines.secura
import clbench
import clbench.examine.canaries
from clbench.config import StreamConfig
from clbench.data.encoder import Encoded, Encoder, clip_left
from clbench.data.rows import DatasetSpec
from clbench.examine import matrix
from clbench.examine.canaries import ARCHITECTURE, check_stream, own_model
from clbench.examine.canaries.answers import chance, near_zero
from clbench.examine.canaries.own_model import bounds, check_model, chosen, said
from clbench.examine.copying import copies, named_last
from clbench.examine.lm import StudentLM
from clbench.examine.student import Student
from clbench.examine.together import TOLERANCES, reads_together, rounding
from clbench.experiment.examination import check_evaluation
from clbench.models import cur, folding, loss, pairs
from clbench.models.loss import answer_loss
from clbench.models.pretrained import without_dropout
from clbench.models.tiny import bpe_tokenizer, fresh_llama, word_tokenizer
from clbench.models.weights import trainable
from clbench.protocols import Stage, Stream, Task
from clbench.stream import build_stream
from clbench.types import Example
from tasks.classification import Classification
from tasks.world_asks import FORMS
from tasks.world_task import WorldTask
from tasks.world_words import VOCABULARY
from tests import test_architectures
from tests.test_architectures import QUICKLY_ADAPTED, adapted, method_settings, named, tiny
from tests.test_tokens import KINDS, tokenizer_like

CONF = Path(__file__).parent.parent / "conf"
LINES = ["question : how much are 3 and 4 ? answer : red green blue yes no 0 1 2 5 6 7 8 9 word thing of colour"] * 20
COLOURS = ("red", "green", "blue")
THINGS = ("stone", "leaf", "sky", "car", "hat", "bird", "door", "lamp")


@pytest.fixture(scope="module")
def encoder():
    return Encoder(bpe_tokenizer(LINES, 300), max_length=128)


def exact(example, answer):
    return float(answer == example.answer)


class Made(Task):
    """Forty questions whose answers are drawn apart from the questions; `ask` puts an answer into the prompt, if it likes."""

    metric = "accuracy"

    def __init__(self, ask, *, answers, choices=(), score=exact, valid=lambda answer: bool(answer.strip())):
        self.name = "made"
        self.ask, self.choices, self.scored, self.valid = ask, choices, score, valid
        self.answers = answers

    def examples(self, split):
        rng = random.Random(split)
        drawn = [(f"{rng.choice(THINGS)} {rng.choice(THINGS)} {i}", self.answers(rng)) for i in range(40)]
        return tuple(
            Example(id=f"made/{split}/{i}", prompt=self.ask(thing, answer), answer=answer, choices=self.choices)
            for i, (thing, answer) in enumerate(drawn)
        )

    def score(self, example, answer):
        return self.scored(example, answer)

    def is_valid(self, example, answer):
        return self.valid(answer)


def colours(ask=lambda thing, answer: f"colour of {thing} :", **changes):
    return Made(ask, answers=lambda rng: rng.choice(COLOURS), **{"choices": COLOURS, **changes})


def numbers(ask=lambda thing, answer: f"how much is {thing} ?", **changes):
    return Made(ask, answers=lambda rng: str(rng.randrange(100, 1000)), **changes)


def stream_of(*tasks, encoder, rows=40):
    config = StreamConfig(name="made", tasks=[task.name for task in tasks], train_rows=40, test_rows=rows)
    return build_stream(config, order="default", tasks={task.name: task for task in tasks}, encoder=encoder)


def failures(task, encoder, *, rows=40, seed=0):
    found = check_stream(stream_of(task, encoder=encoder, rows=rows), encoder, seed=seed)
    assert {canary.task for canary in found} == {task.name}
    return {canary.name for canary in found if not canary.passed}


def detail(task, encoder, name):
    (found,) = (c for c in check_stream(stream_of(task, encoder=encoder), encoder) if c.name == name)
    return found.detail


ALL = {"chance", "copier", "floors", "reference", "shuffled", "bos", "prompt"}


@pytest.mark.parametrize("task", [colours(), numbers()], ids=["closed", "generative"])
@pytest.mark.parametrize("seed", range(3))
def test_a_sound_task_passes_every_canary(task, seed, encoder):
    found = check_stream(stream_of(task, encoder=encoder), encoder, seed=seed)
    assert [canary for canary in found if not canary.passed] == []
    assert {canary.name for canary in found} == ALL  # no swap: it has no rows


class Letters(Made):
    """Answers are a letter and a reason of its own; the score looks at the letter: A mostly, but C first, and never A in training."""

    def __init__(self):
        super().__init__(
            lambda thing, answer: f"which letter is {thing} ?",
            answers=lambda rng: f"{rng.choice('AAAB')} since {rng.random()}",
            score=lambda example, answer: float(answer[:1] == example.answer[:1]),
        )

    def examples(self, split):
        first, *rest = super().examples(split)
        if split == "train":
            rest = [replace(example, answer=example.answer.replace("A", "B")) for example in rest]
        return (replace(first, answer=f"C{first.answer[1:]}"), *rest)

    def guesses(self, example):
        return "ABC"


def test_floors_that_miss_the_guesses_that_a_question_leaves_are_noticed(encoder, monkeypatch):
    assert "floors" not in failures(Letters(), encoder)
    monkeypatch.setattr(Letters, "guesses", Task.guesses)
    assert "floors" in failures(Letters(), encoder)


def test_floors_allow_a_commonest_word_that_scores_a_little_more(encoder):
    def overlap(example, answer):
        return len({*example.answer.split()} & {*answer.split()}) / 2

    the = Made(lambda thing, answer: f"name {thing} :", answers=lambda rng: f"the {rng.random()}", score=overlap)
    assert "floors" not in failures(the, encoder)


def test_floors_that_miss_what_copying_gives_are_noticed(encoder, monkeypatch):
    task = numbers(lambda thing, answer: f"{thing} and {answer if int(answer) % 2 else 7} ?")
    assert failures(task, encoder) == set()
    monkeypatch.setattr(matrix, "copied", lambda stage: 0.0)
    assert failures(task, encoder) == {"floors"}


@pytest.mark.parametrize("rows", [32, 6])
def test_every_task_of_the_embedded_world_passes(rows):
    encoder = Encoder(word_tokenizer(VOCABULARY), max_length=256)
    found = check_stream(
        stream_of(*(WorldTask(skill=skill, seed=0) for skill in FORMS), encoder=encoder, rows=rows), encoder
    )
    assert [canary for canary in found if not canary.passed] == []
    assert len(found) == 16 * len(ALL)


@pytest.mark.skipif(
    "CLBENCH_DATA" not in os.environ, reason="set CLBENCH_DATA to a folder of <task>/<split>.jsonl with real rows"
)
def test_every_task_of_the_real_rows_passes():
    names = OmegaConf.load(CONF / "stream" / "seq16_local.yaml").tasks
    configs = {name: OmegaConf.load(CONF / "task" / f"{name}.yaml") for name in names}
    both = OmegaConf.create({"data_dir": os.environ["CLBENCH_DATA"], "tasks": configs})
    tasks = [instantiate(both.tasks[name], _convert_="all") for name in names]
    texts = [f"{example.prompt} {example.answer}" for task in tasks for example in task.examples("train")[:20]]
    encoder = Encoder(bpe_tokenizer(texts, 4096), max_length=768)
    found = check_stream(stream_of(*tasks, encoder=encoder), encoder)
    assert [canary for canary in found if not canary.passed] == []
    assert len(found) == 16 * (len(ALL) + 1)  # each of them swaps


@pytest.mark.parametrize(
    "task",
    [
        colours(lambda thing, answer: f"colour of {thing} : {answer}"),
        colours(lambda thing, answer: f"the {answer} one , {thing} , is of colour :"),
        colours(lambda thing, answer: f"{thing} ( it is {answer} )\ncolour ( red , green or blue ) :"),
        numbers(lambda thing, answer: f"how much is {thing} ? {answer}"),
        numbers(lambda thing, answer: f"how much is {thing} ?\nsolution : {answer}\nanswer :"),
        numbers(lambda thing, answer: f"{answer} is how much {thing} ?"),
        numbers(lambda thing, answer: f"{thing} costs {answer} and {thing[::-1]} more , how much ?"),
        Made(
            lambda thing, answer: f"{thing}\nhint : {answer}\nA. one\nB. two\nC. three\nanswer :",
            answers=lambda rng: rng.choice("ABC"),
            choices=("A", "B", "C"),
        ),
    ],
    ids=["choice last", "choice within", "choice before a list", "last", "before a tail", "first", "within", "letter"],
)
def test_an_answer_in_the_prompt_is_found_by_the_copier_alone(task, encoder):
    assert failures(task, encoder) == {"copier"}


@pytest.mark.parametrize(
    "task",
    [
        # The choice named last is right 39 times in 40, and so is the commonest answer.
        Made(
            lambda thing, answer: f"{thing} , yes or no ?",
            answers=lambda rng: "no" if rng.random() < 0.97 else "yes",
            choices=("yes", "no"),
        ),
        # The answer is a word of the prompt, at no fixed place.
        Made(
            lambda thing, answer: f"find {' '.join(sorted([answer, *thing.split()[:2]]))} which is alive ?",
            answers=lambda rng: rng.choice(("cat", "dog", "ox", "zebra", "hen", "mole")),
        ),
        # Backwards: right now and then.
        Made(
            lambda thing, answer: f"reverse {' '.join(answer.split()[::-1])} :",
            answers=lambda rng: f"{rng.choice(THINGS)} {rng.choice(THINGS)}",
        ),
    ],
    ids=["nearly constant", "extraction", "reversal"],
)
def test_tasks_that_are_easy_or_quote_the_prompt_do_not_fall_to_the_copier(task, encoder):
    assert "copier" not in failures(task, encoder)


def test_few_questions_are_joined_by_training_questions(encoder):
    class Lucky(Made):
        """Only its test prompts hold the answer, as two prompts may by luck."""

        def examples(self, split):
            made = super().examples(split)
            return made if split == "train" else tuple(replace(e, prompt=f"{e.prompt} {e.answer}") for e in made)

    lucky = Lucky(lambda thing, answer: f"how much is {thing} ?", answers=lambda rng: str(rng.randrange(100, 1000)))
    told = numbers(lambda thing, answer: f"how much is {thing} ? {answer}")
    assert failures(lucky, encoder) == failures(told, encoder) == {"copier"}
    assert failures(lucky, encoder, rows=2) == set()
    assert failures(told, encoder, rows=2) == {"copier"}
    assert failures(numbers(), encoder, rows=1) == set()  # wrong answers are there to be scored, too


def test_readers_copy_from_the_ends_and_after_cues():
    examples = [
        Example(id=str(i), prompt=f"Is {a} or {b} taller? It is {a}.\nName:", answer=a)
        for i, (a, b) in enumerate([("Ida", "Bo"), ("Tom", "Al"), ("Old Bo", "Ida")])
    ]
    right = {name for name, answers in copies(examples) if answers == ["Ida", "Tom", "Old Bo"]}
    assert right == {
        "the words that stand 3 words before the end",  # '.', 'Name' and ':' are words
        "the words after the first 'Is'",
        "the words after the last 'Is'",
        "the words after the first 'is'",
        "the words after the last 'is'",
    }


def test_readers_look_behind_what_all_prompts_end_in():
    rows = [("car", "red", "is it"), ("hat", "blue", "so be it then"), ("sky", "blue", "yes")]
    examples = [
        Example(id=thing, prompt=f"{thing} {answer} {rest}\nred or blue ?", answer=answer, choices=("red", "blue"))
        for thing, answer, rest in rows
    ]
    right = [name for name, answers in copies(examples) if answers == ["red", "blue", "blue"]]
    assert right == ["the choices named last, the last 4 words aside,"]


def test_the_choice_named_last_is_a_whole_word_and_the_longer_of_two():
    assert named_last(("card", "lost card", "pin"), "pin? a lost card, cards, discard") == "lost card"
    assert named_last(("card", "pin"), "neither") == "card"


def test_an_answer_column_in_the_template_changes_with_the_answer(tmp_path, encoder):
    rows = [{"text": f"{thing} {i}", "label": random.Random(i).randrange(2)} for i, thing in enumerate(THINGS * 4)]
    for split in ("train", "test"):
        (tmp_path / "made").mkdir(exist_ok=True)
        (tmp_path / "made" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def task(template):
        return Classification(
            name="made",
            dataset=DatasetSpec(name="made", hub="nobody/made"),
            data_dir=str(tmp_path),
            template=template,
            metric="accuracy",
            metric_version=1,
            licence="",
            max_train=None,
            max_test=None,
            labels=("no", "yes"),
            label="label",
        )

    assert failures(task("{text} ?"), encoder) == set()
    assert "0 of 32 prompts change" in detail(task("{text} ?"), encoder, "swap")
    # The label's number stands in the prompt, its word does not: no copier sees it.
    assert failures(task("{text} [{label}] ?"), encoder) == {"swap"}
    assert "32 of 32 prompts change" in detail(task("{text} [{label}] ?"), encoder, "swap")


def test_a_score_that_gives_full_marks_to_anything_is_noticed(encoder):
    assert failures(colours(score=lambda example, answer: 1.0), encoder) == {"chance", "shuffled"}
    assert failures(numbers(score=lambda example, answer: 1.0), encoder) == {"shuffled"}


def test_a_score_that_gives_full_marks_to_what_it_cannot_read_is_noticed(encoder):
    task = numbers(score=lambda example, answer: float(answer == example.answer or not answer.isdigit()))
    assert failures(task, encoder) == {"chance", "copier"}  # whatever is copied is no number


def test_choices_whose_length_tells_the_right_one_are_noticed(encoder):
    """Sums of log-probabilities favour short choices, so even a random model finds them."""

    class Told(Made):
        def examples(self, split):
            rng = random.Random(split)
            made = []
            for i in range(40):
                choices = [f"the {thing} that nobody has ever seen before {i}" for thing in rng.sample(THINGS, 3)]
                choices.insert(rng.randrange(4), f"{i}")
                made.append(Example(id=str(i), prompt=f"which {i} ?", answer=f"{i}", choices=tuple(choices)))
            return tuple(made)

    assert "chance" in failures(Told(None, answers=None), encoder)


@pytest.mark.parametrize(
    "task",
    [
        colours(score=lambda example, answer: exact(example, answer) * 0.99),
        colours(valid=lambda answer: answer != "red"),
        numbers(valid=str.isalpha),
        Made(lambda thing, answer: f"colour of {thing} :", answers=lambda rng: rng.choice("abc"), choices=("a", "b")),
    ],
    ids=["below full", "choice refused", "form refused", "no choice"],
)
def test_a_right_answer_that_counts_as_wrong_is_noticed(task, encoder):
    assert "reference" in failures(task, encoder)


def test_a_task_on_which_nothing_is_wrong_is_noticed(encoder):
    assert failures(Made(lambda thing, answer: thing, answers=lambda rng: "so"), encoder) == {"shuffled"}


class Twice(Encoder):
    """Begins a prompt with two BOS, in training and in examination."""

    def prompt(self, prompt):
        return (self.tokenizer.bos_token_id, *super().prompt(prompt))


def test_a_second_bos_is_noticed(encoder):
    assert failures(colours(), Twice(encoder.tokenizer, max_length=128)) == {"bos"}


def test_one_token_may_begin_end_and_pad():
    tokenizer = bpe_tokenizer(LINES, 300)
    tokenizer.bos_token = tokenizer.pad_token = tokenizer.eos_token
    for task in (colours(), numbers()):
        assert failures(task, Encoder(tokenizer, max_length=128)) == set()


class Apart(Encoder):
    """Trains on a prompt without its last token."""

    def example(self, example):
        encoded = super().example(example)
        kept = encoded.answer_start - 1
        return Encoded(ids=encoded.ids[:kept] + encoded.ids[kept + 1 :], answer_start=kept)


@pytest.mark.parametrize("task", [colours(), numbers()], ids=["closed", "generative"])
def test_another_prompt_in_training_than_in_examination_is_noticed(task, encoder):
    assert failures(task, Apart(encoder.tokenizer, max_length=128)) == {"prompt"}


@pytest.mark.parametrize("task", [colours(), numbers()], ids=["closed", "generative"])
def test_a_prompt_that_examination_changes_is_noticed(task, encoder, monkeypatch):
    plain = clbench.examine.canaries.answers.examine
    monkeypatch.setattr(
        clbench.examine.canaries.answers,
        "examine" if task.choices == () else "choose",
        lambda student, asked: (
            plain(student, _instructed(asked))
            if task.choices == ()
            else clbench.examine.matrix.choose(student, [_worded(example) for example in asked])
        ),
    )
    assert failures(task, encoder) == {"prompt"}


def _worded(example):
    return Example(id=example.id, prompt=f"please : {example.prompt}", answer=example.answer, choices=example.choices)


def _instructed(stage):
    return Stage(**{**vars(stage), "test": tuple(_worded(example) for example in stage.test)})


def test_cut_prompts_are_counted_and_lost_ones_noticed(encoder):
    tokenizer = word_tokenizer([*COLOURS, *THINGS, "a"])
    task = colours(lambda thing, answer: f"a a a a {thing} a :")  # 9 words; 12 ids with BOS, answer and EOS
    assert failures(task, Encoder(tokenizer, max_length=9)) == set()
    assert ", 64 cut and 0 without a prompt" in detail(task, Encoder(tokenizer, max_length=9), "prompt")
    assert ", 0 cut and" in detail(task, Encoder(tokenizer, max_length=12), "prompt")
    assert failures(task, Encoder(tokenizer, max_length=3)) == {"prompt"}  # BOS, answer, EOS


def test_answers_too_long_to_train_on_are_left_out_of_what_is_encoded():
    tokenizer = word_tokenizer([*THINGS, "a"])
    task = Made(lambda thing, answer: f"{thing} :", answers=lambda rng: " ".join("a" * rng.randrange(1, 13)))
    encoder = Encoder(tokenizer, max_length=12)  # BOS, up to ten words of answer, EOS
    examples = [*task.examples("test")[:32], *task.examples("train")[:32]]
    too_long = sum(len(example.answer.split()) > 10 for example in examples)
    lost = sum(len(example.answer.split()) == 10 for example in examples)
    assert too_long > 0 and lost > 0
    found = {c.name: c for c in check_stream(_unencoded_stream(task), encoder)}
    assert f"{lost} without a prompt among them ({too_long} left out" in found["prompt"].detail
    assert found["bos"].passed and not found["prompt"].passed


def _unencoded_stream(task):
    return stream_of(task, encoder=Encoder(word_tokenizer([]), max_length=10**6))


def attend_everywhere(rows, padding, side):
    return pad_sequence(rows, True, padding or 1, side)


def pad_on_the_right(rows, padding, side):
    return pad_sequence(rows, True, padding, "right")


def gaps(model, encoder, *, folded=None, before=(), student=Student):
    """The names of what differs on four examples, each of a stage of its own."""
    model.eval()
    found = check_model(student(model, encoder), four(encoder), folded=folded or nullcontext(), before=before)
    assert all(gap.n for gap in found)
    return {gap.name for gap in found if gap.failed}


def four(encoder):
    (stage,) = stream_of(numbers(), encoder=encoder).stages
    return Stream(name="", order="", stages=tuple(replace(stage, train=(row,)) for row in stage.train[:4]))


@pytest.fixture(scope="module")
def own(encoder):
    architecture = ARCHITECTURE | {"max_position_embeddings": 300}
    return fresh_llama(encoder.tokenizer, architecture=architecture, seed=0).eval()


def test_a_sound_model_passes_at_every_bound(own, encoder):
    assert bounds(own, encoder) == ([encoder.max_length, 300], [])
    found = check_model(Student(own, encoder), stream_of(numbers(), encoder=encoder), folded=nullcontext())
    assert [gap.name for gap in found] == ["scoring", "writing", "training", "lm_eval"]
    assert not any(gap.failed for gap in found) and all(gap.n for gap in found)


@pytest.fixture
def rounded(encoder):
    """A model in bfloat16 whose weights are so large that rounding moves a log-likelihood by more than the least that is allowed."""
    architecture = ARCHITECTURE | {"max_position_embeddings": 300, "num_hidden_layers": 8}
    model = fresh_llama(encoder.tokenizer, architecture=architecture, seed=0).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(5 if "lm_head" in name else 10 if weight.dim() == 2 and "layers" in name else 1)
    return model.to(torch.bfloat16)


def test_in_bfloat16_what_rounding_does_to_the_model_is_allowed_and_no_more(rounded, own, encoder, monkeypatch):
    least, most = TOLERANCES[torch.bfloat16]
    assert rounding(own, encoder) == 1e-4 and rounding(copy.deepcopy(own).to(torch.bfloat16), encoder) == least
    assert least < rounding(rounded, encoder) < most
    assert reads_together(rounded, encoder) and gaps(rounded, encoder) == set()
    few = fresh_llama(encoder.tokenizer, architecture=ARCHITECTURE | {"max_position_embeddings": 8}, seed=0)
    assert rounding(few.to(torch.bfloat16), encoder) == least
    monkeypatch.setattr(
        "clbench.examine.student.mask_of", lambda model, sees_TS, positions_T: sees_TS.new_ones(1, 1, *sees_TS.shape)
    )
    assert not reads_together(rounded, encoder) and "scoring" in gaps(rounded, encoder)


def test_an_update_that_bfloat16_would_lose_is_examined(encoder):
    architecture = ARCHITECTURE | {"max_position_embeddings": 300}
    model = fresh_llama(encoder.tokenizer, architecture=architecture, seed=0).eval().to(torch.bfloat16)
    adapter = LoraConfig(r=2, target_modules=["v_proj", "o_proj"], init_lora_weights=False)
    model = get_peft_model(model, adapter).eval()
    requests = [((1, 2, 3), (4, 5))]
    (expected, _), *_ = Student(model, encoder).log_likelihoods(requests)
    with folding.folded(model):
        (found, _), *_ = Student(model, encoder).log_likelihoods(requests)
    with folding.merged_into(folding.foldable(model)):
        (lost, _), *_ = Student(model, encoder).log_likelihoods(requests)
    assert found == expected != lost


@pytest.mark.parametrize("name", named(*QUICKLY_ADAPTED))
def test_a_sound_model_of_every_kind_passes(name, encoder):
    dropout = {"gpt2": ("attn_pdrop", "embd_pdrop", "resid_pdrop"), "opt": ("dropout",)}
    model = kind(name, encoder, **dict.fromkeys(dropout.get(name, ()), 0.0))  # as in a run
    short = copy.copy(encoder)
    short.max_length = 64
    short.together = reads_together(model, short)
    assert gaps(model, short) == set()


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        ("gpt2", {"n_positions": 200}),
        ("rwkv", {"context_length": 200}),
        ("mpt", {"max_seq_len": 200}),
        ("mistral", {"sliding_window": 12, "max_position_embeddings": 200}),
        ("gpt_neo", {"window_size": 12, "max_position_embeddings": 200}),
        ("llama4_text", {"attention_chunk_size": 16, "max_position_embeddings": 200}),
        ("mamba2", {"chunk_size": 8, "max_position_embeddings": None}),
        ("falcon_h1", {"mamba_chunk_size": 8, "max_position_embeddings": 200}),
        ("phi3-longrope", {"original_max_position_embeddings": 16, "max_position_embeddings": 200}),
    ],
)
def test_every_bound_that_a_configuration_states_is_tried(name, stated, encoder):
    model = kind(name, encoder, **{"max_position_embeddings": None} | stated)
    assert bounds(model, encoder) == (sorted({*stated.values(), 128} - {None}), [])


def test_bounds_too_long_to_be_tried_are_named(encoder):
    model = kind("mistral", encoder, sliding_window=1024, max_position_embeddings=1025)
    assert bounds(model, encoder) == ([128, 1024], [1025])


def test_a_run_that_trains_on_longer_rows_than_the_canaries_read_is_told(encoder, caplog):
    model = kind("mistral", encoder, sliding_window=1200, max_position_embeddings=4096)
    longer = copy.copy(encoder)
    for longer.max_length, said_so in ((1024, []), (1536, ["rows at 1200, 1536 tokens are not tried"])):
        check_evaluation(SimpleNamespace(stream=four(longer), encoder=longer), model)
        assert [text.partition(": ")[2] for text in caplog.messages if "canaries read" in text] == said_so


@pytest.mark.parametrize("fault", [attend_everywhere, pad_on_the_right])
def test_padding_that_changes_what_is_written_is_noticed(fault, own, encoder, monkeypatch):
    monkeypatch.setattr(
        clbench.examine.student, "pad_sequence", lambda rows, first, padding, side: fault(rows, padding, side)
    )
    assert gaps(own, encoder) == {"writing"}
    assert not reads_together(own, encoder)


def test_a_score_that_depends_on_the_row_is_noticed(own, encoder, monkeypatch):
    plain = clbench.examine.student.scored

    def scored(logits, places, targets):
        picked, best = plain(logits, places, targets)
        return picked + 1e-3 * len(logits), best

    monkeypatch.setattr(clbench.examine.student, "scored", scored)
    assert gaps(own, encoder) == {"scoring", "lm_eval"}


def test_a_single_score_that_is_no_number_is_noticed(own, encoder):
    def scores(student, requests, **kwargs):
        *found, (_, is_greedy) = Student.log_likelihoods(student, requests, **kwargs)
        return [*found, (float("nan"), is_greedy)]

    class LastIsNan(Student):
        log_likelihoods = scores

    assert gaps(own, encoder, student=LastIsNan) == {"scoring", "lm_eval"}


def test_a_loss_that_drops_the_heads_last_step_is_noticed(own, encoder, monkeypatch):
    monkeypatch.setattr(own_model, "answer_loss", lambda model, batch: 1.01 * answer_loss(model, batch))
    assert gaps(own, encoder) == {"training"}


def test_a_loss_that_is_wrong_of_the_longest_rows_alone_is_noticed(own, encoder, monkeypatch):
    def loss(model, batch):
        return answer_loss(model, batch) * (1.01 if batch.input_ids.shape[1] >= encoder.max_length else 1)

    monkeypatch.setattr(own_model, "answer_loss", loss)
    assert gaps(own, encoder) == {"training"}


def test_answers_that_are_wrong_after_the_longest_prompts_alone_are_noticed(own, encoder):
    class Forgetful(Student):
        def write(self, prompts, **kwargs):
            kept = [prompt if len(prompt) < encoder.max_length - 2 else prompt[-20:] for prompt in prompts]
            return super().write(kept, **kwargs)

    assert gaps(own, encoder, student=Forgetful) == {"writing"}


def test_a_stream_of_one_task_is_compared_on_several_of_its_rows(encoder):
    stream = stream_of(numbers(), encoder=encoder)
    assert chosen(stream) == list(stream.stages[0].train[:6])
    assert chosen(four(encoder)) == [stage.train[0] for stage in four(encoder).stages]


def test_adapters_that_are_folded_into_other_weights_are_noticed(own, encoder):
    @contextmanager
    def folded_wrongly():
        head = own.get_output_embeddings().weight
        before = head.detach().clone()
        head.data[::2] += 0.1
        yield
        head.data.copy_(before)

    assert {"scoring"} <= gaps(own, encoder, folded=folded_wrongly())


# What was once silently wrong on some kind of model, each with its mend taken out: the run's own model shows it.


def kind(name, encoder, **changed):
    """A tiny model of a kind, for the tokens of `encoder`."""
    return tiny(name, vocab_size=len(encoder.tokenizer), **changed)


@pytest.mark.parametrize(("method", "target"), [("seq", "lm_head"), ("seq", "embed_tokens"), ("curlora", "lm_head")])
def test_folding_into_a_weight_that_two_layers_read_is_noticed(method, target, encoder, monkeypatch):
    model = adapted(kind("llama-tied", encoder), method, [target])
    assert gaps(model, encoder, folded=folding.folded(model)) == set()
    monkeypatch.setattr(folding, "shared_weights", lambda model: frozenset())
    assert "scoring" in gaps(model, encoder, folded=folding.folded(model))


def alone(encoder):
    """The encoder of a model that reads one sequence at a time."""
    apart = copy.copy(encoder)
    apart.together = False
    return apart


def merged(name, targets, model, encoder):
    """What is found of a method's model after it has merged what a stage has left in its adapters."""
    method = instantiate({key: value for key, value in method_settings(name).items() if key != "name"}, _convert_="all")
    (method.lora if "lora" in vars(method) else method).__dict__["targets"] = targets
    model = method.wrap(model).eval()
    torch.manual_seed(4)
    for tensor in trainable(model).values():
        tensor.detach().add_(torch.randn(tensor.shape) * 0.1)
    before = said(model, encoder, four(encoder))
    method.consolidate(model)
    view, *_ = method.views(model).values()
    with view:
        return gaps(model, encoder, folded=folding.folded(model), before=before)


@pytest.mark.parametrize("method", ["seq_merge", "olora", "secura"])
def test_merging_into_a_weight_that_two_layers_read_is_noticed(method, encoder, monkeypatch):
    for module in (pairs, baselines.secura):
        monkeypatch.setattr(module, "check_unshared", lambda model, names: None)
    assert merged(method, ["lm_head"], kind("llama", encoder), encoder) == set()
    assert "merging" in merged(method, ["lm_head"], kind("llama-tied", encoder), encoder)


@pytest.mark.parametrize("method", ["seq_merge", "olora", "merge_average", "secura", "curlora"])
def test_weights_kept_in_out_that_are_merged_untransposed_are_noticed(method, encoder, monkeypatch):
    assert merged(method, ["attn.c_proj"], kind("gpt2", encoder), encoder) == {"training"}  # its own dropout
    for module in (cur, pairs, baselines.secura.cur):
        monkeypatch.setattr(module, "oriented", lambda layer: layer.weight.detach())
    expected = "scoring" if method == "curlora" else "merging"
    assert expected in merged(method, ["attn.c_proj"], kind("gpt2", encoder), encoder)


@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic"])
def test_positions_that_the_longest_row_of_a_batch_scales_are_noticed(name, encoder, monkeypatch):
    assert gaps(kind(name, encoder), alone(encoder)) == set()
    monkeypatch.setattr(test_architectures, "prepared", lambda model: model.eval())
    monkeypatch.setattr(clbench.examine.student, "is_stretched", lambda model: False)
    assert "scoring" in gaps(kind(name, encoder), encoder)


class Batched(Student):
    """Writes in batches, whatever is known of the model."""

    def _write(self, prompts, **settings):
        self.encoder = copy.copy(self.encoder)
        self.encoder.together = True
        return super()._write(prompts, **settings)


@pytest.mark.parametrize("name", ["gpt_neo", "mpt"])
@pytest.mark.parametrize("fault", [attend_everywhere, pad_on_the_right])
def test_written_answers_that_depend_on_the_batch_are_noticed(fault, name, encoder, monkeypatch):
    model = kind(name, encoder, attention_dropout=0.0, embed_dropout=0.0, resid_dropout=0.0)
    assert gaps(model, alone(encoder), student=Batched) == set()
    monkeypatch.setattr(
        clbench.examine.student, "pad_sequence", lambda rows, first, padding, side: fault(rows, padding, side)
    )
    assert gaps(model, alone(encoder), student=Batched) == {"writing"}


def own_tokens(name):
    """An encoder with a tokenizer like that of a real model, and a model for it."""
    encoder = Encoder(tokenizer_like(name), max_length=128)
    architecture = ARCHITECTURE | {"max_position_embeddings": 300}
    return fresh_llama(encoder.tokenizer, architecture=architecture, seed=0).eval(), encoder


def test_a_space_of_the_tokenizers_own_before_an_answer_is_noticed(monkeypatch):
    model, encoder = own_tokens("llama")
    assert gaps(model, encoder) == set()
    monkeypatch.setattr(Encoder, "answer", lambda self, answer: tuple(self.text(f" {answer}")))
    assert {"scoring", "training"} <= gaps(model, Encoder(encoder.tokenizer, max_length=128))


def ending(tokenizer):
    """The tokenizer, now with EOS behind every text, as `add_eos_token` has it."""
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=special)
    return tokenizer


class Ended(Encoder):
    """Leaves the EOS that the tokenizer puts behind every text in the prompt, too."""

    def prompt(self, prompt):
        return self.own(prompt, special=True)


def test_an_eos_that_the_tokenizer_puts_behind_a_text_stands_behind_the_answer_alone():
    tokenizer = tokenizer_like("llama")
    bos, *words, eos = ending(tokenizer)("Does the dog bark? yes")["input_ids"]
    assert (bos, eos) == (1, 2)
    encoder, example = Encoder(tokenizer, max_length=128), Example(id="0", prompt="Does the dog bark?", answer="yes")
    prompt, answer = own_model.plain_request(encoder, example)
    assert (*prompt, *answer) == (bos, *words, eos) and answer == (*encoder.answer("yes"), eos)
    assert encoder.example(example).ids == (*prompt, *answer)


def test_an_eos_within_what_is_read_is_noticed():
    model, encoder = own_tokens("llama")
    ending(encoder.tokenizer)
    assert gaps(model, Encoder(encoder.tokenizer, max_length=128)) == set()
    assert failures(numbers(), Encoder(encoder.tokenizer, max_length=128)) == set()
    assert {"scoring", "training"} <= gaps(model, Ended(encoder.tokenizer, max_length=128))


class Begun(Encoder):
    """Puts BOS before every prompt."""

    def prompt(self, prompt):
        return (self.tokenizer.bos_token_id, *self.text(prompt))


@pytest.mark.parametrize("name", ["gpt2", "qwen", "bloom"])
def test_a_bos_that_the_tokenizer_does_not_add_is_noticed(name):
    model, encoder = own_tokens(name)
    assert gaps(model, encoder) == set()
    assert {"scoring", "training"} <= gaps(model, Begun(encoder.tokenizer, max_length=128))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_tokenizer_passes(name):
    assert gaps(*own_tokens(name)) == set()


def begun(lm, string, add_special_tokens=None):
    """BOS before every text."""
    return [lm.prefix_token_id, *lm.student.encoder.own(string, special=False)]


def twice_begun(lm, string, add_special_tokens=None):
    """What the tokenizer adds, also where the text begins with it."""
    return list(lm.student.encoder.own(string, special=True))


def plain_characters(lm, string, add_special_tokens=None):
    """A special token that a text spells is none."""
    return list(lm.student.encoder.prompt(string))


def cut_behind_bos(lm, texts, context, continuation):
    return clip_left(tuple(context), lm.max_length + 1 - len(continuation)), tuple(continuation)


def cut_by_one_more(lm, texts, context, continuation):
    return tuple(context[-(lm.max_length - len(continuation)) :]), tuple(continuation)


def cut_at_the_end(lm, texts, context, continuation):
    return tuple(context[: lm.max_length + 1 - len(continuation)]), tuple(continuation)


@pytest.mark.parametrize(
    ("verb", "fault", "names"),
    [
        ("tok_encode", begun, ("gpt2", "qwen", "bloom")),
        ("tok_encode", twice_begun, ("llama", "metaspace", "gemma")),
        ("tok_encode", plain_characters, KINDS),
        ("_pair", cut_behind_bos, ("llama", "metaspace", "gemma")),
        ("_pair", cut_by_one_more, KINDS),
        ("_pair", cut_at_the_end, KINDS),
    ],
)
def test_lm_evals_tasks_that_read_other_tokens_than_in_its_own_class_are_noticed(verb, fault, names, monkeypatch):
    monkeypatch.setattr(StudentLM, verb, fault)
    assert [gaps(*own_tokens(name)) for name in names] == [{"lm_eval"}] * len(names)


def test_an_end_among_several_that_is_written_over_is_noticed(own, encoder, monkeypatch):
    prompts = [encoder.prompt(stage.train[0].prompt) for stage in four(encoder).stages]
    first = {ids[0] for ids in Student(own, encoder).write(prompts, max_new_tokens=1) if ids}
    monkeypatch.setattr(own.generation_config, "eos_token_id", [encoder.tokenizer.eos_token_id, *first])
    assert gaps(own, encoder) == set()
    monkeypatch.setattr(clbench.examine.student, "eos_ids", lambda model: [])
    assert gaps(own, encoder) == {"writing"}


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_dropout_of_the_models_own_is_noticed(name, encoder):
    model = kind(name, encoder)
    assert gaps(model, alone(encoder)) == {"training"}  # 0.1 in its configuration
    sound = type(model)(without_dropout(copy.deepcopy(model.config)))
    assert gaps(sound, alone(encoder)) == set()
    lora = {**method_settings("seq")["lora"], "dropout": 0.5}
    assert gaps(adapted(sound, "seq", lora=lora), alone(encoder)) == set()  # a method's own is asked for


@pytest.mark.parametrize(("name", "scale"), [("granite", 3.0), ("cohere2", 1 / 0.3)])
def test_training_without_the_models_own_head_is_noticed(name, scale, encoder, monkeypatch):
    model, whole = kind(name, encoder), loss.read
    assert gaps(model, encoder) == set()

    def unscaled(model, packed):
        logits, hidden_states = whole(model, packed)
        return logits * scale, hidden_states

    monkeypatch.setattr(loss, "read", unscaled)
    assert gaps(model, encoder) == {"training"}


class Dictated(Student):
    """Finds likeliest, and writes, what it is told, example by example."""

    def __init__(self, encoder, answers):
        super().__init__(None, encoder)
        self.answers = answers

    def log_likelihoods(self, requests):
        told = [self.encoder.answer(answer) for answer in self.answers for _ in COLOURS]
        return [(float(asked == right), False) for (_, asked), right in zip(requests, told, strict=True)]

    def generate(self, prompts, *, max_new_tokens):
        return list(self.answers)


def stage_with(task, right, **changes):
    tests = tuple(
        Example(id=str(i), prompt=f"{i} ?", answer=answer, choices=task.choices) for i, answer in enumerate(right)
    )
    return Stage(
        index=1, name="made", task=task, train=tests, test=tests, collate=lambda examples: None, whole_stream=tests
    )


def test_chance_is_worked_out_from_the_answers_given(encoder):
    right = ["red"] * 8 + ["green"] * 8
    # Given: 12 red, 4 green; right: 8 and 8. (12 * 8 + 4 * 8) / 256 = 0.5; four times sqrt(0.25 / 16) = 0.5, and 1/16.
    passed, seen = chance(stage_with(colours(), right), Dictated(encoder, ["red"] * 12 + ["green"] * 4))
    assert passed and "accuracy 0.750, 0.500 expected" in seen and "0.562 off allowed" in seen
    # Right in all of 64, four times sqrt(0.25 / 64) = 0.25 and 1/64 allowed; so is wrong in all of them.
    right = ["red", "green"] * 32
    assert not chance(stage_with(colours(), right), Dictated(encoder, right))[0]
    assert not chance(stage_with(colours(), right), Dictated(encoder, ["green", "red"] * 32))[0]
    # One label for everything is no knowledge.
    assert chance(stage_with(colours(), right), Dictated(encoder, ["red"] * 64))[0]


def test_a_random_text_may_score_what_the_commonest_answer_scores(encoder):
    right = ["7", "7", "8", "9"]
    stage = stage_with(numbers(), right)
    passed, seen = near_zero(stage, Dictated(encoder, ["7"] * 4), [0.0, 0.2])
    assert passed and "0.500, at most 0.500 (others' answers 0.100, the commonest answer 0.500)" in seen
    assert not near_zero(stage, Dictated(encoder, ["7", "7", "8", "8"]), [0.0, 0.2])[0]
    assert near_zero(stage, Dictated(encoder, ["7", "7", "8", "8"]), [0.8])[0]


def test_random_numbers_elsewhere_are_left_alone_and_the_outcome_repeats(encoder):
    stream = stream_of(colours(), encoder=encoder)
    before = torch.get_rng_state()
    first = check_stream(stream, encoder)
    torch.rand(3)
    assert check_stream(stream, encoder) == first
    assert not torch.equal(torch.get_rng_state(), before)  # the three draws
    torch.set_rng_state(before)
    check_stream(stream, encoder)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_runs_device_is_not_used(encoder):
    elsewhere = Encoder(encoder.tokenizer, max_length=128, device="meta")
    assert failures(colours(), elsewhere) == set()
    assert elsewhere.device == torch.device("meta")
