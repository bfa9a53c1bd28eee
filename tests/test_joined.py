"""Rows of unequal length read as one give what each gives alone, gradients too, and nothing that fills rows up is read."""

import logging

import pytest
import torch
from transformers import DogeConfig, DogeForCausalLM

from clbench import joined, last_layer
from clbench.adapters import Lora, trainable
from clbench.architecture import layers, sliding_window
from clbench.data import Encoder
from clbench.joined import join
from clbench.loss import answer_loss, hidden_states
from clbench.types import Example
from tests.benchmarks.models import words
from tests.test_last_layer import IDS, model, tokens_of_last_mlp
from tests.test_packing import SIZES

NAMES = ["llama", "qwen2", "gpt2"]
LENGTHS = [20, 3, 11]
MASK = (torch.arange(20) < torch.tensor(LENGTHS)[:, None]).long()
ROWS = [
    Example(id="a", prompt="w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15", answer="w13"),
    Example(id="b", prompt="w5 w6 w14 w15", answer="w7 w8 w9"),
    Example(id="c", prompt="w20 w21 w22 w23 w24 w25", answer="w5 w5"),
]


def adapted(name="llama"):
    targets = ["c_attn", "c_proj"] if name == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    subject = Lora(rank=2, alpha=4, targets=targets).add(model(name), seed=0)
    for parameter in trainable(subject).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return subject


@pytest.mark.parametrize("name", NAMES)
def test_each_row_is_read_as_if_it_stood_alone(name):
    subject = model(name)
    found = hidden_states(subject, input_ids=IDS, attention_mask=MASK, all_layers=True)
    assert join(subject.get_decoder(), IDS, MASK) is not None
    for row, length in enumerate(LENGTHS):
        alone = subject.get_decoder()(input_ids=IDS[row : row + 1, :length], output_hidden_states=True).hidden_states
        for ours, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(ours[row : row + 1, :length], expected, rtol=1e-5, atol=1e-5)
            assert not ours[row, length:].any()


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_and_its_gradient_are_those_of_rows_one_by_one(name, recomputed):
    encoder = Encoder(words(50), max_length=64)
    found = []
    for rows in (3, 1):
        subject = adapted(name).train()
        if recomputed:
            subject.get_base_model().gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        batches = encoder.micro_batches([(row, 0, 1.0) for row in ROWS], rows=rows)
        assert [len(batch.input_ids) for batch in batches] == [rows] * (3 // rows)
        loss = sum(answer_loss(subject, batch) for batch in batches)
        loss.backward()
        found.append((float(loss.detach()), {key: tensor.grad for key, tensor in trainable(subject).items()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for key, gradient in found[1][1].items():
        assert gradient.abs().max() > 1e-4, key
        torch.testing.assert_close(found[0][1][key], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


def test_what_fills_rows_up_is_not_read():
    subject = adapted()
    batch = Encoder(words(50), max_length=64).collate(ROWS)
    answer_loss(subject, batch)
    first, last = [], tokens_of_last_mlp(subject.get_base_model())
    mlp = layers(subject.get_base_model().get_decoder())[0].mlp
    mlp.register_forward_pre_hook(lambda _, args: first.append(args[0][..., 0].numel()))
    answer_loss(subject, batch)
    assert first == [int(batch.attention_mask.sum())] and batch.input_ids.numel() > first[0]
    assert last == [len(batch.answers)]


def test_rows_of_one_length_stay_beside_each_other():
    assert join(model("llama").get_decoder(), IDS, torch.ones_like(IDS)) is None


@pytest.mark.parametrize(
    "reason", ["a window that a row outgrows", "in slices", "compiled", "eager", "wrong when tried out"]
)
def test_rows_are_padded_where_joining_would_not_do(reason, monkeypatch, caplog):
    subject = model("mistral" if "window" in reason else "llama", "eager" if reason == "eager" else "sdpa")
    decoder = subject.get_decoder()
    last = layers(decoder)[-1]
    if reason == "in slices":
        last.mlp.up_proj.weight.ds_tensor = torch.zeros(1)
    elif reason == "compiled":
        last._compiled_call_impl = last._call_impl
    elif reason == "wrong when tried out":
        plain = joined.sdpa_attention_forward
        monkeypatch.setattr(
            joined,
            "sdpa_attention_forward",
            lambda module, query, *rest, **more: plain(module, 2 * query, *rest, **more),
        )
    with caplog.at_level(logging.INFO, logger="clbench"):
        assert join(decoder, IDS, MASK) is None and join(decoder, IDS, MASK) is None
    said = [record.message for record in caplog.records]
    tried = reason in ("eager", "wrong when tried out")
    assert said == ["LlamaModel is read in padded rows: it does not take rows of unequal length as one"] * tried
    monkeypatch.undo()
    (found,) = hidden_states(subject, input_ids=IDS, attention_mask=MASK)
    torch.testing.assert_close(found, decoder(input_ids=IDS).last_hidden_state)


def test_rows_within_a_window_are_joined():
    subject = model("mistral")
    short = (torch.arange(20) < torch.tensor([7, 3, 5])[:, None]).long()
    assert join(subject.get_decoder(), IDS, short) is not None
    (found,) = hidden_states(subject, input_ids=IDS, attention_mask=short)
    alone = subject.get_decoder()(input_ids=IDS[:1, :7]).last_hidden_state
    torch.testing.assert_close(found[:1, :7], alone, rtol=1e-5, atol=1e-5)


def test_a_window_smaller_than_what_is_tried_out_fails_nothing():
    subject = model("mistral")
    subject.config.sliding_window = subject.get_decoder().config.sliding_window = 3
    assert join(subject.get_decoder(), IDS, MASK) is None
    (found,) = hidden_states(subject, input_ids=IDS, attention_mask=MASK)
    torch.testing.assert_close(found, subject.get_decoder()(input_ids=IDS).last_hidden_state)


def test_a_window_of_nothing_is_none():
    subject = model("llama")
    subject.config.sliding_window = 0  # as Qwen2-MoE says it
    assert sliding_window(subject) is None and join(subject.get_decoder(), IDS, MASK) is not None


def test_layers_that_do_not_hold_the_configuration_are_no_attention():
    subject = model("llama")
    layers(subject.get_decoder())[0].layer_idx = 0
    assert join(subject.get_decoder(), IDS, MASK) is not None


def test_what_is_right_joined_and_wrong_with_the_last_layer_narrowed_is_padded(monkeypatch):
    subject = model("llama")
    monkeypatch.setattr(
        joined, "hidden_at", lambda decoder, places, **inputs: 2 * last_layer.hidden_at(decoder, places, **inputs)
    )
    assert join(subject.get_decoder(), IDS, MASK) is None
    assert all(part.config is subject.get_decoder().config for part in subject.modules() if "layer_idx" in vars(part))


def test_attention_that_makes_a_mask_of_its_own_is_padded(caplog):
    """Doge learns one; untrained it changes no output, so that only its gradient would be missed."""
    config = DogeConfig(**SIZES, head_dim=8)
    torch.manual_seed(0)
    subject = DogeForCausalLM(config)
    with caplog.at_level(logging.INFO, logger="clbench"):
        assert join(subject.get_decoder(), IDS, MASK) is None
    assert "its attention makes a mask of its own" in caplog.messages[-1]
