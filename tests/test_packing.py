"""Reading many sequences at a time gives what reading each alone gives, on every family of models."""

import logging

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from clbench import packing, reading
from clbench.data import Encoder
from clbench.packing import Read, forwards, groups
from clbench.student import Student
from clbench.types import UserMistake
from tests.test_data import Words

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, SIZES),
    "llama, tied": (LlamaForCausalLM, LlamaConfig, SIZES | {"tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, SIZES),
    "qwen2, sliding": (
        Qwen2ForCausalLM,
        Qwen2Config,
        SIZES | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, SIZES | {"sliding_window": None}),
    "mistral, sliding": (MistralForCausalLM, MistralConfig, SIZES | {"sliding_window": 16}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, SIZES | {"sliding_window": 16, "head_dim": 8}),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "initializer_range": 0.3},
    ),
}


def model(name, **changes):
    kind, config, sizes = MODELS[name]
    torch.manual_seed(0)
    return kind(config(**sizes | changes)).eval()


def requests():
    """Continuations of one token and of several, of contexts that share 60 tokens, 10 or none but the first; one that begins another."""
    rng = torch.Generator().manual_seed(0)

    def draw(count):
        return tuple(torch.randint(3, 50, (count,), generator=rng).tolist())

    trunk, twig = (1, *draw(59)), draw(10)
    contexts = [
        (*trunk, *draw(9)),
        (*trunk, *draw(4)),
        (*trunk, *twig),
        (*trunk, *twig, *draw(6)),
        (1, *draw(12)),
        trunk,
    ]
    pairs = [(context, draw(count)) for context in contexts for count in (1, 1, 3, 7)]
    return [*pairs, (contexts[0], pairs[2][1][:2]), ((1,), draw(40)), ((1, *twig), draw(2)), pairs[3]]


def student(subject, **settings):
    return Student(subject, Encoder(Words(), max_length=256), **settings)


def differ(left, right):
    return max(abs(a[0] - b[0]) for a, b in zip(left, right, strict=True))


# Gemma2 caps attention's logits, which only the eager implementation can do.
@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, kind) for name in MODELS for kind in ("sdpa", "eager") if (name, kind) != ("gemma2", "sdpa")],
)
def test_packed_scores_are_those_of_plain_forwards_of_one_row_each(name, attention):
    subject = model(name)
    subject.set_attn_implementation(attention)
    assert reading.branches(subject, torch.device("cpu"))
    asked = requests()
    scored = student(subject, tokens_per_batch=300).log_likelihoods(asked)
    for (context, continuation), (value, greedy) in zip(asked, scored, strict=True):
        with torch.inference_mode():
            logits = subject(torch.tensor([[*context, *continuation]])).logits[0].float()
        log_probs = logits.log_softmax(-1)[len(context) - 1 : -1]
        assert value == pytest.approx(float(log_probs[range(len(continuation)), list(continuation)].sum()), abs=1e-4)
        assert greedy == (log_probs.argmax(-1).tolist() == list(continuation))


@pytest.mark.parametrize("name", MODELS)
def test_sharing_reads_fewer_tokens_and_neither_batch_nor_order_changes_a_score(name):
    subject, asked = model(name), requests()
    alone, together = student(subject, branching=False, tokens_per_batch=1), student(subject)
    plain = alone.log_likelihoods(asked)
    assert differ(together.log_likelihoods(asked), plain) < 1e-4
    assert differ(student(subject, tokens_per_batch=90).log_likelihoods(asked[::-1])[::-1], plain) < 1e-4
    assert together.tokens_scored < 0.3 * alone.tokens_scored


@pytest.mark.parametrize("name", MODELS)
def test_answers_written_together_are_those_of_plain_greedy_decoding(name):
    subject = model(name)
    prompts = [context for context, _ in requests()[::4]]
    plain = [greedy(subject, prompt, 20) for prompt in prompts]
    end = plain[0][3]  # so that rows end at different times
    expected = [ids[: ids.index(end)] if end in ids else ids for ids in plain]
    assert len({len(ids) for ids in expected}) > 1
    for count in (30, 4096):
        writer = student(subject, tokens_per_batch=count)
        writer.encoder.tokenizer.eos_token_id = end
        assert writer.write(prompts, max_new_tokens=20) == expected
    read = sum(len(ids) for ids in prompts) - 60 * 4 + sum(len(ids) for ids in expected)
    assert writer.tokens_scored <= read or subject.config.to_dict().get(
        "sliding_window"
    )  # the trunk of 60 is read once for five prompts


def greedy(subject, prompt, count):
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(subject(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_shared_beginning_is_read_once_and_every_branch_once():
    trunk = tuple(range(100, 150))
    asked = [((*trunk, 1, 2), (3, 4, 5)), ((*trunk, 1, 2), (3, 9)), ((*trunk, 8), (7,))]
    reads = student(model("llama")).reads(asked)
    # After the trunk of 50: 1 2 3 4, and 3 of the second continuation is there already; then 8.
    (group,) = groups(reads)
    assert [sorted(row.ids.tolist()) for row in group.rows] == [sorted([*trunk, 1, 2, 3, 4, 8])]
    two = [Read((*trunk, *range(200, 401)), 240), Read((*trunk, *range(500, 701)), 240), Read((1, 2), 1)]
    shared, rest = groups(two)
    assert (shared.shared, len(shared.rows), rest.shared) == (50, 2, 0)
    assert sum(found.tokens for found in forwards(shared, two, tokens_per_batch=250)) == 50 + 201 + 201


def test_a_token_sees_its_ancestors_and_itself():
    (group,) = groups([Read((1, 2, 3, 4), 2), Read((1, 2, 3, 9), 2)])
    (found,) = forwards(group, [Read((1, 2, 3, 4), 2), Read((1, 2, 3, 9), 2)], tokens_per_batch=100)
    expected = np.tri(5, dtype=bool)
    expected[4, 3] = False  # 9 does not see 4
    assert (found.sees_BTS[0] == expected).all()
    assert found.depths_BT.tolist() == [[0, 1, 2, 3, 3]]
    assert (found.wanted.tolist(), found.places.tolist()) == ([2, 3, 4], [0, 1, 0, 2])


def test_every_read_is_in_one_forward_whatever_is_shared(monkeypatch):
    rng = torch.Generator().manual_seed(1)
    for trial in range(30):
        monkeypatch.setattr(packing, "SHARED", trial % 4 + 1)
        monkeypatch.setattr(packing, "WIDEST", 8 + trial)
        lengths = torch.randint(1, 14, (25,), generator=rng).tolist()
        reads = []
        for length in lengths:
            ids = tuple(torch.randint(0, 2, (length,), generator=rng).tolist())
            reads.append(Read(ids, int(torch.randint(0, length, (), generator=rng))))
        seen = {}
        for group in groups(reads):
            for found in forwards(group, reads, tokens_per_batch=20):
                beginning = group.rows[0].ids[: group.shared].tolist()
                start = 0
                for index in found.members:
                    count = len(reads[index].ids) - reads[index].first
                    for offset in range(count):
                        place = found.wanted[found.places[start + offset]]
                        row, token = divmod(place, found.ids_BT.shape[1])
                        seen[index, reads[index].first + offset] = path(found, beginning, row, token)
                    start += count
        for index, read in enumerate(reads):
            for place in range(read.first, len(read.ids)):
                assert seen[index, place] == list(read.ids[: place + 1])


def path(found, beginning, row, token):
    """The ids that a token sees, itself last, in the order of their depths."""
    if found.sees_BTS is None:
        return found.ids_BT[row, : token + 1].tolist()
    ids, depths = [*beginning, *found.ids_BT[row].tolist()], [*range(len(beginning)), *found.depths_BT[row].tolist()]
    columns = np.flatnonzero(found.sees_BTS[row, token])
    assert [depths[column] for column in columns] == list(range(len(columns)))
    return [ids[column] for column in columns]


def test_no_more_logits_than_the_limit_exist_at_a_time(monkeypatch):
    import clbench.loss
    import clbench.student

    sizes = []
    project = clbench.student.project

    def spy(subject, hidden):
        sizes.append(hidden.shape[0] * 50)
        return project(subject, hidden)

    subject, asked = model("llama"), requests()
    expected = student(subject).log_likelihoods(asked)
    monkeypatch.setattr(clbench.student, "project", spy)
    monkeypatch.setattr(clbench.loss, "LOGITS", 400)
    assert differ(student(subject).log_likelihoods(asked), expected) < 1e-5
    assert max(sizes) <= 400 and len(sizes) > 5


def test_a_model_that_takes_no_trees_is_read_one_by_one_and_that_is_said(caplog):
    torch.manual_seed(0)
    subject = BloomForCausalLM(
        BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    ).eval()
    with caplog.at_level(logging.INFO, logger="clbench"):
        scored = student(subject).log_likelihoods(requests())
        student(subject).log_likelihoods(requests())
    assert [record.message for record in caplog.records] == [
        "BloomModel is read whole: its last layer cannot be read at some places alone",
        "BloomForCausalLM is read one continuation at a time: it does not take trees of tokens",
    ]
    assert differ(scored, student(subject, branching=False, tokens_per_batch=1).log_likelihoods(requests())) < 1e-4


def test_a_mask_that_shows_other_branches_is_not_used(monkeypatch):
    monkeypatch.setattr(
        packing, "sight", lambda row, *, shared, length: np.tri(length, shared + length, shared, dtype=bool)
    )
    assert not reading.branches(model("llama"), torch.device("cpu"))


def test_a_model_whose_logits_are_scaled_is_refused():
    torch.manual_seed(0)
    subject = CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)).eval()
    with pytest.raises(UserMistake, match="CohereForCausalLM does not make its logits"):
        student(subject).log_likelihoods([((1,), (2,))])
