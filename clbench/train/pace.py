"""How long training takes on the machine at hand, by a short trial that changes nothing."""

import time
from collections.abc import Sequence
from itertools import cycle, islice
from statistics import median

import torch
from torch.nn import Module

from clbench.config import TrainConfig
from clbench.data.encoder import Encoder
from clbench.models.loss import answer_loss
from clbench.models.weights import trainable
from clbench.protocols import Method, Stage
from clbench.train.loop import micro_batches, plan_stage
from clbench.types import Example

TRIAL = 0.1
"""Seconds that a trial takes at least."""
ROWS = 64
"""Rows of a source whose lengths stand for all of them."""


def seconds_a_token(model: Module, encoder: Encoder, rows: Sequence[Example], config: TrainConfig) -> float:
    """Forward and backward on the first `rows`, a micro-batch after the other; the optimizer's step and what a method adds are not in it."""
    batches = micro_batches([(row, 0, 1.0) for row in rows[: config.batch_size]], encoder=encoder, config=config)
    wanted = list(trainable(model).values())
    taken: list[float] = []
    began = time.perf_counter()
    for batch in cycle(batches):
        started = time.perf_counter()
        gradients = torch.autograd.grad(answer_loss(model, batch), wanted, allow_unused=True)
        # Reading a number makes the host wait for the device.
        float(next(gradient for gradient in gradients if gradient is not None).flatten()[0])
        taken.append((time.perf_counter() - started) / int(batch.attention_mask.sum()))
        if len(taken) > 1 and time.perf_counter() - began > TRIAL:
            break
    # The first time, memory is found and kernels are chosen.
    return median(taken[1:])


def tokens_of(method: Method, stage: Stage, encoder: Encoder, config: TrainConfig) -> float:
    """About how many tokens the stage reads, of what the method trains on now: by the lengths of each source's first rows."""
    sources, tokens = method.training_set(stage), 0.0
    steps = plan_stage(sources, config).steps
    for source in sources:
        if lengths := [len(encoder.example(row).ids) for row in islice(source.examples, ROWS)]:
            rows = len(source.examples) if source.after else steps * round(source.share * config.batch_size)
            tokens += rows * sum(lengths) / len(lengths)
    return tokens
