"""Greedy answers: ours against `generate` on batches of prompts as they come."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence

from clbench.data.encoder import Encoder
from clbench.examine.student import Student
from tests.benchmarks.models import random_llama, words
from tests.benchmarks.race import Figure, fastest, figure, race

PROMPTS, LENGTHS, NEW_TOKENS = 64, (20, 120), 64
SHAPES = {"prompts of their own": 0, "few-shot prompts": 300}
"""Tokens that all prompts begin with."""
EAGERNESS = {512: 2.0, 32_000: 2.6}
"""By how much EOS is likelier than a token of a random model is: enough for answers of different lengths, as trained models give."""


def stopping_model(vocabulary: int) -> Module:
    """A random Llama whose answers end at different lengths."""
    model = random_llama(vocabulary, spread=0.2)
    with torch.no_grad():
        model.get_output_embeddings().weight[1] *= EAGERNESS[vocabulary]
    return model


def prompts(vocabulary: int, shared: int) -> list[tuple[int, ...]]:
    """Random ones, in random order of length, that begin with the same `shared` tokens."""
    rng = torch.Generator().manual_seed(0)
    beginning = torch.randint(3, vocabulary, (shared,), generator=rng).tolist()
    lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (PROMPTS,), generator=rng).tolist()
    return [(0, *beginning, *torch.randint(3, vocabulary, (length,), generator=rng).tolist()) for length in lengths]


@torch.inference_mode()
def theirs(model: Module, rows: list[tuple[int, ...]], *, batch: int) -> list[list[int]]:
    """Batches as they come, padded on the left."""
    written = []
    for start in range(0, len(rows), batch):
        ids = pad_sequence([torch.tensor(row) for row in rows[start : start + batch]], True, 2, "left")
        found = model.generate(
            input_ids=ids,
            attention_mask=(ids != 2).long(),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=2,
        )
        for row in found[:, ids.shape[1] :].tolist():
            written.append(row[: row.index(1)] if 1 in row else row)
    return written


def equal(found: list[list[int]], expected: list[list[int]]) -> float:
    """How many answers differ: none may."""
    different = sum(a != b for a, b in zip(found, expected, strict=True))
    assert different == 0, f"{different} of {len(found)} answers differ"
    return 0.0


def run() -> Iterator[Figure]:
    """A figure for each vocabulary."""
    for vocabulary, (shape, shared) in itertools.product((512, 32_000), SHAPES.items()):
        model, rows = stopping_model(vocabulary), prompts(vocabulary, shared)
        student = Student(model, Encoder(words(vocabulary), max_length=2048))
        lengths = sorted(map(len, student.write(rows, max_new_tokens=NEW_TOKENS)))
        tried = {f"generate, batch {size}": partial(theirs, model, rows, batch=size) for size in (4, 8, 16, 32, 64)}
        best = fastest(tried)
        raced = race(
            partial(student.write, rows, max_new_tokens=NEW_TOKENS),
            {best: tried[best]},
            same=equal,
            repetitions=3,
        )
        case = f"{shape}, answers of {lengths[0]} to {lengths[-1]} tokens (median {lengths[len(lengths) // 2]})"
        yield figure("generation", f"{case}, vocabulary {vocabulary}", raced=raced, wanted=">= 2", unit="CPU seconds")
