"""CUR adapters: linear layers whose update is C core R, where C and R are columns and rows of the frozen weight itself.

Only the small core trains. A method chooses which columns and rows are kept, what the core is made of, and whether the update is restrained.

Letters: W weight [out, in], C [out, rank], R [rank, in], D = scale * C core R [out, in], S the divisor of a restraint.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import Module, Parameter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from clbench.models.lora import targeted
from clbench.models.sharding import copied, whole
from clbench.types import UserMistake

Divisor = Callable[[Tensor, Tensor], Tensor]
"""(base, its change) -> S, all of one shape. The restrained result is (2 base + change) / S; 2 halves the change."""

LEAST_SHARE = 1e-12
"""Smallest share of the squared norm that a probability is made from, so that an all-zero column has a finite one."""


def oriented(linear: Module) -> Tensor:
    """The layer's weight as [out, in]; a view, so that writing to it writes to the layer (Conv1D keeps [in, out])."""
    return linear.weight.detach().t() if isinstance(linear, Conv1D) else linear.get_parameter("weight").detach()


def column_norms(weight: Tensor) -> Tensor:
    """L2 norm of every column, float64 [in]. The rows' norms are those of the transpose."""
    return torch.linalg.vector_norm(weight, dim=0, dtype=torch.float64)


def column_probabilities(weight: Tensor, *, offset: float) -> Tensor:
    """Probability of every column, float64 [in]: 1 / (p + offset), normalised; p is its share of ||W||_F^2."""
    squares = column_norms(weight).square()
    share = squares / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)
    inverse = 1 / (share + offset).clamp_min(LEAST_SHARE)
    return inverse / inverse.sum()


def sample_columns(weight: Tensor, count: int, *, offset: float, rng: torch.Generator) -> Tensor:
    """Indices int64 [count] of different columns drawn by `column_probabilities`, in the order drawn."""
    probabilities = column_probabilities(weight, offset=offset)
    # As torch.multinomial draws without replacement; of this only the noise is made on the CPU, where the generator is.
    noise = torch.empty(probabilities.shape, dtype=torch.float64, device="cpu").exponential_(generator=rng)
    return torch.topk(probabilities / noise.to(weight.device), count).indices


def smallest_columns(weight: Tensor, count: int) -> Tensor:
    """Indices int64 [count] of the columns of smallest L2 norm, ascending by norm, the first of equals first."""
    return torch.argsort(column_norms(weight), stable=True)[:count]


def upper_quantile(values: Tensor, quantile: float) -> Tensor:
    """The `quantile` of all values, a scalar, linear between neighbours (torch.quantile stops at 2^24 values)."""
    place = quantile * (values.numel() - 1)
    above = torch.topk(values.flatten(), values.numel() - int(place)).values
    return torch.lerp(above[-1], above[-2:][0], place - int(place))


def clamped(rank: int, inner: int, *, shape: Sequence[int]) -> tuple[int, int]:
    """(rank, inner) that fit a weight of `shape`: rank at most a quarter of its smaller side, their ratio kept."""
    fitting = max(1, min(rank, min(shape) // 4))
    return fitting, min(-(-fitting * inner // rank), shape[1])


def cur_delta(columns_OR: Tensor, core_RR: Tensor, rows_RI: Tensor) -> Tensor:
    """C core R, [out, in], in the core's precision."""
    return columns_OR.to(core_RR.dtype) @ core_RR @ rows_RI.to(core_RR.dtype)


def restrained(base: Tensor, change: Tensor, divisor: Divisor) -> Tensor:
    """(2 base + change) / S, of their shape. S is a constant to autograd: the derivative by `change` is 1 / S."""
    with torch.no_grad():
        divided_by = divisor(base, change)
    return (2 * base + change) / divided_by


def trained_dtype(weight: Tensor) -> torch.dtype:
    """The precision of trainable tensors on `weight`: its own, but float32 at least."""
    return torch.promote_types(weight.dtype, torch.float32)


class SquareCore(Module):
    """One trainable matrix U [rank, rank], zero at first."""

    def __init__(self, *, rank: int, like: Tensor) -> None:
        super().__init__()
        self.U = Parameter(torch.zeros(rank, rank, dtype=trained_dtype(like), device=like.device))

    def forward(self) -> Tensor:
        return self.U


class ProductCore(Module):
    """`history` + A B, [rank, rank]: A [rank, inner] starts as given, B [inner, rank] and the frozen `history` at 0."""

    history: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        # A view of a weight kept [in, out] has its strides, which DeepSpeed cannot flatten.
        self.A = Parameter(start.detach().to(trained_dtype(start), copy=True, memory_format=torch.contiguous_format))
        self.B = Parameter(torch.zeros_like(self.A).t().contiguous())
        self.register_buffer("history", torch.zeros(len(start), len(start), dtype=self.A.dtype, device=start.device))

    def forward(self) -> Tensor:
        return self.history + self.A @ self.B


class CurLinear(Module):
    """A frozen linear layer plus D = scale * C core R and, with `shift`, a trainable output bias `beta` [out].

    C, R and the indices they were taken with are buffers. `divisor` restrains D against W or, with `on_output`, the
    layer's change of its output against that output. `folded` is true while W already holds the update.
    """

    columns: Tensor
    rows: Tensor
    C: Tensor
    R: Tensor
    beta: Parameter | None

    def __init__(
        self,
        base: Module,
        *,
        columns: Tensor,
        rows: Tensor,
        core: SquareCore | ProductCore,
        scale: float = 1.0,
        shift: bool = False,
        divisor: Divisor | None = None,
        on_output: bool = False,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.core = core
        self.scale = scale
        self.divisor = divisor
        self.on_output = on_output
        self.folded = False
        for name, indices in (("columns", columns), ("rows", rows)):
            self.register_buffer(name, indices)
        self.register_buffer("C", self.weight[:, columns].clone())
        self.register_buffer("R", self.weight[rows, :].clone())
        beta = torch.zeros(len(self.weight), dtype=trained_dtype(self.weight), device=self.weight.device)
        self.register_parameter("beta", Parameter(beta) if shift else None)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, [out, in]; in-place edits reach the layer."""
        return oriented(self.base)

    @property
    def history(self) -> Tensor:
        """That of the core, where it has one."""
        return self.core.get_buffer("history")

    @property
    def foldable(self) -> bool:
        """Whether some weight gives the layer's outputs; none does when outputs are what is restrained."""
        return self.divisor is None or not self.on_output

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output [..., out] for x [..., in]."""
        y = self.base(x)
        if self.folded:
            return self.shifted(y)
        if self.divisor is not None and not self.on_output:
            # The [out, in] intermediates are made again in the backward pass instead of being kept for it.
            change = checkpoint(self._restrained_change, x, self.core(), use_reentrant=False, preserve_rng_state=False)
            return self.shifted(y + change)
        change = self.shifted(self._low_rank_change(x, self.core()))
        return y + change if self.divisor is None else restrained(y, change, self.divisor)

    def effective_weight(self, core: Tensor) -> Tensor:
        """The weight [out, in] that the layer acts with when its core is `core` [rank, rank], in the core's precision.

        Where outputs are restrained it is W + D, the weight before restraint.
        """
        weight, delta = self.weight.to(core.dtype), self.scale * cur_delta(self.C, core, self.R)
        return weight + delta if self.divisor is None or self.on_output else restrained(weight, delta, self.divisor)

    @torch.no_grad()
    def absorb(self, product: Tensor, *, into_history: bool) -> None:
        """Makes the core's part `product` [rank, rank] permanent, in the core's history or, restrained, in the weight.

        The caller takes it out of what trains.
        """
        if into_history:
            self.history.add_(product)
            return
        with whole(self.base, writing=True):
            self.weight.copy_(self.effective_weight(product))

    def saved_weight(self) -> Tensor:
        """A copy of the frozen weight, [out, in], for a checkpoint, as `sharding.copied` gives it."""
        copy = copied(self.base.get_parameter("weight"))
        return copy.t() if isinstance(self.base, Conv1D) else copy

    @torch.no_grad()
    def restore_weight(self, saved: Tensor) -> None:
        with whole(self.base, writing=True):
            self.weight.copy_(saved)

    def _restrained_change(self, x: Tensor, core: Tensor) -> Tensor:
        # As a difference from the frozen weight, so that a bfloat16 model does not round small updates away.
        change = self.effective_weight(core) - self.weight.to(core.dtype)
        return F.linear(x, change.to(x.dtype))

    def _low_rank_change(self, x: Tensor, core: Tensor) -> Tensor:
        # ((x R^T) core^T) C^T: rank * (in + rank + out) multiplications per token; D itself is never formed.
        inside = F.linear(F.linear(x, self.R).to(core.dtype), core)
        return F.linear((self.scale * inside).to(x.dtype), self.C)

    def shifted(self, y: Tensor) -> Tensor:
        """y + beta, [..., out], in the precision of y."""
        return y if self.beta is None else y + self.beta.to(y.dtype)


def inject(
    model: Module, *, targets: Sequence[str] | str, make: Callable[[str, Module], CurLinear]
) -> dict[str, CurLinear]:
    """Freezes `model` and replaces each layer named by `targets` with `make(name, layer)`; the new layers by name."""
    model.requires_grad_(False)
    layers = {}
    for name, layer in targeted(model, targets, kinds=(nn.Linear, Conv1D)).items():
        with whole(layer):
            layers[name] = make(name, layer)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def selection_hash(layers: dict[str, CurLinear]) -> str:
    """SHA-256, in hexadecimal, of every layer's name, indices, C and R."""
    digest = hashlib.sha256()
    for name, layer in layers.items():
        digest.update(name.encode())
        for tensor in (layer.columns, layer.rows, layer.C, layer.R):
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def check_selection(layers: dict[str, CurLinear], saved: str) -> None:
    """Raises UserMistake when the columns and rows made now are not those of the checkpoint, whose hash is `saved`."""
    if selection_hash(layers) != saved:
        raise UserMistake(
            "the checkpoint's CUR columns and rows are not those of this model, method and seed; "
            "restore the model's weights, or start again in another results_dir"
        )
