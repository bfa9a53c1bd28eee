"""How far training has moved the weights: the size of the update of all linear layers together, relative to what they were.

||W_now - W_0||_F / ||W_0||_F needs no copy of W_0: for R [directions, in] with independent standard normal entries E ||D R^T||_F^2 = directions *
||D||_F^2 (Hutchinson 1990), so what each layer made of a few fixed inputs before training is enough. With d directions the error of one layer's
estimate is about 1 / sqrt(2 d) of it at most (a rank-one update), that of many layers together less.
"""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import Module
from transformers.pytorch_utils import Conv1D

from clbench.data.sampling import generator
from clbench.examine.scores import Found, scores
from clbench.examine.student import Student
from clbench.models.loss import causal_lm
from clbench.models.sharding import whole
from clbench.protocols import Probe, Stream
from clbench.types import Score

DIRECTIONS = 16
"""Inputs on which a layer's weights are compared."""


@dataclass(kw_only=True, eq=False)
class Update(Probe):
    """`relative_norm`: the Frobenius norm of the update of all linear layers, adapters included, over that of the untouched weights.

    Left out are layers that give more than a tensor (Llama-4's router). In bfloat16 what layers make is rounded, and below about 0.003 it says
    nothing.
    """

    name: str
    inputs: dict[str, Tensor] = field(default_factory=dict, init=False)
    before: dict[str, Tensor] = field(default_factory=dict, init=False)

    def begin(self, student: Student) -> None:
        for name, layer in causal_lm(student.model).named_modules():
            if isinstance(layer, nn.Linear | Conv1D):
                width = layer.nx if isinstance(layer, Conv1D) else layer.in_features
                self.inputs[name] = torch.randn(DIRECTIONS, width, generator=generator(0, f"update/{name}"))
        self.before = self._outputs(student.model)

    def measure(self, student: Student, stream: Stream, stage: int) -> Iterator[Score]:
        student.about(self.name, "weights")
        started = time.perf_counter()
        now = self._outputs(student.model)
        moved = sum(float((now[name] - before).square().sum()) for name, before in self.before.items())
        size = sum(float(before.square().sum()) for before in self.before.values())
        found = {"relative_norm": Found(math.sqrt(moved / size), len(now))}
        seconds = time.perf_counter() - started
        yield from scores(found, stream=stream, stage=stage, probe=self.name, task="weights", seconds=seconds)

    @torch.no_grad()
    def _outputs(self, model: Module) -> dict[str, Tensor]:
        """What each layer makes of its inputs, less its bias, as it is now: [DIRECTIONS, out] in float32 on the CPU."""
        found = {}
        for name, inputs in self.inputs.items():
            layer = causal_lm(model).get_submodule(name)
            with ExitStack() as held:
                for part in layer.modules():
                    held.enter_context(whole(part))
                given = inputs.to(next(layer.parameters()))
                made, at_zero = layer(given), layer(torch.zeros_like(given[:1]))
                if isinstance(made, Tensor):
                    found[name] = (made - at_zero).float().cpu()
        return found
