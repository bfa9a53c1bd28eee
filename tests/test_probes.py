"""Probes: the same numbers as lm-eval's own model class, item by item; the matrix and perplexity against hand-worked cases."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clbench.data import Encoder
from clbench.probes.knowledge import Knowledge, StudentLM, run_task
from clbench.probes.matrix import choose, examine, floors, item_score
from clbench.probes.perplexity import Perplexity
from clbench.protocols import Task
from clbench.stream import Stream
from clbench.student import Student
from clbench.types import Example, Stage, UserMistake

SENTENCES = [
    "A man carries a ladder to the wall and climbs up to clean the gutter.",
    "Two children paint a fence while a dog sleeps in the shade of a tree.",
    "The cook peels potatoes, boils them and mashes them with butter and salt.",
    "A boat leaves the harbour in the morning and comes back full of fish.",
    "She opens the old book, reads a page aloud and laughs at the picture.",
]


@pytest.fixture(scope="module")
def student():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return Student(LlamaForCausalLM(config).eval(), Encoder(fast, max_length=200))


def write(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Invented rows in the shape of the hub's datasets."""
    root = tmp_path_factory.mktemp("data")
    halves = [sentence.split(" and ") for sentence in SENTENCES]
    hellaswag = [
        {
            "ind": i,
            "activity_label": "Work",
            "ctx_a": half[0],
            "ctx_b": "",
            "ctx": half[0],
            "endings": [half[-1] if k == i % 4 else halves[(i + k + 1) % 5][-1] + "!" * k for k in range(4)],
            "source_id": "",
            "split": "val",
            "split_type": "",
            "label": str(i % 4),
        }
        for i, half in enumerate(halves)
    ]
    write(root / "hellaswag", "validation", hellaswag)
    arc = [
        {
            "id": str(i),
            "question": f"What happens when {sentence[:30]}?",
            "choices": {"text": ["fish", "the old book", "butter and salt", "a tree"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[i % 4],
        }
        for i, sentence in enumerate(SENTENCES)
    ]
    write(root / "arc", "test", arc)
    write(
        root / "piqa",
        "validation",
        [{"goal": s[:20], "sol1": s[20:], "sol2": s[25:], "label": i % 2} for i, s in enumerate(SENTENCES)],
    )
    winogrande = [
        {
            "sentence": f"The dog saw the cat because _ {s[:12]}.",
            "option1": "the dog",
            "option2": "the cat",
            "answer": str(1 + i % 2),
        }
        for i, s in enumerate(SENTENCES)
    ]
    write(root / "winogrande", "validation", winogrande)
    return root


FOLDERS = {
    "Rowan/hellaswag": "hellaswag",
    "allenai/ai2_arc": "arc",
    "baber/piqa": "piqa",
    "winogrande": "winogrande",
    "allenai/winogrande": "winogrande",
}
TASKS = ["hellaswag", "arc_challenge", "piqa", "winogrande"]


@pytest.fixture(scope="module")
def knowledge(data_dir):
    return Knowledge(name="knowledge", tasks=TASKS, data_dir=str(data_dir), folders=FOLDERS)


def test_scores_equal_lm_evals_own_model_item_by_item(student, knowledge):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    ours = {name: run_task(task, StudentLM(student)) for name, task in knowledge.tasks.items()}
    reference = HFLM(
        pretrained=student.model,
        tokenizer=student.encoder.tokenizer,
        batch_size=3,
        max_length=200,
        device="cpu",
        add_bos_token=True,
    )
    samples = evaluate(reference, task_dict=dict(knowledge.tasks), bootstrap_iters=0, log_samples=True)["samples"]
    for name in TASKS:
        rows = sorted(samples[name], key=lambda sample: sample["doc_id"])
        metrics = [metric for metric in ("acc", "acc_norm") if metric in rows[0]]
        assert metrics
        for metric in metrics:
            assert ours[name][metric] == [row[metric] for row in rows], (name, metric)


def test_log_likelihoods_equal_lm_evals_own(student, knowledge):
    from lm_eval.models.huggingface import HFLM

    requests = [instance for task in knowledge.tasks.values() for instance in task.instances]
    reference = HFLM(
        pretrained=student.model,
        tokenizer=student.encoder.tokenizer,
        batch_size=4,
        max_length=200,
        device="cpu",
        add_bos_token=True,
    )
    theirs = reference.loglikelihood(requests, disable_tqdm=True)
    for (value, greedy), (expected, expected_greedy) in zip(
        StudentLM(student).loglikelihood(requests), theirs, strict=True
    ):
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


def test_requests_are_built_once_and_scored_again(student, knowledge):
    instances = {name: task.instances for name, task in knowledge.tasks.items()}
    first = [(s.task, s.metric, s.value) for s in knowledge.measure(student, STREAM, 1)]
    assert first == [(s.task, s.metric, s.value) for s in knowledge.measure(student, STREAM, 1)]
    assert all(task.instances is instances[name] for name, task in knowledge.tasks.items())


def test_chance_and_majority_stand_beside_accuracy_at_stage_zero(student, knowledge):
    found = {(s.task, s.metric): s.value for s in knowledge.measure(student, STREAM, 0)}
    assert found["hellaswag", "chance"] == 0.25 and found["piqa", "chance"] == 0.5
    assert found["hellaswag", "majority"] == pytest.approx(2 / 5)  # gold positions 0 1 2 3 0
    assert found["piqa", "majority"] == pytest.approx(3 / 5)  # 0 1 0 1 0
    assert ("piqa", "chance") not in {(s.task, s.metric) for s in knowledge.measure(student, STREAM, 1)}


def test_an_unknown_task_and_an_unmapped_dataset_are_mistakes(data_dir):
    with pytest.raises(UserMistake, match="nonesuch"):
        Knowledge(name="knowledge", tasks=["nonesuch"], data_dir=str(data_dir), folders=FOLDERS)
    with pytest.raises(UserMistake, match="probe.folders"):
        Knowledge(name="knowledge", tasks=["piqa"], data_dir=str(data_dir), folders={})


class Toy(Task):
    """Answers are single letters, or two words when it is open."""

    name, metric = "toy", "accuracy"

    def examples(self, split):
        return ()

    def score(self, example, answer):
        return float(answer == example.answer)


def closed(answers: str) -> tuple[Example, ...]:
    return tuple(
        Example(id=str(i), prompt=f"item {i} is", answer=answer, choices=("a", "b", "c"))
        for i, answer in enumerate(answers)
    )


def stage(tests):
    return Stage(
        index=1, name="toy", task=Toy(), train=tests, test=tests, collate=lambda examples: None, whole_stream=tests
    )


STREAM = Stream(name="toy", order="default", stages=(stage(closed("ab")),))


def test_the_likeliest_choice_is_the_best_of_plain_forwards(student):
    tests = closed("abca")
    likeliest, greedy = choose(student, tests)
    for example, answer, written in zip(tests, likeliest, greedy, strict=True):
        prompt = student.encoder.prompt(example.prompt)
        with torch.inference_mode():
            last = student.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        tokens = {choice: student.encoder.answer(choice) for choice in example.choices}
        value = {}
        for choice, ids in tokens.items():
            with torch.inference_mode():
                steps = student.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 :].log_softmax(-1)
            value[choice] = sum(float(steps[k, token]) for k, token in enumerate(ids))
        assert answer == max(example.choices, key=value.get)
        assert written is None or int(last.argmax()) == tokens[written][0]


def test_floors_are_chance_and_the_commonest_answer():
    assert floors(stage(closed("aabc"))) == {"chance": pytest.approx(1 / 3), "majority": pytest.approx(0.5)}


def test_an_item_score_has_the_standard_error_of_its_mean():
    score = item_score(1, "toy", "stream", "toy", "accuracy", [1.0, 0.0, 1.0, 1.0], seconds=0.5)
    assert score.value == 0.75 and score.n == 4
    assert score.stderr == pytest.approx(math.sqrt(((0.25**2) * 3 + 0.75**2) / 3 / 4))


def test_an_open_task_is_scored_on_what_greedy_decoding_writes(student):
    tests = (Example(id="0", prompt="A man carries", answer="a ladder"),)
    items, _ = examine(student, stage(tests))
    (answer,) = student.generate(
        [student.encoder.prompt("A man carries")], max_new_tokens=len(student.encoder.answer("a ladder")) + 1
    )
    assert items["accuracy"] == [float(answer == "a ladder")]
    assert items["format_validity"] == [float(bool(answer))]


def test_perplexity_weighs_tokens_and_normalises_by_words_and_bytes(student):
    texts = ["A dog sleeps.", "The boat comes back full of fish in the morning"]
    found = {
        s.metric: s for s in Perplexity(name="perplexity", task="t", texts=texts, window=8).measure(student, STREAM, 0)
    }
    ids = [tuple(student.encoder.text(text)) for text in texts]
    nll = student.window_nll(ids, window=8)
    tokens, words, size = sum(map(len, ids)), 3 + 10, sum(len(text) for text in texts)
    assert found["nll_token"].value == pytest.approx(sum(nll) / tokens) and found["nll_token"].n == tokens
    assert found["token_perplexity"].value == pytest.approx(math.exp(sum(nll) / tokens))
    assert found["word_perplexity"].value == pytest.approx(math.exp(sum(nll) / words))
    assert found["bits_per_byte"].value == pytest.approx(sum(nll) / size / math.log(2))
    assert found["nll_token"].items == pytest.approx(tuple(nll))
