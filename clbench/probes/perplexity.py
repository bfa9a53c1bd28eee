"""Perplexity drift on text the model knew: the whole text in fixed windows, weighted by token, normalised by word and by byte.

Every token is predicted once, with at least one token of context; windows never overlap, so two models are compared on equal terms.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

from clbench.protocols import Probe
from clbench.stream import Stream
from clbench.student import Student
from clbench.types import Score


class Perplexity(Probe):
    """Likelihood of `texts` (documents). `window` is in tokens; `task` names the text in the ledger."""

    def __init__(self, *, name: str, task: str, texts: Sequence[str], window: int) -> None:
        self.name = name
        self.task = task
        self.texts = tuple(texts)
        self.window = window

    def measure(self, student: Student, stream: Stream, stage: int) -> Iterator[Score]:
        """Mean nats per token (with per-document items), token and word perplexity, bits per byte."""
        started = time.perf_counter()
        encoded = [tuple(student.encoder.text(text)) for text in self.texts]
        nll = student.window_nll(encoded, window=self.window)
        total, tokens = math.fsum(nll), sum(len(ids) for ids in encoded)
        words = sum(len(text.split()) for text in self.texts)
        size = sum(len(text.encode()) for text in self.texts)
        seconds = time.perf_counter() - started
        for metric, value, n in (
            ("nll_token", total / tokens, tokens),
            ("token_perplexity", math.exp(total / tokens), tokens),
            ("word_perplexity", math.exp(min(total / words, 700.0)), words),
            ("bits_per_byte", total / size / math.log(2), size),
        ):
            yield Score(
                stage=stage,
                stage_name=stream.stages[stage - 1].name if stage else "base",
                probe=self.name,
                task=self.task,
                metric=metric,
                value=value,
                n=n,
                stderr=math.nan,
                seconds=seconds,
                items=tuple(nll) if metric == "nll_token" else (),
            )
            seconds = 0.0
