"""Scores of the student against the plainest possible computation: one row at a time, no padding, the whole vocabulary everywhere."""

import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from clbench.data.encoder import Encoder
from clbench.examine.student import Student
from clbench.models import loss
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


@pytest.mark.parametrize("tokens_per_batch", [1, 20, 4096])
def test_log_likelihoods_equal_one_plain_forward_each(model, tokens_per_batch):
    asked = requests()
    scored = Student(model, Encoder(Words(), max_length=32), tokens_per_batch=tokens_per_batch).log_likelihoods(asked)
    for (context, continuation), (value, greedy) in zip(asked, scored, strict=True):
        log_probs = plain_log_probs(model, [*context, *continuation])
        steps = range(len(context) - 1, len(context) + len(continuation) - 1)
        expected = sum(float(log_probs[step, token]) for step, token in zip(steps, continuation, strict=True))
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == all(
            int(log_probs[step].argmax()) == token for step, token in zip(steps, continuation, strict=True)
        )


def test_a_context_is_read_once_for_all_its_one_token_continuations(model):
    student = Student(model, Encoder(Words(), max_length=32))
    student.log_likelihoods([((1, 5, 6), (token,)) for token in range(3, 13)])
    assert student.tokens_scored == 3


@pytest.mark.parametrize("tokens_per_batch", [1, 4096])
def test_generation_equals_greedy_decoding_of_one_prompt(model, tokens_per_batch):
    class Decodable(Words):
        def decode(self, ids, skip_special_tokens):
            return " ".join(str(token) for token in ids if token > 2)

    prompts = [context for context, _ in requests()[:6]]
    answers = Student(model, Encoder(Decodable(), max_length=32), tokens_per_batch=tokens_per_batch).generate(
        prompts, max_new_tokens=5
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(plain_log_probs(model, ids)[-1].argmax()))
            if ids[-1] == 2:
                break
        assert answer == " ".join(str(token) for token in ids[len(prompt) :] if token > 2)


def test_next_log_probs_are_those_of_plain_forwards_in_the_order_asked(model):
    contexts = [(1, 5, 6), (1,), (1, 7, 8, 9, 10)]
    found = Student(model, Encoder(Words(), max_length=32), tokens_per_batch=6).next_log_probs(contexts)
    for ids, row in zip(contexts, found, strict=True):
        torch.testing.assert_close(row, plain_log_probs(model, list(ids))[-1], atol=1e-5, rtol=0)


def test_the_answer_loss_is_transformers_own_loss(model):
    examples = [Example(id=str(i), prompt="a " * (i + 1), answer="b c " * (3 - i)) for i in range(3)]
    batch = Encoder(Words(), max_length=32).collate(examples)
    with torch.inference_mode():
        theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        ours = answer_loss(model, batch)
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)
    assert (batch.labels != IGNORED).sum() > 0 and math.isfinite(float(ours))


@pytest.mark.parametrize("limit", [VOCABULARY, 3 * VOCABULARY, 10**6])
@pytest.mark.parametrize(("cap", "bias"), [(None, False), (2.0, False), (None, True)])
def test_the_loss_in_slices_has_the_value_and_the_gradients_of_cross_entropy(model, monkeypatch, limit, cap, bias):
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 16, generator=rng, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (10,), generator=rng)
    weights = torch.rand(10, generator=rng)
    torch.manual_seed(0)
    usual, head = model.get_output_embeddings(), torch.nn.Linear(16, VOCABULARY, bias=bias)
    logits = head(hidden)
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    whole = cross_entropy(logits, labels, reduction="none")
    (expected,) = torch.autograd.grad((whole * weights).sum(), hidden)
    monkeypatch.setattr(model.config, "final_logit_softcapping", cap, raising=False)
    model.set_output_embeddings(head)
    model.requires_grad_(False)
    try:
        sizes, nll_ = [], loss.nll_
        monkeypatch.setattr(loss, "nll_", lambda found, wanted: sizes.append(len(found)) or nll_(found, wanted))
        monkeypatch.setattr(loss, "LOGITS", limit)
        sliced = loss.token_nll(model, hidden, labels)
        (found,) = torch.autograd.grad((sliced * weights).sum(), hidden)
    finally:
        model.set_output_embeddings(usual)
        model.requires_grad_(True)
    torch.testing.assert_close(sliced, whole)
    torch.testing.assert_close(found, expected)
    assert max(sizes) * VOCABULARY <= limit and sum(sizes) == 10


def test_an_output_embedding_that_trains_gets_its_gradient(model, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS", 1)
    hidden, labels = torch.randn(4, 16, requires_grad=True), torch.tensor([3, 5, 7, 9])
    weight = model.get_output_embeddings().weight
    (gradient,) = torch.autograd.grad(loss.token_nll(model, hidden, labels).sum(), weight)
    assert float(gradient.abs().max()) > 0


def test_scoring_and_training_leave_the_attention_implementation_to_the_user(model):
    model, encoder = copy.deepcopy(model), Encoder(Words(), max_length=32)
    examples = [Example(id=str(n), prompt="a " * n, answer="b c") for n in (2, 5)]
    answer_loss(model, encoder.collate(examples)).backward()
    Student(model, encoder).log_likelihoods(requests())
    model.set_attn_implementation("eager")
    chosen = {part.config._attn_implementation for part in model.modules() if "config" in vars(part)}
    assert chosen == {"eager"}
