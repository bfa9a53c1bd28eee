"""ER: experience replay. Every step mixes current examples with as many drawn from a memory of past tasks.

After task t a uniform sample of `fraction` of its training examples enters the memory (so a task never replays
itself); each later step draws `ratio * batch_size` memory rows uniformly with replacement, and minimises

    (CE_current + weight * CE_memory) / (1 + weight),       each a mean over its own answer tokens.

With `capacity` set the memory is one reservoir of that many examples over all past tasks instead (Vitter 1985; arXiv 1902.10486). With `after` set
nothing is mixed in: when the task's own steps are done, one epoch passes the memory, in a random order, at the tail of the stage's learning-rate
schedule. That is TRACE's replay (arXiv 2310.06762, section 4.3.1: 10 % of each past task), without its general data.

Official code: BeyonderXX/TRACE for `after`; no reference implementation of the rest for language models. One released port never fills its buffer,
which makes it SEQ; another inserts replayed rows again. Ours stores each example once, as text, and re-encodes it with its task's own answer mask.
Interpretations: memory rows are drawn uniformly over the memory, not balanced over tasks, nor stratified by class.

Card:
- paper: arXiv 1902.10486; 2310.06762 section 4.3.1 (after)
- trainable: rank (in + out) per layer
- memory: fraction of each task's rows, as text
- compute: 1 + ratio times the rows per step
- deviations: interleaved; no general data in the TRACE form
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from baselines.seq import Seq
from clbench.data.memory import Memory
from clbench.data.sampling import generator
from clbench.protocols import Engine, Stage
from clbench.types import Example, Source


@dataclass(kw_only=True)
class Er(Seq):
    """Replay of a memory, mixed in or `after` the task: `fraction` of each past task, or a reservoir of `capacity`."""

    fraction: Annotated[float, Field(ge=0, le=1)]
    capacity: PositiveInt | None
    ratio: NonNegativeFloat
    weight: NonNegativeFloat = 1.0
    after: bool = False
    memory: Memory = field(default_factory=Memory)

    def training_set(self, stage: Stage) -> Sequence[Source]:
        """The current task, and the memory beside it once it holds anything."""
        current = Source(examples=stage.train)
        past = self.replayed()
        if not past or self.ratio == 0:
            return (current,)
        if self.after:
            order = torch.randperm(len(past), generator=generator(self.seed, "replay order", stage.index))
            past = [past[i] for i in order.tolist()]
        return (current, Source(examples=past, share=self.ratio, weight=self.weight, after=self.after))

    def replayed(self) -> list[Example]:
        """What there is to replay."""
        return self.memory.examples

    def end_stage(self, stage: Stage, engine: Engine) -> None:
        self.memory.take(stage.train, fraction=self.fraction, capacity=self.capacity, seed=self.seed, stage=stage.index)

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.restore(state["memory"])
