"""Bounded stores of past examples for replay. They hold text, not tensors, and are saved as JSON with the method's state.

>>> from clbench.types import Example
>>> memory = Memory()
>>> memory.keep([Example(id=str(i), prompt="p", answer="a") for i in range(10)], count=3, seed=0, stage=1)
>>> len(memory.examples)
3
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from clbench.data.sampling import generator
from clbench.types import Example


@dataclass
class Memory:
    """Examples of finished stages. `seen` counts all that were ever offered to the reservoir."""

    examples: list[Example] = field(default_factory=list)
    seen: int = 0

    def keep(self, offered: Sequence[Example], *, count: int, seed: int, stage: int) -> None:
        """Adds a uniform sample of `count` of the offered examples, without replacement, in their own order."""
        assert 0 <= count <= len(offered), (count, len(offered))
        picked = torch.randperm(len(offered), generator=generator(seed, "memory", stage))[:count]
        self.examples += [offered[i] for i in sorted(picked.tolist())]
        self.seen += len(offered)

    def reservoir(self, offered: Sequence[Example], *, capacity: int, seed: int, stage: int) -> None:
        """Offers each example once to a reservoir: after n offers every one is in it with probability capacity / n (Vitter 1985)."""
        rng = generator(seed, "reservoir", stage)
        for example in offered:
            self.seen += 1
            if len(self.examples) < capacity:
                self.examples.append(example)
                continue
            slot = int(torch.randint(self.seen, (), generator=rng))
            if slot < capacity:
                self.examples[slot] = example

    def take(self, offered: Sequence[Example], *, fraction: float, capacity: int | None, seed: int, stage: int) -> None:
        """Keeps `fraction` of the offered examples, rounded up, or offers all to one reservoir of size `capacity`."""
        if capacity is not None:
            self.reservoir(offered, capacity=capacity, seed=seed, stage=stage)
        else:
            self.keep(offered, count=math.ceil(fraction * len(offered)), seed=seed, stage=stage)

    def state(self) -> str:
        return json.dumps(
            {"seen": self.seen, "examples": [asdict(example) for example in self.examples]}, ensure_ascii=False
        )

    def restore(self, state: str) -> None:
        """Takes back what `state` gave."""
        record = json.loads(state)
        self.seen = record["seen"]
        self.examples = []
        for row in record["examples"]:
            kept: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in row.items()}
            self.examples.append(Example(**kept))
