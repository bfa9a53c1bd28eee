"""Probes of running text: how likely it is, and how far the model's predictions on it have moved.

`Perplexity` reads whole texts in fixed windows, weighs tokens equally and normalises by token, word and byte. Every token is predicted
once, as in lm-eval's rolling log-likelihood, so two models are compared on equal terms. `MeanTextLoss` reads the beginning of a few texts and
weighs texts equally: a cheap twin whose items, one a text, pair. `Divergence` says whether the distribution behind the answers survives.

>>> list(windows((5, 6, 7, 8, 9), bos=0, length=3))
[((0,), (5, 6, 7)), ((6, 7), (8, 9))]
"""

import math
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clbench.data.encoder import Ids
from clbench.data.rows import DatasetSpec
from clbench.examine.scores import Found, mean, scores
from clbench.examine.student import Student
from clbench.protocols import Probe, Stream
from clbench.types import Score


@dataclass(kw_only=True, eq=False)
class TextProbe(Probe):
    """A probe of `texts`. `task` names them in the ledger, `dataset` says where they come from (None: they are made here)."""

    name: str
    task: str
    texts: Sequence[str]
    dataset: DatasetSpec | None = None

    def datasets(self) -> Sequence[DatasetSpec]:
        return () if self.dataset is None else (self.dataset,)

    def documents(self) -> Mapping[str, Sequence[str]]:
        return {self.task: self.texts}

    def measure(self, student: Student, stream: Stream, stage: int) -> Iterator[Score]:
        """What `find` finds."""
        started = time.perf_counter()
        found = self.find(student)
        seconds = time.perf_counter() - started
        yield from scores(found, stream=stream, stage=stage, probe=self.name, task=self.task, seconds=seconds)

    @abstractmethod
    def find(self, student: Student) -> Mapping[str, Found]:
        """The metrics of the texts by name."""


@dataclass(kw_only=True, eq=False)
class Perplexity(TextProbe):
    """Likelihood of `texts` (documents) in windows of `window` tokens."""

    window: int

    def find(self, student: Student) -> Mapping[str, Found]:
        """Mean nats per token (its items: each document's total nats), token and word perplexity, bits per byte."""
        encoded = [student.encoder.prompt(text)[1:] for text in self.texts]
        nll = rolling_nll(student, encoded, window=self.window)
        total, tokens = math.fsum(nll), sum(map(len, encoded))
        words = sum(len(text.split()) for text in self.texts)
        size = sum(len(text.encode()) for text in self.texts)
        return {
            "nll_token": Found(total / tokens, tokens, items=tuple(nll)),
            "token_perplexity": Found(exponential(total / tokens), tokens),
            "word_perplexity": Found(exponential(total / words), words),
            "bits_per_byte": Found(total / size / math.log(2), size),
        }


@dataclass(kw_only=True, eq=False)
class MeanTextLoss(TextProbe):
    """Mean cross-entropy of each of the first `max_texts` texts, cut to its first `max_tokens` tokens; then the mean over texts.

    After the forgetting column of PEFT's method comparison, which weighs tokens equally; here texts weigh equally, so a text is an item. Fewer texts
    than `max_texts` are all read, and the score's n says how many there were. BOS is read before the first token and does not count.
    """

    max_texts: int = 100
    max_tokens: int = 768

    def __post_init__(self) -> None:
        self.texts = self.texts[: self.max_texts]

    def find(self, student: Student) -> Mapping[str, Found]:
        """`mean_text_nll` in nats per token, its items one a text."""
        beginnings = [student.encoder.prompt(text)[1 : self.max_tokens + 1] for text in self.texts]
        nll = rolling_nll(student, beginnings, window=self.max_tokens)
        return {"mean_text_nll": mean([total / len(ids) for total, ids in zip(nll, beginnings, strict=True)])}


@dataclass(kw_only=True, eq=False)
class Divergence(TextProbe):
    """KL(untouched || now) at `positions` evenly spaced tokens of `texts`, read in windows of `window` tokens.

    The untouched model's log-probabilities over the whole vocabulary are kept once, in float32 on the CPU (256 positions of 128,256 tokens:
    131 MB). What is predicted at a position follows BOS and the tokens of its window so far.
    """

    window: int
    positions: int = 256
    untouched: list[Tensor] = field(default_factory=list, init=False)

    def begin(self, student: Student) -> None:
        """Keeps the untouched model's log-probabilities. Adapters may just have been added in training mode, with dropout."""
        student.model.eval()
        self.untouched = [log_probs_NV.cpu() for log_probs_NV in student.log_probs(self.chosen(student))]

    @torch.inference_mode()
    def find(self, student: Student) -> Mapping[str, Found]:
        """`kl_token`: the mean over positions, in nats; its items are the positions in the order of the text."""
        assert self.untouched, "begin(student) must see the untouched model before any stage"
        moved: list[float] = []
        for kept_NV, now_NV in zip(self.untouched, student.log_probs(self.chosen(student)), strict=True):
            before_NV = kept_NV.to(now_NV.device)
            moved += (before_NV.exp() * (before_NV - now_NV)).sum(-1).tolist()
        return {"kl_token": mean(moved)}

    def chosen(self, student: Student) -> list[tuple[Ids, list[int]]]:
        """The windows with a chosen token: BOS and the tokens before the last chosen one, and the places that predict the chosen ones.

        All tokens of the texts in a row are cut into `positions` equal spans, and each span's middle token is chosen; all where there are fewer.
        """
        bos = student.encoder.tokenizer.bos_token_id
        texts = [student.encoder.prompt(text)[1:] for text in self.texts]
        tokens = [(number, index) for number, ids in enumerate(texts) for index in range(len(ids))]
        count = min(self.positions, len(tokens))
        places: dict[tuple[int, int], list[int]] = {}
        for k in range(count):
            number, index = tokens[(2 * k + 1) * len(tokens) // (2 * count)]
            places.setdefault((number, index - index % self.window), []).append(index % self.window)
        return [((bos, *texts[number][start : start + at[-1]]), at) for (number, start), at in places.items()]


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
    read = [list(windows(ids, bos=bos, length=window)) for ids in texts]
    scored = iter(student.log_likelihoods([pair for pairs in read for pair in pairs], max_length=window))
    return [-sum(next(scored)[0] for _ in pairs) for pairs in read]


def exponential(exponent: float) -> float:
    """e to the `exponent`, infinite beyond what a float holds."""
    return math.exp(exponent) if exponent < 709 else math.inf
