"""SECURA: a widened CUR update (CABR), restrained by size (S-MagNorm) and merged into the weights (arXiv 2502.18168).

    D = C A B R         C = W[:, J], R = W[I, :]: columns and rows of smallest L2 norm; A [rank, inner], B [inner, rank]
    rho = |D| / |W + 1e-10|,  n = clip(rho / q, 0, 1) - 1/2,  q the `quantile` of rho
    S = 2 - t,  t = sigmoid(kappa n) moved onto [0, 1];  S is a constant to autograd
    W_eff = (2 W + D) / S,  y = x W_eff^T + b + beta                  small changes are halved, large ones pass
    M1 when a task ends: W <- W_eff, B <- 0         M2: W stays, U_L <- U_L + A B, B <- 0, and D = C (U_L + A B) R

A starts as W[:rank, :inner] and B at 0: nothing changes at first. rank is at most a quarter of the weight's smaller
side, `inner` keeps its ratio to it. Trainables: 2 rank inner + out per layer. Extra work in training: out * in per
layer and forward, twice (to keep no [out, in] tensors for the backward pass); none while examined: W_eff is folded in.

Only the paper's abstract could be read. The above is from the official code (github.com/MeCuping/SECURA at 3f5c9f4),
its comments and its figure. They contradict each other; every resolution is our INTERPRETATION, no reproduction:
- `weight_id` restrains weights, as comments and figure say, but is exact at D = 0 and robust. The comments' own form,
  `weight_comment`, divides by the maximum of rho, an outlier: S is then constant and W grows by 2.4 %. Where q = 0
  we take S = 2, so W_eff = W + D/2; W_eff = W would leave B without a gradient.
- `output_release` is what the code computes: S = 2 - sigmoid(kappa |change / output|) per output, 2 if nothing changed
  at all. One change anywhere makes unchanged outputs jump by 4/3. No weight does this: it is not folded or exported.
- We merge with the norm, so that merging changes no output. The code merges W + D (so does `output_release` here) after
  every step (`fusion_step: 1`): gradients are then taken at B = 0 and only weight decay moves A. See secura_release.
- The released M2 forgets what it merges; ours sums the products (summing B alone is wrong, as A trains too).
- The code's SVD start of A equals the top-left block of W. Its decay of randomly indexed channels, where 90 % of S is
  below 1.2, is left out: it hardly ever acts. A bfloat16 model keeps merged weights in bfloat16, as the code does.

Card:
- paper: arXiv 2502.18168 (abstract only)
- trainable: 2 rank inner + out per layer
- memory: rank (in + out) per layer, frozen
- compute: 2 in out per layer and forward
- deviations: interpretation: weight-space norm exact at zero, merge with the norm
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.nn import Module

from clbench.models import cur
from clbench.models.limits import check_unshared
from clbench.protocols import Engine, Method, Stage
from clbench.types import UserMistake

EPSILON = 1e-10


def magnorm_weight_id(weight: Tensor, delta: Tensor, *, quantile: float, kappa: float) -> Tensor:
    """S in [1, 2], [out, in]: 2 where a weight changes little for its size, 1 where by as much as the quantile."""
    rho = delta.abs() / (weight + EPSILON).abs()
    large = cur.upper_quantile(rho, quantile)
    share = torch.where(large > 0, (rho / large).clamp(0, 1), 0.0)
    low, high = torch.sigmoid(torch.tensor([-kappa / 2, kappa / 2], dtype=rho.dtype, device=rho.device))
    return 2 - ((torch.sigmoid(kappa * (share - 0.5)) - low) / (high - low)).clamp(0, 1)


def magnorm_weight_comment(weight: Tensor, delta: Tensor, *, kappa: float) -> Tensor:
    """S in [1.047, 1.953] for kappa 6, [out, in], by the official code's comments; 2 where nothing changes at all."""
    rho = delta.abs() / (weight + EPSILON).abs()
    largest = rho.max()
    return torch.where(largest > 0, 2 - torch.sigmoid(kappa * (rho / (largest + EPSILON) - 0.5)), 2.0)


def magnorm_output_release(output: Tensor, delta: Tensor, *, kappa: float) -> Tensor:
    """S in [1, 1.5], of the outputs' shape, by the official code; 2 where nothing changes at all."""
    loss = (delta / (output + EPSILON)).abs()
    return torch.where((loss > 0).any(), 2 - torch.sigmoid(kappa * loss), 2.0)


@dataclass(kw_only=True)
class Secura(Method):
    """CABR layers at `targets`, restrained by `magnorm`; `merge` every `fusion_step` steps (None: when a task ends)."""

    targets: list[str] | str
    rank: PositiveInt
    inner: PositiveInt
    magnorm: Literal["weight_id", "weight_comment", "output_release", "none"]
    quantile: Annotated[float, Field(ge=0, le=1)]
    kappa: NonNegativeFloat
    merge: Literal["m1", "m2", "none"]
    fusion_step: PositiveInt | None
    train_bias: bool
    steps: int = 0
    layers: dict[str, cur.CurLinear] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.magnorms = {
            "weight_id": partial(magnorm_weight_id, quantile=self.quantile, kappa=self.kappa),
            "weight_comment": partial(magnorm_weight_comment, kappa=self.kappa),
            "output_release": partial(magnorm_output_release, kappa=self.kappa),
            "none": None,
        }
        if self.inner <= self.rank:
            raise UserMistake(f"method.inner={self.inner} must be larger than method.rank={self.rank}")
        self.merges = self.merge == "m1"
        self.keeps = not (self.merges and self.magnorm == "output_release")

    def wrap(self, model: Module) -> Module:
        self.layers = cur.inject(model, targets=self.targets, make=lambda _, base: self.fitted(base))
        if self.merges:
            check_unshared(model, self.layers)
        return model

    def fitted(self, base: Module) -> cur.CurLinear:
        """The adapted layer, of the rank and inner width that fit it."""
        rank, inner = cur.clamped(self.rank, self.inner, shape=cur.oriented(base).shape)
        return self.layer(base, rank=rank, inner=inner)

    def layer(self, base: Module, *, rank: int, inner: int) -> cur.CurLinear:
        """The adapted layer, of this rank and inner width."""
        weight = cur.oriented(base)
        return cur.CurLinear(
            base,
            columns=cur.smallest_columns(weight, rank),
            rows=cur.smallest_columns(weight.t(), rank),
            core=cur.ProductCore(weight[:rank, :inner]),
            shift=self.train_bias,
            divisor=self.magnorms[self.magnorm],
            on_output=self.magnorm == "output_release",
        )

    def begin_stage(self, stage: Stage, model: Module) -> None:
        """Counts steps anew: what the last stage left over was merged."""
        self.steps = 0

    def after_step(self, engine: Engine) -> None:
        """Merges every `fusion_step` steps; A, beta and the optimizer's moments stay."""
        self.steps += 1
        if self.fusion_step is None or self.merge == "none" or self.steps % self.fusion_step:
            return
        for name, layer in self.layers.items():
            a, b = engine.tensors((f"{name}.core.A", f"{name}.core.B"))
            layer.absorb(a.value @ b.value, into_history=self.merge == "m2")
            b.value = torch.zeros_like(b.value)

    def consolidate(self, model: Module) -> None:
        """The task's update becomes part of the weights (M1) or of the history (M2)."""
        for layer in self.layers.values() if self.merge != "none" else ():
            a, b = (layer.core.get_parameter(factor).detach() for factor in "AB")
            layer.absorb(a @ b, into_history=self.merge == "m2")
            b.zero_()

    def state_dict(self) -> dict[str, Any]:
        """What merges changed, when the next is due, and the hash of C and R, which `wrap` makes again from the untouched weights."""
        layers = self.layers if self.merge != "none" else {}
        kept = {
            f"kept/{name}": layer.history.to("cpu", copy=True) if self.merge == "m2" else layer.saved_weight()
            for name, layer in layers.items()
        }
        return {"selection": cur.selection_hash(self.layers), "steps": self.steps, **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it back."""
        cur.check_selection(self.layers, state["selection"])
        self.steps = state["steps"]
        for name, layer in self.layers.items() if self.merge != "none" else ():
            if self.merge == "m2":
                layer.history.copy_(state[f"kept/{name}"])
            else:
                layer.restore_weight(state[f"kept/{name}"])
