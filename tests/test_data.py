"""Batches, draws and memories, against numbers worked out by hand."""

from collections import Counter

import pytest
import torch

from clbench.data.encoder import Encoder, clip_left
from clbench.data.memory import Memory
from clbench.data.rows import DatasetSpec, load_rows
from clbench.data.sampling import draw, epoch_indices, generator
from clbench.models.tiny import bpe_tokenizer
from clbench.types import IGNORED, Example, Source, UserMistake


class Words:
    """A tokenizer of whole words: ids from 3 in order of appearance; 0 pads, 1 begins, 2 ends."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self):
        self.ids = {"?": 2}

    def __call__(self, text, add_special_tokens, split_special_tokens):
        assert split_special_tokens
        begin = [self.bos_token_id] if add_special_tokens else []
        return {"input_ids": begin + [self.ids.setdefault(word, len(self.ids) + 2) for word in text.split()]}


def example(prompt: str, answer: str) -> Example:
    return Example(id=prompt, prompt=prompt, answer=answer)


def test_labels_hold_the_answer_and_its_end_only():
    batch = Encoder(Words(), max_length=16).collate([example("a b", "c"), example("a", "d e")])
    assert batch.input_ids.tolist() == [[1, 4, 5, 3, 2], [1, 4, 6, 7, 2]]  # answers are met first
    assert batch.labels.tolist() == [[IGNORED] * 3 + [3, 2], [IGNORED] * 2 + [6, 7, 2]]
    assert batch.attention_mask.sum().item() == 10


def test_every_answer_token_of_a_batch_weighs_the_same():
    batch = Encoder(Words(), max_length=16).collate([example("a b", "c"), example("a", "d e")])
    assert batch.weights.tolist() == pytest.approx([1 / 5, 1 / 5])  # answers with EOS: 2 + 3 tokens


def test_sources_weigh_by_their_own_token_means():
    encoder = Encoder(Words(), max_length=16)
    rows = [(example("a", "b"), 0, 1.0), (example("a", "c d e"), 1, 3.0)]  # 2 and 4 answer tokens; weights 1/4 and 3/4
    (batch,) = encoder.micro_batches(rows, rows=2)
    assert batch.weights.tolist() == pytest.approx([1 / 4 / 2, 3 / 4 / 4])
    assert batch.sources.tolist() == [0, 1]
    assert batch.source_tokens == (4, 6)  # BOS, prompt, answer, EOS


def test_micro_batches_keep_to_their_rows_and_tokens_and_change_no_weight():
    encoder = Encoder(Words(), max_length=32)
    rows = [(Example(id=str(i), prompt="a " * n, answer="b"), 0, 1.0) for i, n in enumerate((9, 1, 1, 5, 2, 20))]
    lengths = [len(encoder.example(example).ids) for example, _, _ in rows]
    assert lengths == [12, 4, 4, 8, 5, 23]
    parts = encoder.micro_batches(rows, rows=3, tokens=16)
    # By length: 4 + 4 + 5 tokens; 8 and 12 would be 20; 23 is more than 16 by itself.
    assert [tuple(part.input_ids.shape) for part in parts] == [(3, 5), (1, 8), (1, 12), (1, 23)]
    (whole,) = encoder.micro_batches(rows, rows=6)
    assert sorted(torch.cat([part.weights for part in parts]).tolist()) == sorted(whole.weights.tolist())


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (2, 1), (3, 2), (16, 4)])
def test_micro_batches_and_ranks_change_no_weight(micro, ranks):
    encoder = Encoder(Words(), max_length=16)
    rows = [(example("a " * (1 + i % 4), "b " * (1 + i % 3)), i % 2, 1.0) for i in range(12)]
    whole = Counter()
    (batch,) = encoder.micro_batches(rows, rows=12)
    for weight, labels in zip(batch.weights.tolist(), batch.labels, strict=True):
        whole[round(weight, 7), int((labels != IGNORED).sum())] += 1
    split = Counter()
    for rank in range(ranks):
        for part in encoder.micro_batches(rows, rows=micro, rank=rank, world_size=ranks):
            assert part.source_tokens == batch.source_tokens
            for weight, labels in zip(part.weights.tolist(), part.labels, strict=True):
                split[round(weight, 7), int((labels != IGNORED).sum())] += 1
    assert split == whole


def test_a_long_prompt_loses_its_left_and_keeps_bos_and_answer():
    encoded = Encoder(Words(), max_length=6).example(example("a b c d e f", "g"))
    assert encoded.ids == (1, 7, 8, 9, 3, 2)  # BOS, d e f, g (met first), EOS
    assert clip_left((1, 2, 3, 4), 3) == (1, 3, 4)
    assert clip_left((1, 2, 3, 4), 1) == (1,)


def test_a_prompt_cut_in_its_middle_keeps_both_ends():
    encoder = Encoder(Words(), max_length=7, cut="middle")
    encoded = encoder.example(example("a b c d e f", "g"))
    # BOS a b, then e f (g is met first: id 3), g, EOS.
    assert encoded.ids == (1, 4, 5, 8, 9, 3, 2) and encoded.answer_start == 5
    assert encoder.lost(example("a b c d e f", "g")) == 2 and encoder.lost(example("a b c d", "g")) == 0
    assert [encoder.clipped((1, 2, 3, 4, 5), length) for length in (5, 4, 3, 2, 1)] == [
        (1, 2, 3, 4, 5),
        (1, 2, 4, 5),
        (1, 2, 5),
        (1, 5),
        (1,),
    ]


def test_an_epoch_passes_every_example_once():
    first = epoch_indices(10, start=0, count=10, seed=0, stage=1)
    assert sorted(first) == list(range(10))
    assert [
        *epoch_indices(10, start=0, count=6, seed=0, stage=1),
        *epoch_indices(10, start=6, count=4, seed=0, stage=1),
    ] == first
    assert epoch_indices(10, start=10, count=10, seed=0, stage=1) != first


def test_a_draw_depends_on_seed_stage_and_step_alone():
    sources = [
        Source(examples=[example(str(i), "x") for i in range(20)]),
        Source(examples=[example(f"m{i}", "x") for i in range(5)], share=0.5),
    ]

    def drawn(**changed):
        arguments = {"batch_size": 8, "step": 3, "seed": 1, "stage": 2} | changed
        return [(row[0].id, row[1]) for row in draw(sources, **arguments)]

    assert drawn() == drawn()
    assert Counter(source for _, source in drawn()) == {0: 8, 1: 4}
    assert drawn() != drawn(seed=2) and drawn() != drawn(stage=3) and drawn() != drawn(step=4)


def test_replay_leaves_the_order_of_the_current_task_alone():
    current = Source(examples=[example(str(i), "x") for i in range(20)])
    memory = Source(examples=[example("m", "x")])
    alone = draw([current], batch_size=8, step=0, seed=0, stage=1)
    mixed = draw([current, memory], batch_size=8, step=0, seed=0, stage=1)
    assert [row[0] for row in mixed[:8]] == [row[0] for row in alone]


def test_generators_are_named():
    first = torch.rand(3, generator=generator(0, "a", 1))
    assert torch.equal(first, torch.rand(3, generator=generator(0, "a", 1)))
    for other in (generator(1, "a", 1), generator(0, "b", 1), generator(0, "a", 2)):
        assert not torch.equal(first, torch.rand(3, generator=other))


def test_a_reservoir_keeps_every_item_with_equal_probability():
    items, capacity, trials = 12, 4, 3000
    kept = Counter()
    for seed in range(trials):
        memory = Memory()
        for stage in (1, 2):  # offered in two stages
            memory.reservoir(
                [example(f"{stage}/{i}", "x") for i in range(items // 2)], capacity=capacity, seed=seed, stage=stage
            )
        assert len(memory.examples) == capacity
        kept.update(held.id for held in memory.examples)
    expected = trials * capacity / items  # 1000; standard deviation 25.8
    assert len(kept) == items
    assert all(abs(count - expected) < 4.5 * 25.8 for count in kept.values()), kept


def test_memory_survives_its_own_text():
    memory = Memory()
    memory.keep(
        [Example(id="ä", prompt="p\n", answer="a", choices=("a", "b"), references=("c",)) for _ in range(3)],
        count=2,
        seed=0,
        stage=1,
    )
    copy = Memory()
    copy.restore(memory.state())
    assert copy == memory


def test_rows_come_from_the_folder_or_are_a_mistake(tmp_path):
    spec = DatasetSpec(name="toy", hub="nobody/toy")
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "train.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    assert load_rows(spec, split="train", data_dir=str(tmp_path)) == [{"a": 1}, {"a": 2}]
    with pytest.raises(UserMistake, match="toy/test.jsonl"):
        load_rows(spec, split="test", data_dir=str(tmp_path))


def test_a_special_token_spelled_out_in_a_text_is_plain_text():
    tokenizer = bpe_tokenizer(["a program ends in a line"], 300)
    ids = Encoder(tokenizer, max_length=64).prompt("<s> import re </s>")
    assert ids[0] == tokenizer.bos_token_id
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:])
    assert tokenizer.decode(ids[1:]) == "<s> import re </s>"
