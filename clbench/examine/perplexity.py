"""Likelihood of text the model knew: over all its tokens, and over its texts.

`Perplexity` reads whole texts in fixed windows, weighs tokens equally and normalises by token, word and byte. Every token is predicted
once, as in lm-eval's rolling log-likelihood (`probes.rolling`), so two models are compared on equal terms. `MeanTextLoss` reads the
beginning of a few texts and weighs texts equally: a cheap twin whose items, one a text, pair.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from clbench.examine.matrix import item_score
from clbench.examine.rolling import rolling_nll
from clbench.examine.student import Student
from clbench.examine.text import TextProbe
from clbench.protocols import Stream
from clbench.types import Score


class Perplexity(TextProbe):
    """Likelihood of `texts` (documents) in windows of `window` tokens."""

    def __init__(self, *, window: int, **text: Any) -> None:
        super().__init__(**text)
        self.window = window

    def measure(self, student: Student, stream: Stream, stage: int) -> Iterator[Score]:
        """Mean nats per token (its items: each document's total nats), token and word perplexity, bits per byte."""
        started = time.perf_counter()
        encoded = [student.encoder.prompt(text)[1:] for text in self.texts]
        nll = rolling_nll(student, encoded, window=self.window)
        total, tokens = math.fsum(nll), sum(len(ids) for ids in encoded)
        words = sum(len(text.split()) for text in self.texts)
        size = sum(len(text.encode()) for text in self.texts)
        seconds = time.perf_counter() - started
        for metric, value, n in (
            ("nll_token", total / tokens, tokens),
            ("token_perplexity", exponential(total / tokens), tokens),
            ("word_perplexity", exponential(total / words), words),
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


class MeanTextLoss(TextProbe):
    """Mean cross-entropy of each of the first `max_texts` texts, cut to its first `max_tokens` tokens; then the mean over texts.

    After the forgetting column of PEFT's method comparison, which weighs tokens equally; here texts weigh equally, so a text is an item. Fewer texts
    than `max_texts` are all read, and the score's n says how many there were. BOS is read before the first token and does not count.
    """

    def __init__(self, *, texts: Sequence[str], max_texts: int = 100, max_tokens: int = 768, **text: Any) -> None:
        super().__init__(texts=texts[:max_texts], **text)
        self.max_tokens = max_tokens

    def measure(self, student: Student, stream: Stream, stage: int) -> Iterator[Score]:
        """`mean_text_nll` in nats per token, its items one a text."""
        started = time.perf_counter()
        beginnings = [student.encoder.prompt(text)[1 : self.max_tokens + 1] for text in self.texts]
        nll = rolling_nll(student, beginnings, window=self.max_tokens)
        yield item_score(
            stage,
            stream.stages[stage - 1].name if stage else "base",
            self.name,
            self.task,
            "mean_text_nll",
            [total / len(ids) for total, ids in zip(nll, beginnings, strict=True)],
            seconds=time.perf_counter() - started,
        )


def exponential(exponent: float) -> float:
    """e to the `exponent`, infinite beyond what a float holds."""
    return math.exp(exponent) if exponent < 709 else math.inf
