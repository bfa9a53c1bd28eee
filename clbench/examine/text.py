"""A probe of running text: how likely it is, and how far the model's predictions on it have moved; every text is read once for all of it.

Texts are read in fixed windows, and every token is predicted once, as in lm-eval's rolling log-likelihood, so two models are compared on equal
terms. Perplexity weighs tokens equally and normalises by token, word and byte. `mean_text_nll` weighs texts equally: its items, one a text, pair. It
is after the forgetting column of PEFT's method comparison. Divergence says whether the distribution behind the answers survives.

>>> list(windows((5, 6, 7, 8, 9), bos=0, length=3))
[((0,), (5, 6, 7)), ((6, 7), (8, 9))]
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import PositiveInt
from torch import Tensor

from clbench.data.encoder import Encoder
from clbench.data.rows import DatasetSpec
from clbench.examine.scores import Found, mean, scores
from clbench.examine.student import Student
from clbench.protocols import Probe, Stream
from clbench.types import Ids, Score

FEWEST = 64
"""Tokens of a text that are worth reading, where the budget does not allow all of it."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Of each text its negative log-likelihood `nll` in nats; `log_probs_NV` of the vocabulary at the chosen tokens; how long it took."""

    nll: list[float]
    log_probs_NV: Tensor
    seconds: float


@dataclass(kw_only=True, eq=False)
class Text(Probe):
    """Likelihood of `texts` in windows of `window` tokens, and KL(untouched || now) at `positions` of their tokens, evenly spaced.

    At most `tokens` tokens are read (None: all), the same for every stage and method: see `beginnings`. `task` names the texts in the ledger,
    `dataset` says where they come from (None: they are made here). Rows of likelihood have the probe's name, the others "text_loss"
    (on request) and "divergence". The untouched model's log-probabilities are kept in float32 on the CPU (256 positions of 128,256 tokens: 131 MB).
    """

    name: str
    task: str
    texts: Sequence[str]
    window: PositiveInt
    tokens: PositiveInt | None = None
    positions: PositiveInt = 256
    text_loss: bool = False
    dataset: DatasetSpec | None = None
    read: list[str] = field(default_factory=list, init=False)
    untouched: Reading | None = field(default=None, init=False)

    def datasets(self) -> Sequence[DatasetSpec]:
        return () if self.dataset is None else (self.dataset,)

    def documents(self) -> Mapping[str, Sequence[str]]:
        return {self.task: self.texts}

    def longest(self, encoder: Encoder) -> int:
        return min(self.window, max(map(len, encode(beginnings(self.texts, encoder, most=self.tokens), encoder))))

    def begin(self, student: Student) -> None:
        """Reads with the untouched model. Adapters may just have been added in training mode, with dropout."""
        student.model.eval()
        self.read = beginnings(self.texts, student.encoder, most=self.tokens)
        self.untouched = self._reading(student)

    @torch.inference_mode()
    def measure(self, student: Student, stream: Stream, stage: int) -> Iterator[Score]:
        before = self.untouched
        assert before is not None, "begin(student) must see the untouched model before any stage"
        now = self._reading(student) if stage else before
        lengths = [len(ids) for ids in encode(self.read, student.encoder)]
        moved_N = (before.log_probs_NV.exp() * (before.log_probs_NV - now.log_probs_NV)).sum(-1)
        each = [total / length for total, length in zip(now.nll, lengths, strict=True)]
        rows = {
            self.name: likelihood(now.nll, self.read, tokens=sum(lengths)),
            "text_loss": {"mean_text_nll": mean(each)} if self.text_loss else {},
            "divergence": {"kl_token": mean(moved_N.tolist())},
        }
        seconds = now.seconds
        for probe, found in rows.items():
            yield from scores(found, stream=stream, stage=stage, probe=probe, task=self.task, seconds=seconds)
            seconds = 0.0

    def _reading(self, student: Student) -> Reading:
        student.about(self.name, self.task)
        started = time.perf_counter()
        texts = encode(self.read, student.encoder)
        nll, log_probs = read_windows(student, texts, window=self.window, chosen=self.chosen(sum(map(len, texts))))
        return Reading(nll=nll, log_probs_NV=torch.cat(log_probs), seconds=time.perf_counter() - started)

    def chosen(self, tokens: int) -> list[int]:
        """Which of so many tokens in a row are compared: the middle ones of `positions` equal spans; all where there are fewer."""
        count = min(self.positions, tokens)
        return [(2 * k + 1) * tokens // (2 * count) for k in range(count)]


def encode(texts: Sequence[str], encoder: Encoder) -> list[Ids]:
    """Each text's ids without BOS."""
    return [encoder.text(text) for text in texts]


def beginnings(texts: Sequence[str], encoder: Encoder, *, most: int | None) -> list[str]:
    """All texts, if they have at most `most` tokens together; else the beginnings of the first texts, to the end of a word.

    No beginning is longer than the others but where a text ends before; with too many texts for `FEWEST` tokens each, the last are left out.
    """
    lengths = [len(ids) for ids in encode(texts, encoder)]
    if most is None or sum(lengths) <= most:
        return list(texts)
    lengths = lengths[: max(1, most // FEWEST)]
    left, cap = most, most
    for number, length in enumerate(sorted(lengths)):
        cap = left // (len(lengths) - number)
        left -= min(length, cap)
    return [
        cut(text, encoder, most=cap) if length > cap else text for text, length in zip(texts, lengths, strict=False)
    ]


def cut(text: str, encoder: Encoder, *, most: int) -> str:
    """The longest beginning with at most `most` tokens that a few guesses find, to the end of a word where it has several."""
    while (count := len(encode([text], encoder)[0])) > most:
        end = len(text) * most // count
        text = text[: max(text.rfind(" ", 0, end), 0) or end]
    return text


def likelihood(nll: Sequence[float], texts: Sequence[str], *, tokens: int) -> dict[str, Found]:
    """The metrics of texts whose negative log-likelihoods in nats are `nll`."""
    total, words = math.fsum(nll), sum(len(text.split()) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    return {
        "nll_token": Found(total / tokens, tokens, items=tuple(nll)),
        "token_perplexity": Found(exponential(total / tokens), tokens),
        "word_perplexity": Found(exponential(total / words), words),
        "bits_per_byte": Found(total / size / math.log(2), size),
    }


def windows(ids: Ids, *, bos: int, length: int) -> Iterator[tuple[Ids, Ids]]:
    """The (context, continuation) pairs whose continuations are `ids`, each read in one forward of at most `length` tokens.

    A full window has one token of context, BOS or the one before it; the last one, where it is short, is filled up with more of them.
    """
    if ids:
        yield (bos,), ids[:length]
    for start in range(length, len(ids), length):
        end = min(start + length, len(ids))
        yield ids[end - length - 1 : start], ids[start:end]


def read_windows(
    student: Student, texts: Sequence[Ids], *, window: int, chosen: Sequence[int] = ()
) -> tuple[list[float], list[Tensor]]:
    """Each text's negative log-likelihood in nats, read in windows of `window` tokens, and log-probabilities of the vocabulary, by window.

    A text is its token ids without BOS. `chosen` are the tokens of all texts in a row whose distributions are wanted.
    """
    owners, requests, first = [], [], 0
    for number, ids in enumerate(texts):
        for context, continuation in windows(ids, bos=student.encoder.bos, length=window):
            last = first + len(continuation)
            requests.append((context, continuation, [token - first for token in chosen if first <= token < last]))
            owners.append(number)
            first = last
    nll, log_probs = [0.0] * len(texts), []
    for number, (value, _, rows_NV) in zip(owners, student.read(requests, max_length=window), strict=True):
        nll[number] -= value
        log_probs.append(rows_NV)
    return nll, log_probs


def exponential(exponent: float) -> float:
    """e to the `exponent`, infinite beyond what a float holds."""
    return math.exp(exponent) if exponent < 709 else math.inf
