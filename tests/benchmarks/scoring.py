"""Scoring multiple-choice items: ours against lm-eval's HFLM at its best batch size, on the same requests."""

import statistics
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from lm_eval.models.huggingface import HFLM

from clbench.data.encoder import Encoder
from clbench.examine.student import Student
from tests.benchmarks.models import Subject, llama, words
from tests.benchmarks.race import Figure, fastest, figure, race, value

Ids = tuple[int, ...]
Shape = tuple[int, int, tuple[int, int], tuple[int, int]]
SHAPES = {
    "ARC-like": (80, 0, (20, 50), (2, 8)),
    "HellaSwag-like": (50, 0, (40, 100), (20, 40)),
    "MMLU-like, few-shot": (20, 600, (40, 100), (1, 1)),
    "few-shot, several tokens": (12, 600, (30, 60), (3, 10)),
}
"""Items, tokens of the shared few-shot examples, tokens of a question (from, to), tokens of each of four options (from, to)."""
VOCABULARIES = {512: (3, ">= 4 (geometric mean)"), 32_000: (3, ">= 8 (geometric mean)"), 128_000: (2, "-")}
"""Repetitions, and the ratio wanted."""
SIZES = (1, 2, 4, 8, 16, 32)
"""Rows of a forward of the peer, of which the fastest is raced."""
LOGITS = 720_000_000
"""Most logits of a forward of the peer, which holds them twice: 2.9 GB in float32."""


def requests(shape: Shape, vocabulary: int) -> list[tuple[Ids, Ids]]:
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


def equal(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]], *, most: float = 1e-4) -> float:
    """The largest difference of log-likelihoods, at most `most`; which option is likeliest, and what is greedy, must be the same."""
    gap = max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True))
    assert gap <= most, gap
    assert [a[1] for a in ours] == [b[1] for b in theirs]
    assert likeliest(ours) == likeliest(theirs)
    return gap


def likeliest(scored: list[tuple[float, bool]]) -> list[int]:
    """The likeliest of each item's four options."""
    items = [scored[start : start + 4] for start in range(0, len(scored), 4)]
    return [max(range(4), key=lambda option: item[option][0]) for item in items]


def run() -> Iterator[Figure]:
    """A figure for each vocabulary and shape, and the geometric mean of each vocabulary."""
    for vocabulary, (repetitions, wanted) in VOCABULARIES.items():
        yield from raced(llama(vocabulary), each=">= 2", wanted=wanted, repetitions=repetitions)


def raced(
    subject: Subject,
    *,
    shapes: Mapping[str, Shape] = SHAPES,
    each: str,
    wanted: str,
    repetitions: int,
    tried: int | None = None,
    most: float = 1e-4,
) -> Iterator[Figure]:
    """A figure for each shape, and their geometric mean; sizes of the peer are tried on the first `tried` requests, None: on all."""
    model, tokenizer = subject.make(), words(subject.vocabulary)
    student = Student(model, Encoder(tokenizer, max_length=2048))
    ratios = []
    for name, shape in shapes.items():
        pairs = requests(shape, subject.vocabulary)
        theirs = [(("", str(n)), list(context), list(option)) for n, (context, option) in enumerate(pairs)]
        longest = max(len(context) + len(option) for context, option in pairs)
        peers = {
            f"lm-eval HFLM, batch {size}": HFLM(
                pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=2048, device="cpu"
            )._loglikelihood_tokens
            for size in SIZES
            if size == 1 or size * longest * subject.vocabulary <= LOGITS and size <= (tried or len(pairs))
        }
        best = fastest({label: partial(peer, theirs[:tried], disable_tqdm=True) for label, peer in peers.items()})
        found = figure(
            "scoring",
            f"{name}, {subject.name}",
            raced=race(
                partial(student.log_likelihoods, pairs),
                {best: partial(peers[best], theirs, disable_tqdm=True)},
                same=partial(equal, most=most),
                repetitions=repetitions,
            ),
            wanted=each,
            unit="CPU seconds",
        )
        ratios.append(found.ratio)
        yield found
    yield value(
        "scoring",
        f"all four, {subject.name}",
        peer="lm-eval HFLM",
        unit="geometric mean of ratios",
        value=statistics.geometric_mean(ratios),
        wanted=wanted,
    )
