"""ER: experience replay. Every step mixes current examples with as many drawn from a memory of past tasks.

After task t a uniform sample of `fraction` of its training examples enters the memory (so a task never replays itself); each later step draws
`ratio * batch_size` memory rows uniformly with replacement, and minimises

    (CE_current + weight * CE_memory) / (1 + weight),       each a mean over its own answer tokens.

With `capacity` set the memory is one reservoir of that many examples over all past tasks instead (Vitter 1985; arXiv 1902.10486).
Released code differs: TRACE (arXiv 2310.06762) replays in an extra epoch after the task; one released LLM port never fills its buffer, which
makes it SEQ. Ours interleaves, stores text, and re-encodes it with the task's own answer mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import Module

from clbench.adapters import Lora
from clbench.loss import answer_loss
from clbench.memory import Memory
from clbench.protocols import Engine, Method
from clbench.types import Batch, Source, Stage


@dataclass(kw_only=True)
class Er(Method):
    """Replay from a memory: `fraction` of each past task, or a reservoir of `capacity` examples."""

    lora: Lora
    seed: int
    fraction: float
    capacity: int | None
    ratio: float
    weight: float
    memory: Memory = field(default_factory=Memory)

    def wrap(self, model: Module) -> Module:
        """Adds the one adapter that all stages train."""
        return self.lora.add(model, seed=self.seed)

    def training_set(self, stage: Stage) -> Sequence[Source]:
        """The current task, and the memory beside it once it holds anything."""
        current = Source(examples=stage.train)
        if not self.memory.examples or self.ratio == 0:
            return (current,)
        return (current, Source(examples=self.memory.examples, share=self.ratio, weight=self.weight))

    def loss(self, model: Module, batch: Batch) -> Tensor:
        """Cross-entropy of current and memory rows, weighted by source, in nats per answer token."""
        return answer_loss(model, batch)

    def end_stage(self, stage: Stage, engine: Engine) -> None:
        """The finished task's examples enter the memory."""
        if self.capacity is not None:
            self.memory.reservoir(stage.train, capacity=self.capacity, seed=self.seed, stage=stage.index)
        else:
            count = math.ceil(self.fraction * len(stage.train))
            self.memory.keep(stage.train, count=count, seed=self.seed, stage=stage.index)

    def state_dict(self) -> dict[str, Any]:
        """The memory as text."""
        return {"memory": self.memory.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the memory back."""
        self.memory.restore(state["memory"])
