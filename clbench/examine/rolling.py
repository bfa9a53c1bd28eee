"""Running text read in windows: the log-likelihood of every token once, as lm-eval's rolling log-likelihood counts it.

>>> list(windows((5, 6, 7, 8, 9), bos=0, length=3))
[((0,), (5, 6, 7)), ((6, 7), (8, 9))]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from clbench.examine.student import Student

Ids = tuple[int, ...]


def windows(ids: Ids, *, bos: int, length: int) -> Iterator[tuple[Ids, Ids]]:
    """The (context, continuation) pairs whose continuations are `ids`, each read in one forward of at most `length` tokens.

    A full window has one token of context, BOS or the one before it; the last one, where it is short, is filled up with more of them.
    """
    yield (bos,), ids[:length]
    for start in range(length, len(ids), length):
        end = min(start + length, len(ids))
        yield ids[end - length - 1 : start], ids[start:end]


def rolling_nll(student: Student, texts: Sequence[Ids], *, window: int) -> list[float]:
    """Negative log-likelihood in nats of each text (its token ids without BOS; at least one) in windows of `window` tokens."""
    bos = student.encoder.tokenizer.bos_token_id
    pairs = [(index, pair) for index, ids in enumerate(texts) for pair in windows(ids, bos=bos, length=window)]
    scored = student.log_likelihoods([pair for _, pair in pairs], max_length=window)
    totals = [0.0] * len(texts)
    for (index, _), (value, _) in zip(pairs, scored, strict=True):
        totals[index] -= value
    return totals
