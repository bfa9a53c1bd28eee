"""What a run under way is made of, and what a stage of it cost."""

import resource
from dataclasses import dataclass, field

import torch
from torch.nn import Module

from clbench.config import Config
from clbench.data.encoder import Encoder
from clbench.models.weights import count_parameters
from clbench.protocols import Method, Probe, Stream
from clbench.record.ledger import Ledger
from clbench.train.loop import Trained
from clbench.train.ranks import Ranks
from clbench.types import Cost


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run under way. Only the first rank has a ledger. `overlapping`: ids of training examples that a test or probe holds, too."""

    config: Config
    method: Method
    model: Module
    stream: Stream
    probes: tuple[Probe, ...]
    encoder: Encoder
    ledger: Ledger | None = None
    ranks: Ranks = field(default_factory=Ranks)
    overlapping: frozenset[str] = frozenset()


def cost_of(run: Run, stage: int, trained: Trained, *, tokens_scored: int, **seconds: float) -> Cost:
    """Counts, seconds and memory of a stage."""
    counts = count_parameters(run.model)
    read = trained.tokens_trained + trained.tokens_replayed
    # Forward 2, activation gradients 2, gradients of trainable weights 2 operations per parameter and token (arXiv 2001.08361).
    operations = read * (4 * counts["parameters"] + 2 * counts["trainable"]) + 2 * tokens_scored * counts["parameters"]
    return Cost(
        stage=stage,
        steps=trained.steps,
        tokens_trained=trained.tokens_trained,
        tokens_replayed=trained.tokens_replayed,
        tokens_scored=tokens_scored,
        seconds_other=0.0,
        trainable_parameters=counts["trainable"],
        peak_memory_bytes=peak_memory(run.encoder.device),
        flops=float(operations),
        joules=float("nan"),
        **seconds,
    )


def peak_memory(device: torch.device) -> int:
    """Highest memory use so far, in bytes: of the accelerator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
