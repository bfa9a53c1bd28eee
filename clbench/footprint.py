"""Memory of one GPU on every ZeRO stage, from what one process would hold (`clbench.dry_run`).

Follows what DeepSpeed keeps for float32 adapters, with the settings of `engine_deepspeed`. tests/test_footprint.py holds it against
allocations measured on the CPU, with one process and with two.
"""

from __future__ import annotations

from dataclasses import dataclass

from clbench.config_engine import MESSAGE
from clbench.dry_run import Footprint

LIVE = 1_000_000_000
"""Most entries that stage 3 keeps gathered at once (DeepSpeed's own default of stage3_max_live_parameters)."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU at the moment of training when it holds most. `activations` include all else that passes by within a step.

    `optimizer`: moments, and the master copy that stages 1 to 3 keep; `buffers`: of messages, and stage 3's gathered weights.
    """

    weights: int
    gradients: int
    optimizer: int
    extras: int
    buffers: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


def local(footprint: Footprint) -> Memory:
    """One process without DeepSpeed."""
    return Memory(
        weights=footprint.frozen + footprint.trained,
        gradients=footprint.trained,
        optimizer=footprint.moments,
        extras=footprint.extras,
        buffers=0,
        activations=footprint.working - footprint.trained,
    )


def examined_in_slices(footprint: Footprint, *, processes: int, unit: int) -> int:
    """Bytes of one rank in an examination, at most, where the base stays in slices (engine.shard_base), `unit` bytes of it gathered at once."""
    return footprint.examination - footprint.frozen + -(-footprint.frozen // processes) + unit


def sharded(footprint: Footprint, *, zero_stage: int, processes: int) -> Memory:
    """One rank of `processes`, on a ZeRO stage. A method's own tensors are whole on every rank.

    Gradients add up whole on each rank, stage 3 included, and are reduced once a step. That is a second peak, after the activations'.
    """

    def part(size: int) -> int:
        return -(-size // processes)

    trained = footprint.trained
    buffer = max(footprint.largest, min(trained, 4 * MESSAGE))
    plain = local(footprint)
    if zero_stage == 0:
        weights, optimizer, gradients, buffers, reducing = plain.weights, plain.optimizer, trained, 0, 2 * trained
    elif zero_stage < 3:
        weights, optimizer = plain.weights, part(trained) + part(plain.optimizer)
        gradients, buffers, reducing = trained, buffer, 2 * part(trained)
    else:
        weights, optimizer = part(plain.weights), part(trained) + part(plain.optimizer)
        gradients, buffers = trained + part(trained), 2 * buffer + min(plain.weights, LIVE * footprint.entry)
        reducing = buffer + part(trained)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        extras=plain.extras,
        buffers=buffers,
        activations=max(plain.activations, reducing),
    )
