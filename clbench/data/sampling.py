"""Random draws, each from a generator named by (seed, purpose, stage), so that none depends on what was drawn before or on how many processes run."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch

from clbench.types import Example, Source


def generator(seed: int, purpose: str, stage: int = 0) -> torch.Generator:
    """A CPU random generator that depends only on its three names."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{stage}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw(
    sources: Sequence[Source], *, batch_size: int, step: int, seed: int, stage: int
) -> list[tuple[Example, int, float]]:
    """The global batch of one optimizer step: (example, index of its source, weight of its source).

    The first source is passed in a fresh order every epoch; each further one is drawn with replacement, uniformly. The draw depends on
    (seed, stage, step) alone, never on world size or on earlier calls.
    """
    rows: list[tuple[Example, int, float]] = []
    for index, source in enumerate(sources):
        count = round(source.share * batch_size)
        if not source.examples or count == 0:
            continue
        if index == 0:
            picked = epoch_indices(len(source.examples), start=step * count, count=count, seed=seed, stage=stage)
        else:
            rng = generator(seed, f"draw/{index}/{step}", stage)
            picked = torch.randint(len(source.examples), (count,), generator=rng).tolist()
        rows += [(source.examples[i], index, source.weight) for i in picked]
    return rows


def epoch_indices(size: int, *, start: int, count: int, seed: int, stage: int) -> list[int]:
    """`count` positions from `start` on in the endless concatenation of one permutation of `size` per epoch."""
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(start + len(indices), size)
        indices += epoch_order(size, epoch, seed, stage)[offset : offset + count - len(indices)]
    return indices


@lru_cache(maxsize=2)
def epoch_order(size: int, epoch: int, seed: int, stage: int) -> tuple[int, ...]:
    """The permutation of `size` in one epoch of a stage; asked for by every step of it, and by one that crosses into the next."""
    return tuple(torch.randperm(size, generator=generator(seed, f"order/{epoch}", stage)).tolist())


@contextmanager
def seeded(seed: int, purpose: str, stage: int = 0) -> Iterator[None]:
    """Code that draws from torch's global generator draws from a named one inside; outside nothing is disturbed."""
    number = generator(seed, purpose, stage).initial_seed()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed, which asks for every kind of device there is: 0.2 ms, and this is called at every step.
        torch.default_generator.manual_seed(number)
        if devices:
            torch.cuda.manual_seed(number)
        yield
