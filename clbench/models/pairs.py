"""The LoRA factors of a model, pair by pair: their names, merging them into the weights, putting others in their place.

Plain LoRA only: where PEFT's update is not `scale * B A` (DoRA), `lora_pairs` refuses the adapter.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from clbench.data.sampling import seeded
from clbench.models.cur import oriented
from clbench.models.limits import check_unshared
from clbench.models.sharding import stored, whole
from clbench.types import UserMistake

ADAPTER = "default"
"""PEFT's name of the one adapter that a method adds."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One adapted layer: the names of its factors, `A` [rank, in] and `B` [out, rank]; its update is `scale * B A`."""

    A: str
    B: str
    rank: int
    scale: float
    layer: LoraLayer

    @property
    def weight(self) -> Tensor:
        """The adapted layer's own weight [out, in], detached; in-place edits reach the model. Ranks may hold slices of it: see `whole`."""
        return oriented(self.layer.get_base_layer())

    @property
    def stored(self) -> Tensor:
        """What this process keeps of the weight: all of it or a flat slice; for keeping and putting back."""
        return stored(self.layer.get_base_layer().get_parameter("weight"))

    def whole(self, *, writing: bool = False) -> AbstractContextManager[None]:
        """The weight is whole inside; with `writing` what is written stays, the same on every rank."""
        return whole(self.layer.get_base_layer(), writing=writing)

    def live(self) -> dict[str, Tensor]:
        """Both factors as they are, detached, by parameter name; in-place edits reach the model."""
        factors = {self.A: self.layer.lora_A[ADAPTER], self.B: self.layer.lora_B[ADAPTER]}
        return {name: factor.get_parameter("weight").detach() for name, factor in factors.items()}

    def update(self, factors: Mapping[str, Tensor]) -> Tensor:
        """scale * B A [out, in] of the `factors` under this pair's names, on the weight's device."""
        return self.scale * (factors[self.B].to(self.weight.device) @ factors[self.A].to(self.weight.device))


def lora_pairs(model: Module, *, merging: bool = False) -> tuple[Pair, ...]:
    """Every LoRA layer of `model`, in the model's order; raises UserMistake where the adapter is not plain LoRA.

    With `merging`, also where its weight is another layer's, too, and so cannot be written into.
    """
    pairs = []
    if merging:
        check_unshared(model, [name for name, layer in model.named_modules() if isinstance(layer, LoraLayer)])
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            if layer.lora_variant:
                raise UserMistake(
                    "method.lora.dora=true, but this method works on plain LoRA; set method.lora.dora=false"
                )
            if not layer.lora_A:
                raise UserMistake(
                    f"this method works on linear layers, {name} is none; take it out of method.lora.targets"
                )
            a, b = (f"{name}.lora_{factor}.{ADAPTER}.weight" for factor in "AB")
            pairs.append(Pair(A=a, B=b, rank=layer.r[ADAPTER], scale=layer.scaling[ADAPTER], layer=layer))
    return tuple(pairs)


@torch.no_grad()
def stack(pairs: Sequence[Pair], stacks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`stacks` with the live factors added, rows of A and columns of B: B A of the stacks is the sum of all updates."""
    grown = {}
    for pair in pairs:
        for (name, factor), axis in zip(pair.live().items(), (0, 1), strict=True):
            before = [stacks[name].to(factor)] if name in stacks else []
            grown[name] = torch.cat([*before, factor], axis)
    return grown


@torch.no_grad()
def merge_and_restart(pairs: Sequence[Pair], *, seed: int, restart: int) -> None:
    """Adds every pair's update to its weight and starts the pair afresh: the function stays, up to the sum's rounding.

    The fresh A is drawn as PEFT draws it, by a generator named by `restart`; the fresh B is zero.
    """
    for pair in pairs:
        with pair.whole(writing=True):
            pair.weight.add_(pair.update(pair.live()))
    with seeded(seed, "adapter", restart):
        for pair in pairs:
            pair.layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)


@torch.no_grad()
def merge_stacks(pairs: Sequence[Pair], stacks: Mapping[str, Tensor]) -> None:
    """Adds stacked pairs to untouched weights, one after the other, so that resuming rounds as the first run did."""
    for pair in pairs:
        with pair.whole(writing=True):
            for a, b in zip(stacks[pair.A].split(pair.rank, 0), stacks[pair.B].split(pair.rank, 1), strict=True):
                pair.weight.add_(pair.update({pair.A: a, pair.B: b.contiguous()}))


@contextmanager
def using(model: Module, pairs: Sequence[Pair], factors: Mapping[str, Tensor]) -> Iterator[None]:
    """Forwards use `factors`, without dropout or gradient. Parameters are not touched, so they may be sharded."""

    def substitute(weight: Tensor, module: Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return F.linear(inputs[0], weight.to(inputs[0].dtype))

    with ExitStack() as undo, torch.no_grad():
        undo.callback(model.train, model.training)
        model.eval()
        for pair in pairs:
            for name, factor in ((pair.A, pair.layer.lora_A[ADAPTER]), (pair.B, pair.layer.lora_B[ADAPTER])):
                undo.callback(factor.register_forward_hook(partial(substitute, factors[name])).remove)
        yield


@contextmanager
def holding(pairs: Sequence[Pair], factors: Mapping[str, Tensor]) -> Iterator[None]:
    """The pairs hold the values of `factors`, so that they can be folded; bitwise restored on exit. Engine closed."""
    live = {name: factor for pair in pairs for name, factor in pair.live().items()}
    kept = {name: factor.clone() for name, factor in live.items()}
    for name, factor in live.items():
        factor.copy_(factors[name])
    try:
        yield
    finally:
        for name, factor in live.items():
            factor.copy_(kept[name])
