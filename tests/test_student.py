"""Scores of the student against the plainest possible computation: one row at a time, no padding, the whole vocabulary everywhere."""

import copy
import itertools
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from clbench.data.encoder import Encoder
from clbench.examine.student import Student, mask_of
from clbench.examine.together import reads_together
from clbench.models.loss import answer_loss
from clbench.types import IGNORED, Example
from tests.test_data import Words

VOCABULARY = 40


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def plain_log_probs(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def requests():
    rng = torch.Generator().manual_seed(0)
    drawn = []
    for context_length, continuation_length in ((3, 1), (3, 2), (7, 1), (1, 4), (12, 3), (5, 1)):
        ids = torch.randint(3, VOCABULARY, (context_length + continuation_length,), generator=rng).tolist()
        drawn.append(((1, *ids[:context_length]), tuple(ids[context_length:])))
    shared = drawn[2][0]
    return [*drawn, *((shared, (token,)) for token in range(3, 9))]


@pytest.mark.parametrize("tokens", [1, 20, 4096])
def test_log_likelihoods_equal_one_plain_forward_each(model, tokens):
    asked = requests()
    scored = Student(model, Encoder(Words(), max_length=32), tokens=tokens).log_likelihoods(asked)
    for (context, continuation), (value, greedy) in zip(asked, scored, strict=True):
        log_probs = plain_log_probs(model, [*context, *continuation])
        steps = range(len(context) - 1, len(context) + len(continuation) - 1)
        expected = sum(float(log_probs[step, token]) for step, token in zip(steps, continuation, strict=True))
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == all(
            int(log_probs[step].argmax()) == token for step, token in zip(steps, continuation, strict=True)
        )


@pytest.mark.parametrize(("kind", "own"), [("llama", {}), ("gemma3_text", {"sliding_window": 8})])
def test_log_likelihoods_are_within_1e_4_nats_a_token_of_float64(kind, own):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16} | own
    config = AutoConfig.for_model(kind, **sizes, **heads, max_position_embeddings=64, initializer_range=0.3)
    single = AutoModelForCausalLM.from_config(config).eval()
    exact = copy.deepcopy(single).double()
    student = Student(single, Encoder(Words(), max_length=32))
    for (context, continuation), (value, _) in zip(requests(), student.log_likelihoods(requests()), strict=True):
        log_probs = plain_log_probs(exact, [*context, *continuation])[len(context) - 1 : -1]
        expected = sum(float(row[token]) for row, token in zip(log_probs, continuation, strict=True))
        assert expected != value == pytest.approx(expected, abs=1e-4 * len(continuation))


def test_a_context_is_read_once_for_all_its_one_token_continuations(model):
    student = Student(model, Encoder(Words(), max_length=32))
    student.log_likelihoods([((1, 5, 6), (token,)) for token in range(3, 13)])
    assert student.tokens_scored == 3


@pytest.mark.parametrize("tokens", [1, 4096])
def test_generation_equals_greedy_decoding_of_one_prompt(model, tokens):
    class Decodable(Words):
        def decode(self, ids, skip_special_tokens):
            return " ".join(str(token) for token in ids if token > 2)

    prompts = [context for context, _ in requests()[:6]]
    answers = Student(model, Encoder(Decodable(), max_length=32), tokens=tokens).generate(prompts, max_new_tokens=5)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(plain_log_probs(model, ids)[-1].argmax()))
            if ids[-1] == 2:
                break
        assert answer == " ".join(str(token) for token in ids[len(prompt) :] if token > 2)


def test_a_prompt_that_is_too_long_is_cut_in_examination_as_in_training(model):
    class Decodable(Words):
        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids))

    prompt, answer = (1, *range(3, 19)), (20, 21)  # of 10 tokens all but the last answer token are read
    student = Student(model, Encoder(Decodable(), max_length=10, cut="middle"))
    log_probs = plain_log_probs(model, [1, 3, 4, 5, 6, 15, 16, 17, 18, 20])
    expected = float(log_probs[8, 20] + log_probs[9, 21])
    assert student.log_likelihoods([(prompt, answer)])[0][0] == pytest.approx(expected, abs=1e-4)
    first = int(plain_log_probs(model, [1, 3, 4, 5, 6, 14, 15, 16, 17, 18])[-1].argmax())
    assert student.generate([prompt], max_new_tokens=1) == [str(first)]
    # A probe that states its own bound reads as lm-eval does.
    log_probs = plain_log_probs(model, [1, *range(11, 19), 20])
    expected = float(log_probs[8, 20] + log_probs[9, 21])
    assert student.log_likelihoods([(prompt, answer)], max_length=10)[0][0] == pytest.approx(expected, abs=1e-4)


def test_distributions_are_those_of_plain_forwards_at_the_places_asked(model):
    requests = [((1, 5), (6, 4, 3), (0, 2)), ((1,), (7,), (0,)), ((1, 5), (9, 3), ()), ((1, 7, 8), (9, 10), (1,))]
    student = Student(model, Encoder(Words(), max_length=32), tokens=6)
    found = student.read(requests)
    assert [one[:2] for one in found] == student.log_likelihoods([request[:2] for request in requests])
    for (context, continuation, places), (*_, rows) in zip(requests, found, strict=True):
        # What could stand at a place follows the token before it.
        expected = plain_log_probs(model, [*context, *continuation])[[len(context) - 1 + place for place in places]]
        torch.testing.assert_close(rows.reshape(expected.shape), expected, atol=1e-5, rtol=0)


def test_the_answer_loss_is_transformers_own_loss(model):
    examples = [Example(id=str(i), prompt="a " * (i + 1), answer="b c " * (3 - i)) for i in range(3)]
    batch = Encoder(Words(), max_length=32).collate(examples)
    with torch.inference_mode():
        theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        ours = answer_loss(model, batch)
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)
    assert (batch.labels != IGNORED).sum() > 0 and math.isfinite(float(ours))


def test_scoring_and_training_leave_the_attention_implementation_to_the_user(model):
    model, encoder = copy.deepcopy(model), Encoder(Words(), max_length=32)
    examples = [Example(id=str(n), prompt="a " * n, answer="b c") for n in (2, 5)]
    answer_loss(model, encoder.collate(examples)).backward()
    Student(model, encoder).log_likelihoods(requests())
    model.set_attn_implementation("eager")
    chosen = {part.config._attn_implementation for part in model.modules() if "config" in vars(part)}
    assert chosen == {"eager"}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("shared", [0, 40])
def test_rows_and_beginnings_that_are_shared_change_no_score_and_no_answer(model, together, shared):
    model = copy.deepcopy(model)
    model.config.max_position_embeddings = 128
    beginning = tuple(3 + n % 30 for n in range(shared))
    asked = [((1, *beginning, *context), continuation) for context, continuation in requests()]
    encoder = Encoder(Words(), max_length=96, together=together)
    student = Student(model, encoder)
    for (context, continuation), (value, _) in zip(asked, student.log_likelihoods(asked), strict=True):
        log_probs = plain_log_probs(model, [*context, *continuation])[len(context) - 1 :]
        expected = sum(float(row[token]) for row, token in zip(log_probs, continuation, strict=False))
        assert value == pytest.approx(expected, abs=1e-4)
    read = sum(len(context) for context in {context for context, _ in asked})
    read += sum(len(continuation) - 1 for _, continuation in asked)
    contexts = len({context for context, _ in asked})
    expected = read - (contexts - 1) * (shared + 2) if shared else read  # a BOS before and behind it
    assert student.tokens_scored == expected if together else student.tokens_scored > read
    prompts = [context for context, _ in asked]
    for prompt, answer in zip(prompts, student.write(prompts, max_new_tokens=4), strict=True):
        ids = list(prompt)
        for _ in range(4):
            ids.append(int(plain_log_probs(model, ids)[-1].argmax()))
        assert answer == list(itertools.takewhile(lambda token: token != 2, ids[len(prompt) :]))


def test_reading_together_is_found_out_without_a_trace(model):
    encoder = Encoder(Words(), max_length=32)
    assert reads_together(model, encoder) and encoder.together
    stretched = copy.deepcopy(model)
    stretched.config.rope_parameters = {**stretched.config.rope_parameters, "rope_type": "dynamic"}
    assert not reads_together(stretched, encoder)


def test_rows_that_go_wrong_behind_their_first_50_tokens_are_not_read_together(model, monkeypatch):
    def slipping(model, sees_TS, positions_T):
        sees_TS = sees_TS.clone()
        sees_TS[50:, :50] = False
        return mask_of(model, sees_TS, positions_T)

    monkeypatch.setattr("clbench.examine.student.mask_of", slipping)
    assert not reads_together(model, Encoder(Words(), max_length=64))


def test_a_loss_that_is_no_number_is_not_reading_together(model, monkeypatch):
    monkeypatch.setattr("clbench.examine.together._gap_in_training", lambda *_: float("nan"))
    assert not reads_together(model, Encoder(Words(), max_length=32))


def test_rows_are_trained_on_as_if_each_stood_alone(model):
    encoder = Encoder(Words(), max_length=32)
    rows = [(Example(id=str(i), prompt="a " * (1 + 3 * i), answer="b c " * (3 - i)), 0, 1.0) for i in range(3)]
    gradients = []
    for together in (True, False):
        encoder.together = together
        model.zero_grad()
        parts = encoder.micro_batches(rows, rows=3)
        assert len(parts) == (1 if together else 3)
        for part in parts:
            answer_loss(model, part).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_many_continuations_of_one_context_are_read_in_several_forwards(model):
    texts = [tuple(3 + (7 * n + k) % 20 for k in range(9)) for n in range(12)]
    heard = []
    student = Student(model, Encoder(Words(), max_length=32), tokens=20, report=lambda *one: heard.append(one[2:]))
    found = student.log_likelihoods([((1,), text) for text in texts])
    # They begin at 0, 9, 18; 27, 36; 45, 54; 63, 72; 81, 90, 99: in five spans of twenty tokens.
    assert heard == [(done, 5) for done in range(1, 6)]
    for text, (value, _) in zip(texts, found, strict=True):
        log_probs = plain_log_probs(model, [1, *text])
        assert value == pytest.approx(sum(float(log_probs[k, token]) for k, token in enumerate(text)), abs=1e-4)
