"""The trainable tensors of a model: by name, as a copy, put back, counted."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from clbench.models.sharding import entries


def trainable(model: Module) -> dict[str, Parameter]:
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


def count_parameters(model: Module) -> dict[str, Any]:
    """Counts of parameters: all, trainable."""
    return {
        "parameters": sum(entries(parameter) for parameter in model.parameters()),
        "trainable": sum(entries(tensor) for tensor in trainable(model).values()),
    }
