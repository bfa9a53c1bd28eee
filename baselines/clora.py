"""CLoRA: controlled LoRA. A penalty keeps fixed directions out of what the update reads and of what it writes.

Paper: CLoRA (ACL 2025, arXiv 2410.16801). Every adapted layer has two frozen bases with orthonormal columns, P_v [in, k] and P_u [out, k]:

    loss = CE + strength * sum over layers of ( 1/2 ||A P_v||_F^2 + 1/2 ||B^T P_u||_F^2 )                     (eq. 1)
    d/dA = strength * A P_v P_v^T,        d/dB = strength * P_u P_u^T B.

A P_v = 0 makes P_v part of the null space of the update B A; P_u^T B = 0 keeps P_u out of its range. The LoRA scale
alpha/r does not enter, nothing is divided by k or by the number of layers, and the bases stay for the whole stream.

Official code: sutakori/CLoRA. Followed: the factor 1/2 (the paper's equation is reported without it, then its strength is half of ours), the sum
over layers, one independent random pair per layer. Deviations: the gradient is added in closed form once per optimizer step, so gradient
accumulation and sharding cannot change it; bases are seeded by the factor's full name and rebuilt instead of stored (the release seeds nothing and
matches names by substring); QR runs in float32, the result is kept in the base weight's dtype. Interpretations: by default k is `fraction` of each
side's own width, as k=1024 is a quarter of 4096; `k` sets one number for all. At k >= width P P^T = I and the term is plain L2, as in the release.
`svd_major` and `svd_minor` take the singular vectors of the pretrained weight with the largest or smallest singular values (thin SVD, so k is at
most min(in, out)); the release has no code for them. Adapter carried over, no merge.

Card:
- paper: arXiv 2410.16801
- trainable: rank (in + out) per layer
- memory: k (in + out) per layer, frozen
- compute: k rank (in + out) per layer and step
- deviations: closed-form gradient; seeded bases; k a fraction of the width
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.nn import Module

from baselines.seq import Seq
from clbench.data.sampling import generator
from clbench.models.pairs import lora_pairs
from clbench.protocols import Engine


def penalty(factor: Tensor, basis: Tensor) -> Tensor:
    """1/2 ||factor basis||_F^2 of one factor [rank, width] (A, or B^T) and its basis [width, k]; no unit."""
    return 0.5 * (factor @ basis).square().sum()


def penalty_gradient(factor: Tensor, basis: Tensor) -> Tensor:
    """factor basis basis^T [rank, width], the gradient of `penalty`."""
    return factor @ basis @ basis.T


def random_basis(width: int, *, k: int, seed: int, name: str) -> Tensor:
    """At most k orthonormal columns [width, k], uniformly distributed; depends on (seed, name) alone."""
    normal = torch.randn(width, min(k, width), generator=generator(seed, f"clora/{name}"))
    return torch.linalg.qr(normal).Q


def svd_bases(weight: Tensor, *, k_in: int, k_out: int, major: bool) -> tuple[Tensor, Tensor]:
    """P_v [in, k_in], P_u [out, k_out]: singular vectors of `weight` [out, in], largest or smallest values first.

    There are min(in, out) of either, so k is at most that.
    """
    u, _, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return (vh[:k_in].T, u[:, :k_out]) if major else (vh[-k_in:].T, u[:, -k_out:])


@dataclass(kw_only=True)
class Clora(Seq):
    """LoRA with `fraction` of each side's directions (or `k` of them) penalised by `strength`."""

    strength: NonNegativeFloat
    fraction: Annotated[float, Field(gt=0, le=1)]
    k: PositiveInt | None
    basis: Literal["random", "svd_major", "svd_minor"]
    bases: dict[str, Tensor] = field(default_factory=dict)

    def wrap(self, model: Module) -> Module:
        """Adds the one adapter that all stages train, and builds the bases by the name of the factor they constrain."""
        wrapped = super().wrap(model)
        for pair in lora_pairs(wrapped):
            width_out, width_in = len(pair.live()[pair.B]), pair.live()[pair.A].shape[1]
            k_in, k_out = (self.k or max(1, round(self.fraction * width)) for width in (width_in, width_out))
            if self.basis == "random":
                p_v = random_basis(width_in, k=k_in, seed=self.seed, name=pair.A)
                p_u = random_basis(width_out, k=k_out, seed=self.seed, name=pair.B)
            else:
                with pair.whole():
                    p_v, p_u = svd_bases(pair.weight, k_in=k_in, k_out=k_out, major=self.basis == "svd_major")
            self.bases |= {pair.A: p_v.contiguous().to(pair.weight), pair.B: p_u.contiguous().to(pair.weight)}
        return wrapped

    def correct_gradients(self, engine: Engine) -> Tensor | float:
        """Adds the penalty's gradient to every factor; returns strength times the penalty."""
        if self.strength == 0:
            return 0.0
        value = 0.0
        for tensor in engine.tensors(self.bases):
            basis = self.bases[tensor.name].to(tensor.value.dtype)
            # The penalty reads B transposed.
            is_b = ".lora_B." in tensor.name
            factor = tensor.value.T if is_b else tensor.value
            gradient = penalty_gradient(factor, basis)
            tensor.grad += self.strength * (gradient.T if is_b else gradient)
            value = value + self.strength * penalty(factor, basis)
        return value
