"""The last layer, read where it is wanted, gives what a whole forward gives, gradients too, and reads fewer tokens."""

import copy
import logging

import numpy as np
import pytest
import torch
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    BloomConfig,
    BloomForCausalLM,
)
from transformers.cache_utils import DynamicCache

from clbench import last_layer
from clbench.adapters import Lora, trainable
from clbench.architecture import layers, tried
from clbench.data import Encoder
from clbench.last_layer import filled, hidden_at, keep_whole, keys_and_values, places_by_row
from clbench.loss import answer_loss, hidden_states, weighted_nll
from clbench.types import Example, UserMistake
from tests import test_packing
from tests.benchmarks.models import words

CHANGES = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": 7},
    "gemma2": {"sliding_window": 7},
    "gpt2": {"resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0},
}
IDS = torch.arange(60).reshape(3, 20) * 7 % 50
PLACES = torch.tensor([[3, 19], [0, 0], [8, 9]])
ROWS = torch.arange(3)[:, None]


ANSWERED = [
    Example(id="a", prompt="w5 w6 w7 w8 w9 w10 w11 w12", answer="w13"),
    Example(id="b", prompt="w5 w6 w14 w15", answer="w7 w8 w9"),
    Example(id="c", prompt="w20 w21 w22 w23 w24 w25", answer="w5 w5"),
]


def model(name, attention=None):
    subject = test_packing.model(name, **CHANGES[name])
    subject.set_attn_implementation(attention or ("eager" if name == "gemma2" else "sdpa"))
    return subject


def tokens_of_last_mlp(subject):
    """How many tokens the last layer's MLP reads at each call from now on."""
    read = []
    layers(subject.get_decoder())[-1].mlp.register_forward_pre_hook(
        lambda _, args: read.append(args[0][..., 0].numel())
    )
    return read


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        (name, attention)
        for name in CHANGES
        for attention in ("sdpa", "eager")
        if (name, attention) != ("gemma2", "sdpa")
    ],
)
def test_wanted_states_and_their_gradients_are_those_of_a_whole_forward(name, attention):
    found = {}
    for kind in ("whole", "wanted"):
        subject = model(name, attention)
        decoder = subject.get_decoder()
        if kind == "wanted":
            states = hidden_at(decoder, PLACES, input_ids=IDS, use_cache=False)
        else:
            states = decoder(input_ids=IDS, use_cache=False).last_hidden_state[ROWS, PLACES]
        # A place that fills a row up must not count twice: row 1 wants place 0 twice, only the first is looked at.
        weights = torch.tensor([[1.0, 2.0], [3.0, 0.0], [4.0, 5.0]])[..., None] * torch.linspace(-1, 1, 32).sin()
        (states * weights).sum().backward()
        found[kind] = states.detach(), {n: p.grad for n, p in subject.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found["wanted"][0], found["whole"][0], rtol=1e-5, atol=1e-5)
    assert found["wanted"][1].keys() == found["whole"][1].keys()
    for key, gradient in found["whole"][1].items():
        assert gradient.abs().max() > 1e-3, key
        torch.testing.assert_close(found["wanted"][1][key], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", CHANGES)
def test_behind_a_beginning_and_with_rows_filled_up_on_the_left_the_states_are_the_same(name):
    subject = model(name)
    decoder = subject.get_decoder()
    mask = torch.ones(3, 25, dtype=torch.int64)
    mask[1, 5:9] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1)[:, 5:], "use_cache": True}
    with torch.inference_mode():
        whole, wanted = DynamicCache(), DynamicCache()
        decoder(input_ids=IDS[:, :5], past_key_values=whole, use_cache=True)
        keys_and_values(decoder, IDS[:, :5], wanted)
        expected = decoder(input_ids=IDS, past_key_values=whole, **inputs).last_hidden_state[ROWS, PLACES[:, 1:]]
        found = hidden_at(decoder, PLACES[:, 1:], input_ids=IDS, past_key_values=wanted, **inputs)
    kept = torch.tensor([0, 2])  # row 1 wants a place that fills it up
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-5, atol=1e-5)
    for one, other in zip(whole.layers, wanted.layers, strict=True):
        torch.testing.assert_close(other.keys[kept], one.keys[kept], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.values[kept], one.values[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CHANGES)
def test_the_last_mlp_reads_the_wanted_tokens_alone(name):
    subject = model(name)
    hidden_at(subject.get_decoder(), PLACES, input_ids=IDS, use_cache=False)  # tried out here
    read = tokens_of_last_mlp(subject)
    hidden_at(subject.get_decoder(), PLACES, input_ids=IDS, use_cache=False)
    assert read == [6]


def test_the_loss_of_answers_is_that_of_whole_rows():
    torch.manual_seed(0)
    tokenizer = words(50)
    encoder = Encoder(tokenizer, max_length=64)
    rows = ANSWERED
    subject = Lora(rank=2, alpha=4, targets=["q_proj", "v_proj", "down_proj"]).add(model("llama"), seed=0)
    for parameter in trainable(subject).values():
        torch.nn.init.normal_(parameter, std=0.1)
    (batch,) = encoder.micro_batches([(row, 0, 1.0) for row in rows], rows=8, tokens=None)
    found = {}
    for kind in ("answers", "whole"):
        subject.zero_grad()
        if kind == "answers":
            loss = answer_loss(subject, batch)
        else:
            loss = weighted_nll(
                subject,
                *hidden_states(subject, input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids)),
                batch,
            )
        loss.backward()
        found[kind] = float(loss.detach()), {name: tensor.grad.clone() for name, tensor in trainable(subject).items()}
    by_hand = [
        torch.nn.functional.cross_entropy(
            subject(input_ids=torch.tensor([encoder.example(row).ids])).logits[0, :-1],
            torch.tensor(encoder.example(row).ids[1:]),
            reduction="none",
        )[encoder.example(row).answer_start - 1 :]
        for row in rows
    ]
    assert found["answers"][0] == pytest.approx(float(torch.cat(by_hand).mean()), rel=1e-5)
    assert found["answers"][0] == pytest.approx(found["whole"][0], rel=1e-6)
    for name, gradient in found["whole"][1].items():
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(found["answers"][1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("answer", "mlp_reads"), [("w5 w6", 3), ("w5 w6 w7 w8 w9 w10 w11 w12 w13 w14", 14)])
def test_where_most_tokens_are_answers_the_last_layer_is_read_once(answer, mlp_reads):
    subject = model("llama")
    batch = Encoder(words(50), max_length=64).collate([Example(id="a", prompt="w5 w6", answer=answer)])
    answer_loss(subject, batch)
    read = tokens_of_last_mlp(subject)
    answer_loss(subject, batch)
    assert read == [mlp_reads]


def test_places_of_joined_rows_are_told_apart():
    places = places_by_row(torch.tensor([2, 3, 9, 11]), (4, 3, 5))
    assert [part.tolist() for part in places] == [[2, 3], [], [2, 4]]


def test_rows_of_places_are_filled_up_with_their_last():
    places, answers = filled(np.array([0, 0, 2, 2, 2]), np.array([4, 6, 1, 2, 9]), rows=4)
    assert places.tolist() == [[4, 6, 6], [0, 0, 0], [1, 2, 9], [0, 0, 0]]
    assert places.flatten()[answers].tolist() == [4, 6, 1, 2, 9]


def test_a_layer_that_cannot_be_called_twice_is_read_whole_and_that_is_said_once(caplog):
    torch.manual_seed(0)
    subject = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)).eval()
    decoder = subject.get_decoder()
    with caplog.at_level(logging.INFO, logger="clbench"), torch.inference_mode():
        for _ in range(2):
            found = hidden_at(decoder, PLACES, input_ids=IDS, use_cache=False)
            torch.testing.assert_close(found, decoder(input_ids=IDS).last_hidden_state[ROWS, PLACES])
    assert [record.message for record in caplog.records] == [
        "BloomModel is read whole: its last layer cannot be read at some places alone"
    ]


@pytest.mark.parametrize("reason", ["compiled", "in slices", "bfloat16", "kept whole", "wrong when tried out"])
def test_the_layer_is_read_whole_where_two_calls_would_not_do(reason, monkeypatch):
    subject = model("llama")
    decoder = subject.get_decoder()
    if reason == "compiled":
        layers(decoder)[-1]._compiled_call_impl = lambda *args, **kwargs: layers(decoder)[-1]._call_impl(
            *args, **kwargs
        )
    elif reason == "in slices":
        layers(decoder)[-1].mlp.up_proj.weight.ds_tensor = torch.zeros(1)
    elif reason == "bfloat16":
        decoder.to(torch.bfloat16)
    elif reason == "kept whole":
        keep_whole(decoder)
    else:
        monkeypatch.setattr(
            last_layer, "causal", lambda places, *, seen, dtype, **_: torch.zeros(len(places), 1, places.shape[1], seen)
        )
    expected = decoder(input_ids=IDS, use_cache=False).last_hidden_state[ROWS, PLACES]
    read = tokens_of_last_mlp(subject)
    torch.testing.assert_close(hidden_at(decoder, PLACES, input_ids=IDS, use_cache=False), expected)
    assert read[-1] == 60


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_fails_when_it_is_tried_out_is_read_whole_and_left_as_it_was(training, monkeypatch, caplog):
    def failing(*args, **kwargs):
        raise KeyError("no such thing")

    monkeypatch.setattr(last_layer, "_narrow", failing)
    subject = model("llama").train(training)
    layers(subject.get_decoder())[1].eval()
    expected = subject.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state[ROWS, PLACES]
    with caplog.at_level(logging.INFO, logger="clbench"):
        torch.testing.assert_close(hidden_at(subject.get_decoder(), PLACES, input_ids=IDS, use_cache=False), expected)
    assert [record.message for record in caplog.records] == [
        "LlamaModel is read whole: its last layer cannot be read at some places alone (KeyError: 'no such thing')"
    ]
    assert [layer.training for layer in layers(subject.get_decoder())] == [training, False, training]
    assert not layers(subject.get_decoder())[-1]._forward_pre_hooks


def test_a_users_mistake_is_not_taken_for_a_refusal():
    def mistaken(model):
        raise UserMistake("choose another model")

    subject = model("llama")
    with pytest.raises(UserMistake):
        tried({}, subject, mistaken, "")


def test_a_decoder_that_names_no_layers_is_read_whole():
    torch.manual_seed(0)
    config = BioGptConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    subject = BioGptForCausalLM(config).eval()
    decoder = subject.get_decoder()
    assert layers(decoder) == []
    found = hidden_at(decoder, PLACES, input_ids=IDS, use_cache=False)
    torch.testing.assert_close(found, decoder(input_ids=IDS, use_cache=False).last_hidden_state[ROWS, PLACES])
    assert torch.isfinite(answer_loss(subject, Encoder(words(50), max_length=64).collate(ANSWERED)))


def test_trying_out_leaves_the_model_and_its_random_numbers_as_they_were():
    subject = model("llama").train()
    state = torch.get_rng_state()
    hidden_at(subject.get_decoder(), PLACES, input_ids=IDS, use_cache=False)
    assert subject.get_decoder().training and torch.equal(torch.get_rng_state(), state)
    again = copy.deepcopy(subject)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in again.modules())
