"""Adapters: LoRA and DoRA through PEFT, and folding of adapters into the weights while a model is examined.

Folding is exact to undo: the touched weights are kept and put back, never subtracted again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn import Module

from clbench.data import generator


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters: the update of a weight is `alpha / rank * B A`, A of shape [rank, in], B [out, rank] (arXiv 2106.09685)."""

    rank: int
    alpha: float
    targets: list[str]
    dropout: float = 0.0
    dora: bool = False

    def add(self, model: Module, *, seed: int) -> PeftModel:
        """`model` with its weights frozen and fresh adapters on every layer whose name ends in one of `targets`."""
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            lora_dropout=self.dropout,
            use_dora=self.dora,
            task_type="CAUSAL_LM",
        )
        with seeded(seed, "adapter"):
            return get_peft_model(model, config)


@contextmanager
def seeded(seed: int, purpose: str, stage: int = 0) -> Iterator[None]:
    """Code that draws from torch's global generator draws from a named one inside; outside nothing is disturbed."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(generator(seed, purpose, stage).initial_seed())
        yield


def trainable(model: Module) -> dict[str, Tensor]:
    """The trainable tensors by full parameter name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_state(model: Module) -> dict[str, Tensor]:
    """Copies of the trainable tensors on the CPU, for a checkpoint."""
    return {name: parameter.detach().cpu().clone() for name, parameter in trainable(model).items()}


@torch.no_grad()
def load_trainable_state(model: Module, state: dict[str, Tensor]) -> None:
    """Puts back what `trainable_state` gave."""
    own = trainable(model)
    assert own.keys() == state.keys(), sorted(own.keys() ^ state.keys())
    for name, parameter in own.items():
        parameter.copy_(state[name])


@contextmanager
def folded(model: Module) -> Iterator[Module]:
    """PEFT adapters merged into the weights they adapt, for faster forwards; on exit every weight is bitwise what it was.

    A model without PEFT adapters passes unchanged.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    weights = [layer.get_base_layer().weight for layer in layers]
    kept = [weight.detach().clone() for weight in weights]
    for layer in layers:
        layer.merge(safe_merge=False)
    try:
        yield model
    finally:
        with torch.no_grad():
            for layer, weight, before in zip(layers, weights, kept, strict=True):
                layer.unmerge()
                weight.copy_(before)


def describe(model: Module) -> dict[str, Any]:
    """Counts of parameters: all, trainable."""
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(tensor.numel() for tensor in trainable(model).values()),
    }
