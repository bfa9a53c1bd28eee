"""How near to the machine's own limit: operations a second of training and scoring, those that cannot be saved, over those of matrix products."""

import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from baselines.seq import Seq
from clbench.config import TrainConfig
from clbench.data.encoder import Encoder
from clbench.examine.student import Student
from clbench.models.weights import trainable
from clbench.train import optimizer as optim
from clbench.train.local import LocalEngine
from clbench.train.loop import train_step
from clbench.types import Example
from tests.benchmarks.models import random_llama, words
from tests.benchmarks.race import Figure, spread, timed
from tests.benchmarks.training import LORA

HIDDEN, LAYERS, LENGTH, ROWS, VOCABULARY, REPETITIONS = 1024, 4, 512, 4, 32_000, 3


def peak() -> float:
    """Operations a second of a matrix product of the shapes that the model multiplies: the best of several."""
    left, right = torch.randn(2 * LENGTH, HIDDEN), torch.randn(HIDDEN, 3 * HIDDEN)
    operations = 2 * left.shape[0] * HIDDEN * 3 * HIDDEN
    return max(operations / timed(lambda: left @ right, cpu)[0] for _ in range(20))


def cpu() -> float:
    """CPU seconds of this process."""
    return time.process_time()


def achieved(work: Callable[[], object], operations: float) -> tuple[list[float], float]:
    """CPU seconds of each repetition, and the share of the peak, measured beside each."""
    seconds, shares = [], []
    for _ in range(REPETITIONS):
        before = peak()
        taken, _ = timed(work, cpu)
        seconds.append(taken)
        shares.append(operations / taken / max(before, peak()))
    return seconds, statistics.median(shares)


def run() -> Iterator[Figure]:
    """Training with LoRA on answers of half the sequence; scoring sequences of that length, no two alike."""
    model = random_llama(VOCABULARY, hidden=HIDDEN, layers=LAYERS)
    layer = sum(tensor.numel() for tensor in model.get_decoder().layers[0].parameters())
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=rng).tolist()
    tokens, answers = ROWS * LENGTH, ROWS * 16
    attention = 4 * HIDDEN * LENGTH / 2  # per token and layer: two products with the half of the tokens before it
    head = HIDDEN * VOCABULARY
    forward = tokens * LAYERS * (2 * layer + attention) + answers * 2 * head
    student = Student(model, Encoder(words(VOCABULARY), max_length=LENGTH + 1))
    pairs = [(tuple(row[: LENGTH - 15]), tuple(row[LENGTH - 15 :]) + (5,)) for row in ids]
    yield share("scoring", achieved(lambda: student.log_likelihoods(pairs), forward))

    adapted = LORA.add(model, seed=0).train()
    config = TrainConfig(steps=1, batch_size=ROWS)
    encoder = Encoder(words(VOCABULARY), max_length=LENGTH)
    rows = [
        (Example(id=str(n), prompt=text(row[: LENGTH - 18]), answer=text(row[LENGTH - 18 : LENGTH - 2])), 0, 1.0)
        for n, row in enumerate(ids)
    ]

    def step() -> None:
        optimizer = optim.optimizer(trainable(adapted), config, {})
        schedule = optim.schedule(optimizer, config, steps=1)
        engine = LocalEngine(adapted, optimizer=optimizer, schedule=schedule, clip=1.0)
        train_step(rows, method=Seq(lora=LORA, seed=0), engine=engine, encoder=encoder, config=config)

    # Backward: gradients of activations cost what the forward does, attention's 2.5 times; frozen weights get none, nor do the embeddings, so
    # that the first layer's queries, keys and values pass nothing on.
    backward = tokens * (LAYERS * (2 * layer + 2.5 * attention) - 6 * HIDDEN**2) + answers * 2 * head
    yield share("training", achieved(step, forward + backward))


def text(ids: list[int]) -> str:
    """Words that have these ids."""
    return " ".join(f"w{token}" for token in ids)


def share(work: str, found: tuple[list[float], float]) -> Figure:
    """The row of a share of the peak."""
    seconds, ratio = found
    return Figure(
        benchmark="limit",
        case=f"{work}, hidden {HIDDEN}, {LAYERS} layers, length {LENGTH}",
        peer="matrix product",
        unit="share of operations a second",
        ours=statistics.median(seconds),
        ours_spread=spread(seconds),
        theirs=math.nan,
        theirs_spread=math.nan,
        ratio=ratio,
        wanted=">= 0.6",
        difference="",
    )
