"""How far the model's predictions have moved on fixed text: KL(untouched || now) in nats per token.

Accuracy says whether answers survive, this says whether the distribution behind them does, on text that no task asks about. The
untouched model's log-probabilities over the whole vocabulary are kept once, at a few hundred positions, in float32 on the CPU (256
positions of 128,256 tokens: 131 MB). Each position reads its text from the start of its window, after one BOS, and no further than
itself, so that no [batch, length, vocabulary] tensor ever exists.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clbench.examine.matrix import item_score
from clbench.examine.student import Student
from clbench.examine.text import TextProbe
from clbench.protocols import Stream
from clbench.types import Score

CHUNK = 32
"""Positions whose distributions are in memory at a time."""


class Divergence(TextProbe):
    """KL divergence at `positions` evenly spaced tokens of `texts`, read in windows of `window` tokens."""

    def __init__(self, *, window: int, positions: int = 256, **text: Any) -> None:
        super().__init__(**text)
        self.window = window
        self.positions = positions
        self.base: list[Tensor] = []

    def begin(self, student: Student) -> None:
        """Keeps the untouched model's log-probabilities. Adapters may just have been added in training mode, with dropout."""
        student.model.eval()
        self.base = [log_probs_NV.cpu() for log_probs_NV in self.log_probs(student)]

    @torch.inference_mode()
    def measure(self, student: Student, stream: Stream, stage: int) -> Iterator[Score]:
        """`kl_token`: the mean over positions, in nats; its items are the positions in the order of the text."""
        started = time.perf_counter()
        assert self.base, "begin(student) must see the untouched model before any stage"
        found = []
        for base_NV, now_NV in zip(self.base, self.log_probs(student), strict=True):
            before_NV = base_NV.to(now_NV.device)
            found.append((before_NV.exp() * (before_NV - now_NV)).sum(-1))
        yield item_score(
            stage,
            stream.stages[stage - 1].name if stage else "base",
            self.name,
            self.task,
            "kl_token",
            torch.cat(found).tolist(),
            seconds=time.perf_counter() - started,
        )

    def log_probs(self, student: Student) -> Iterator[Tensor]:
        """Log-probabilities [N, V] of the token after each context, in chunks of at most CHUNK contexts, in the order of the text."""
        contexts = self.contexts(student)
        for first in range(0, len(contexts), CHUNK):
            chunk = contexts[first : first + CHUNK]
            yield torch.cat(student.log_probs([(ids, [len(ids) - 1]) for ids in chunk]))

    def contexts(self, student: Student) -> list[tuple[int, ...]]:
        """What is read before each chosen token: BOS and the tokens of its window so far.

        All tokens of the texts in a row are cut into `positions` equal spans, and each span's middle token is chosen; all where there are fewer.
        """
        bos = student.encoder.tokenizer.bos_token_id
        texts = [student.encoder.prompt(text)[1:] for text in self.texts]
        places = [(ids, index) for ids in texts for index in range(len(ids))]
        count = min(self.positions, len(places))
        chosen = [places[(2 * k + 1) * len(places) // (2 * count)] for k in range(count)]
        return [(bos, *ids[index - index % self.window : index]) for ids, index in chosen]
