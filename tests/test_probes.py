"""The stream and text probes against hand-worked cases and plain forwards of the whole."""

import json
import math

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clbench.data.encoder import Encoder
from clbench.data.rows import DatasetSpec
from clbench.examine.matrix import Matrix, choose, examine, floors
from clbench.examine.scores import mean
from clbench.examine.student import Student
from clbench.examine.text import Text, beginnings
from clbench.examine.update import Update
from clbench.models.folding import folded
from clbench.models.lora import Lora
from clbench.models.loss import causal_lm
from clbench.models.pairs import lora_pairs
from clbench.protocols import Stage, Stream, Task
from clbench.types import Example, UserMistake
from tasks.wikitext import DATASET, articles, general_texts

SENTENCES = [
    "A man carries a ladder to the wall and climbs up to clean the gutter.",
    "Two children paint a fence while a dog sleeps in the shade of a tree.",
    "The cook peels potatoes, boils them and mashes them with butter and salt.",
    "A boat leaves the harbour in the morning and comes back full of fish.",
    "She opens the old book, reads a page aloud and laughs at the picture.",
]


def tiny_student(*, positions: int = 256, max_length: int = 200) -> Student:
    """A Llama with random weights and a byte-level tokenizer of 400 tokens."""
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
        max_position_embeddings=positions,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return Student(LlamaForCausalLM(config).eval(), Encoder(fast, max_length=max_length))


@pytest.fixture(scope="module")
def student():
    return tiny_student()


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


def stage(tests, train=None):
    train = train or tests
    return Stage(
        index=1, name="toy", task=Toy(), train=train, test=tests, collate=lambda examples: None, whole_stream=train
    )


def one_stage(examined):
    return Stream(name="toy", order="default", stages=(examined,))


STREAM = one_stage(stage(closed("ab")))


def token_nll(student, ids):
    """Nats of each token of a short text, from one plain forward of BOS and the text."""
    with torch.inference_mode():
        log_probs = student.model(torch.tensor([[0, *ids]])).logits[0].log_softmax(-1)
    return [-float(log_probs[place, token]) for place, token in enumerate(ids)]


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


def test_floors_are_chance_the_commonest_answer_and_an_answer_of_another_question():
    # Test answers a a b c c against training answers c a b in turn, c a b c a: the middle three are right.
    found = floors(stage(closed("aabcc"), train=closed("cab")))
    assert found == {
        "chance": pytest.approx(1 / 3),
        "majority": pytest.approx(2 / 5),
        "format_only": pytest.approx(3 / 5),
        "copy": pytest.approx(2 / 5),  # no choice stands in a prompt: the first one
    }


def test_floors_of_an_open_task_have_no_chance():
    tests = tuple(Example(id=str(i), prompt="?", answer=answer) for i, answer in enumerate(("x y", "z", "z", "w")))
    assert floors(stage(tests, train=tests[2:])) == {
        "chance": 0.0,
        "majority": 0.5,
        "format_only": 0.5,
        "copy": 0.0,
    }  # z w z w


def test_the_copying_floor_is_that_of_the_best_reader_chosen_on_the_first_32_examples():
    # The last number is right in the first 20 of 40 prompts, the first word in the last 8.
    prompts = [("so", 7, "7") if i < 20 else ("9", 7, "9") if i >= 32 else ("so", 7, "5") for i in range(40)]
    tests = tuple(
        Example(id=str(i), prompt=f"{first} and {i} {last} how many ?{' really ?' * (i % 3)}", answer=answer)
        for i, (first, last, answer) in enumerate(prompts)
    )
    assert floors(stage(tests))["copy"] == 20 / 40


def test_format_loss_is_the_metric_less_exact_match_item_by_item(student):
    tests = closed("abcabc")
    scores = {s.metric: s for s in Matrix(name="stream").measure(student, one_stage(stage(tests)), 1)}
    likeliest, greedy = choose(student, tests)
    lost = [
        float(chosen == example.answer) - float(written == example.answer)
        for example, chosen, written in zip(tests, likeliest, greedy, strict=True)
    ]
    assert scores["format_loss"].items == tuple(lost) and any(lost)
    assert scores["format_loss"].value == pytest.approx(scores["accuracy"].value - scores["exact_match"].value)
    assert scores["format_loss"].stderr > 0
    assert "format_only" not in scores  # of the data, not of the model: stage 0 only
    open_task = stage((Example(id="0", prompt="A man carries", answer="a ladder"),))
    assert "format_loss" not in {s.metric for s in Matrix(name="stream").measure(student, one_stage(open_task), 0)}


def test_an_item_score_has_the_standard_error_of_its_mean():
    score = mean([1.0, 0.0, 1.0, 1.0])
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


TEXTS = ["A dog sleeps.", "The boat comes back full of fish in the morning"]


def measured(student, texts, *, window, **settings):
    """What the probe says of the untouched model, by metric."""
    probe = Text(name="perplexity", task="t", texts=texts, window=window, text_loss=True, **settings)
    probe.begin(student)
    return {score.metric: score for score in probe.measure(student, STREAM, 0)}


def test_perplexity_weighs_tokens_and_normalises_by_words_and_bytes(student):
    found = measured(student, TEXTS, window=64)
    nll = [token_nll(student, student.encoder.text(text)) for text in TEXTS]
    every, words, size = nll[0] + nll[1], 3 + 10, sum(map(len, TEXTS))
    mean = sum(every) / len(every)
    assert len(nll[0]) < len(nll[1])  # else a mean over texts would be the same
    assert mean != pytest.approx(sum(sum(one) / len(one) for one in nll) / 2, abs=1e-3)
    assert found["nll_token"].value == pytest.approx(mean, abs=1e-5) and found["nll_token"].n == len(every)
    assert found["token_perplexity"].value == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["word_perplexity"].value == pytest.approx(math.exp(sum(every) / words), rel=1e-4)
    assert found["bits_per_byte"].value == pytest.approx(sum(every) / size / math.log(2), rel=1e-5)
    assert found["nll_token"].items == pytest.approx([sum(one) for one in nll], rel=1e-5)


def test_text_loss_weighs_texts(student):
    score = measured(student, TEXTS, window=64)["mean_text_nll"]
    means = [sum(nll) / len(nll) for nll in (token_nll(student, student.encoder.text(text)) for text in TEXTS)]
    assert (score.probe, score.n) == ("text_loss", 2)
    assert score.items == pytest.approx(means, rel=1e-5) and score.value == pytest.approx(sum(means) / 2, rel=1e-5)
    assert score.stderr == pytest.approx(abs(means[0] - means[1]) / 2, rel=1e-4)


def test_perplexity_reads_the_whole_text_in_windows_of_which_the_last_is_filled_up(student):
    ids = student.encoder.text(TEXTS[1])
    score = measured(student, TEXTS[1:], window=5)["nll_token"]
    whole, places = [0, *ids], range(1, len(ids) + 1)
    # The token at `place` is read after its window so far; the last window reaches back to five tokens.
    starts = [(place - 1) // 5 * 5 for place in places]
    starts = [min(start, len(ids) - 5) for start in starts]
    expected = 0.0
    for place, start in zip(places, starts, strict=True):
        with torch.inference_mode():
            log_probs = student.model(torch.tensor([whole[start:place]])).logits[0, -1].log_softmax(-1)
        expected -= float(log_probs[whole[place]])
    assert len(ids) % 5 and score.value * len(ids) == pytest.approx(expected, rel=1e-5)


def test_a_text_without_any_chance_has_infinite_perplexity_instead_of_an_error(student):
    found = measured(student, ["?" * 3000], window=64)  # one word of 3000 tokens: exp(3000 times several nats)
    assert found["word_perplexity"].value == math.inf and math.isfinite(found["token_perplexity"].value)


def test_text_is_read_once_for_all_its_metrics_also_of_the_untouched_model(moved):
    probe = Text(name="perplexity", task="t", texts=TEXTS, window=64, positions=7, text_loss=True)
    tokens = sum(len(moved.encoder.text(text)) for text in TEXTS)
    probe.begin(moved)
    rows = [(score.probe, score.metric) for score in probe.measure(moved, STREAM, 0)]
    assert moved.tokens_scored == tokens - 1  # one BOS for both; a text's last token predicts nothing
    assert rows == [
        *(("perplexity", metric) for metric in ("nll_token", "token_perplexity", "word_perplexity", "bits_per_byte")),
        ("text_loss", "mean_text_nll"),
        ("divergence", "kl_token"),
    ]
    scores = list(probe.measure(moved, STREAM, 1))
    assert moved.tokens_scored == 2 * (tokens - 1)
    assert [score.seconds > 0 for score in scores] == [True, *[False] * 5]


def test_a_budget_of_tokens_takes_the_beginnings_of_texts_to_the_end_of_a_word(student):
    encoder = student.encoder
    long, short = " ".join(SENTENCES * 8), "A dog sleeps."
    of_short = len(encoder.text(short))
    assert beginnings([long, short], encoder, most=None) == [long, short]
    assert beginnings(TEXTS, encoder, most=sum(len(encoder.text(text)) for text in TEXTS)) == TEXTS
    first, second, third = beginnings([long, short, long], encoder, most=400)
    # What the short one leaves is the others', in equal parts.
    assert second == short and first == third
    assert (400 - of_short) // 2 - 20 < len(encoder.text(first)) <= (400 - of_short) // 2
    assert long.startswith(first + " ")
    # Fewer than 64 tokens for each: the last are left out.
    assert beginnings([long] * 5, encoder, most=150) == beginnings([long] * 2, encoder, most=150)
    assert 0 < len(encoder.text(beginnings(["x" * 4000], encoder, most=64)[0])) <= 64  # no word ends
    found = measured(student, [long, short, long], window=64, tokens=400)
    assert found["nll_token"].n == len(encoder.text(first)) * 2 + of_short
    assert found["bits_per_byte"].n == 2 * len(first) + len(short)


@pytest.fixture
def moved():
    """A student of its own, to be moved after the probe has seen it."""
    return tiny_student()


def test_divergence_positions_are_the_middles_of_equal_spans():
    def chosen(positions, tokens):
        return Text(name="p", task="t", texts=TEXTS, window=4, positions=positions).chosen(tokens)

    assert chosen(3, 24) == [4, 12, 20] and chosen(2, 7) == [1, 5] and chosen(10, 3) == [0, 1, 2]


def test_divergence_is_zero_for_the_untouched_model_and_exact_for_another(moved):
    probe = Text(name="perplexity", task="t", texts=TEXTS, window=6, positions=10)
    probe.begin(moved)
    (score,) = [score for score in probe.measure(moved, STREAM, 0) if score.probe == "divergence"]
    assert (score.metric, score.value, score.n, score.items) == ("kl_token", 0.0, 10, (0.0,) * 10)

    # Every token of both texts after what is read before it: BOS first, then windows of six of which the last is filled up.
    contexts = []
    for ids in (moved.encoder.text(text) for text in TEXTS):
        for place in range(len(ids)):
            start = min(place // 6 * 6, max(len(ids) - 6, 0))
            contexts.append([0, *ids][start : place + 1])
    contexts = [contexts[(2 * k + 1) * len(contexts) // 20] for k in range(10)]
    before = [plain(moved, context) for context in contexts]
    with torch.no_grad():
        for parameter in moved.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    (score,) = [score for score in probe.measure(moved, STREAM, 1) if score.probe == "divergence"]
    # In float64: sum over the vocabulary of p log(p / q), p the untouched model's.
    expected = [
        float((p.exp() * (p - q)).sum()) for p, q in zip(before, (plain(moved, c) for c in contexts), strict=True)
    ]
    assert min(expected) > 1e-3
    assert score.items == pytest.approx(expected, rel=1e-3) and score.value == pytest.approx(
        sum(expected) / 10, rel=1e-3
    )
    assert (score.stage, score.stage_name) == (1, "toy")


def test_divergence_sees_the_untouched_model_without_dropout(moved):
    for layer in moved.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    moved.model.train()
    probe = Text(name="perplexity", task="t", texts=TEXTS, window=6, positions=10)
    probe.begin(moved)
    moved.model.eval()
    (score,) = [score for score in probe.measure(moved, STREAM, 1) if score.probe == "divergence"]
    assert score.value == 0.0


def plain(student, ids):
    with torch.inference_mode():
        return student.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


@pytest.mark.parametrize("row", ['{"text": "An article."}', '{"page": " "}', '{"page": null}'])
def test_an_article_without_text_is_named_with_its_line(row, tmp_path):
    (tmp_path / DATASET.name).mkdir()
    (tmp_path / DATASET.name / "test.jsonl").write_text(f'{{"page": "One."}}\n\n{row}\n')
    with pytest.raises(UserMistake, match="test.jsonl, line 3: column 'page' is missing or empty") as mistake:
        articles(data_dir=str(tmp_path), split="all")
    assert "\n" not in str(mistake.value)


def test_general_text_is_of_the_train_split_and_a_seed_decides_which(tmp_path):
    (tmp_path / DATASET.name).mkdir()
    for split in ("train", "test"):
        lines = [json.dumps({"page": f"{split} {number}"}) + "\n" for number in range(40)]
        (tmp_path / DATASET.name / f"{split}.jsonl").write_text("".join(lines))
    first, again, other = (general_texts(seed, texts=8, data_dir=str(tmp_path)) for seed in (0, 0, 1))
    assert first == again != other and len({*first}) == 8
    assert {*first, *other} < {f"train {number}" for number in range(40)}
    assert general_texts(0, texts=9, data_dir=str(tmp_path))[:8] == first
    assert sorted(general_texts(0, texts=99, data_dir=str(tmp_path))) == sorted(f"train {n}" for n in range(40))


def test_a_text_probe_names_its_dataset_and_its_texts():
    spec = DatasetSpec(name="pages", hub="someone/pages")
    probe = Text(name="p", task="t", texts=TEXTS, window=8, dataset=spec)
    assert list(probe.datasets()) == [spec] and list(probe.documents()["t"]) == TEXTS
    assert Text(name="p", task="t", texts=TEXTS, window=8).datasets() == ()


def test_the_size_of_an_update_is_that_of_all_linear_layers_together(moved):
    probe = Update(name="update")
    probe.begin(moved)
    layers = {name: part for name, part in moved.model.named_modules() if isinstance(part, torch.nn.Linear)}
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}

    def found() -> float:
        (score,) = probe.measure(moved, STREAM, 1)
        assert (score.task, score.metric, score.n) == ("weights", "relative_norm", len(layers))
        return score.value

    assert found() == 0
    with torch.no_grad():
        for name, layer in layers.items():
            if "q_proj" in name or "down_proj" in name:
                noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(len(name)))
                layer.weight.add_(noise, alpha=0.1)
    moved_by = sum(float((layer.weight - before[name]).square().sum()) for name, layer in layers.items())
    expected = math.sqrt(moved_by / sum(float(weight.square().sum()) for weight in before.values()))
    assert found() == pytest.approx(expected, rel=0.1)


def test_an_adapter_counts_folded_or_not(moved):
    probe = Update(name="update")
    probe.begin(moved)
    moved.model = Lora(rank=2, alpha=4, targets=["q_proj", "o_proj"]).add(moved.model, seed=0).eval()
    pairs = lora_pairs(moved.model)
    with torch.no_grad():
        for pair in pairs:
            pair.live()[pair.B].normal_(generator=torch.Generator().manual_seed(0))
    size = sum(float((given @ weight_of(moved, name).T).square().sum()) for name, given in probe.inputs.items())
    # ||D R^T||^2 by hand, of the very inputs that the probe has.
    moved_by = 0.0
    for pair in pairs:
        given = probe.inputs[pair.A.removeprefix("base_model.model.").partition(".lora_A")[0]]
        moved_by += float((given @ pair.update(pair.live()).T).square().sum())
    (plain,) = probe.measure(moved, STREAM, 1)
    with folded(moved.model):
        (score,) = probe.measure(moved, STREAM, 1)
    assert plain.value == pytest.approx(math.sqrt(moved_by / size), rel=1e-4) == pytest.approx(score.value, rel=1e-4)


def weight_of(student: Student, name: str) -> torch.Tensor:
    layer = causal_lm(student.model).get_submodule(name)
    return (layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer).weight.detach()
