"""Scoring multiple-choice items: ours against lm-eval's HFLM at its best batch size, on the same requests."""

import math
from collections.abc import Iterator
from functools import partial

import torch
from lm_eval.models.huggingface import HFLM

from clbench.data.encoder import Encoder
from clbench.examine.student import Student
from tests.benchmarks.models import random_llama, words
from tests.benchmarks.race import Figure, fastest, figure, race

Ids = tuple[int, ...]
SHAPES = {
    "ARC-like": (80, 0, (20, 50), (2, 8)),
    "HellaSwag-like": (50, 0, (40, 100), (20, 40)),
    "MMLU-like, few-shot": (20, 600, (40, 100), (1, 1)),
    "few-shot, several tokens": (12, 600, (30, 60), (3, 10)),
}
"""Items, tokens of the shared few-shot examples, tokens of a question (from, to), tokens of each of four options (from, to)."""
VOCABULARIES = {512: ">= 4 (geometric mean)", 32_000: ">= 8 (geometric mean)", 128_000: "-"}
BATCH_SIZES = {512: (1, 2, 4, 8, 16, 32), 32_000: (1, 2, 4, 8, 16, 32), 128_000: (1, 2, 4, 8)}
"""Rows of a forward of the peer, of which the fastest is raced. Its logits of 32 rows over the largest vocabulary, twice, would take 21 GB."""
REPETITIONS = {512: 3, 32_000: 3, 128_000: 2}


def requests(shape: tuple[int, int, tuple[int, int], tuple[int, int]], vocabulary: int) -> list[tuple[Ids, Ids]]:
    """Random (context, continuation) pairs; the options of an item share its context, the items their few-shot examples."""
    items, shared, question, option = shape
    rng = torch.Generator().manual_seed(0)

    def draw(bounds: tuple[int, int]) -> Ids:
        length = int(torch.randint(bounds[0], bounds[1] + 1, (), generator=rng))
        return tuple(torch.randint(3, vocabulary, (length,), generator=rng).tolist())

    beginning = draw((shared, shared))
    pairs = []
    for _ in range(items):
        context = (0, *beginning, *draw(question))
        pairs += [(context, draw(option)) for _ in range(4)]
    return pairs


def equal(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> float:
    """The largest difference of log-likelihoods, at most 1e-4; which option is likeliest, and what is greedy, must be the same."""
    gap = max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True))
    assert gap <= 1e-4, gap
    assert [a[1] for a in ours] == [b[1] for b in theirs]
    assert likeliest(ours) == likeliest(theirs)
    return gap


def likeliest(scored: list[tuple[float, bool]]) -> list[int]:
    """The likeliest of each item's four options."""
    items = [scored[start : start + 4] for start in range(0, len(scored), 4)]
    return [max(range(4), key=lambda option: item[option][0]) for item in items]


def run() -> Iterator[Figure]:
    """A figure for each vocabulary and shape, and the geometric mean of each vocabulary."""
    for vocabulary, wanted in VOCABULARIES.items():
        model, tokenizer = random_llama(vocabulary), words(vocabulary)
        student = Student(model, Encoder(tokenizer, max_length=2048))
        peers = {
            f"lm-eval HFLM, batch {size}": HFLM(
                pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=2048, device="cpu"
            )
            for size in BATCH_SIZES[vocabulary]
        }
        ratios = []
        for name, shape in SHAPES.items():
            pairs = requests(shape, vocabulary)
            theirs = [(("", str(n)), list(context), list(option)) for n, (context, option) in enumerate(pairs)]
            tried = {
                label: partial(peer._loglikelihood_tokens, theirs, disable_tqdm=True) for label, peer in peers.items()
            }
            best = fastest(tried)
            raced = race(
                partial(student.log_likelihoods, pairs),
                {best: tried[best]},
                same=equal,
                repetitions=REPETITIONS[vocabulary],
            )
            found = figure(
                "scoring", f"{name}, vocabulary {vocabulary}", raced=raced, wanted=">= 2", unit="CPU seconds"
            )
            ratios.append(found.ratio)
            yield found
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        yield Figure(
            benchmark="scoring",
            case=f"all four, vocabulary {vocabulary}",
            peer="lm-eval HFLM",
            unit="geometric mean of ratios",
            ours=math.nan,
            ours_spread=math.nan,
            theirs=math.nan,
            theirs_spread=math.nan,
            ratio=mean,
            wanted=wanted,
            difference="",
        )
