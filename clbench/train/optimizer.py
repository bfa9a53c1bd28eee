"""AdamW and its learning-rate schedule, with every number stated: the same for every engine.

Its state, the moments, travels whole and by name, on the CPU: `step/NAME` (how many steps the tensor has seen), `exp_avg/NAME` and
`exp_avg_sq/NAME` of the tensor's shape. A tensor that has seen none has no entry.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from clbench.config import TrainConfig

log = logging.getLogger("clbench")
AVERAGES = ("exp_avg", "exp_avg_sq")


def optimizer(parameters: Mapping[str, Parameter], config: TrainConfig, moments: Mapping[str, Tensor]) -> AdamW:
    """AdamW with decoupled weight decay on every trainable tensor (arXiv 1711.05101), without state yet.

    Tensors that will be given `moments` of one step count are one group, which knows it as `steps`: an engine may lay a group end to end.
    """
    groups: dict[float, list[Parameter]] = defaultdict(list)
    for name, parameter in parameters.items():
        groups[float(moments.get(f"step/{name}", 0.0))].append(parameter)
    return AdamW(
        [{"params": group, "steps": steps} for steps, group in groups.items()],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=1e-8,
        weight_decay=config.weight_decay,
        fused=True,
    )


def fitting(moments: Mapping[str, Tensor], parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """The moments of tensors that still train in the shape they had; says which tensors start afresh beside them."""
    kept = {
        name
        for name, parameter in parameters.items()
        if f"step/{name}" in moments and moments[f"exp_avg/{name}"].shape == parameter.shape
    }
    fresh = [name for name in parameters if name not in kept]
    if moments and fresh:
        others = f" and {len(fresh) - 1} more" if len(fresh) > 1 else ""
        log.warning("train.carry_optimizer: %s%s: new, or of another shape; its moments start afresh", fresh[0], others)
    return {key: value for key, value in moments.items() if key.partition("/")[2] in kept}


def moments_of(optimizer: AdamW, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """Copies of the state of an optimizer that steps with `parameters` themselves."""
    return {
        f"{key}/{name}": value.detach().to("cpu", copy=True)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def set_moments(optimizer: AdamW, parameters: Mapping[str, Parameter], moments: Mapping[str, Tensor]) -> None:
    """Gives an optimizer that steps with `parameters` themselves its state."""
    for name, parameter in parameters.items():
        if f"step/{name}" in moments:
            state = {key: moments[f"{key}/{name}"] for key in ("step", *AVERAGES)}
            optimizer.state[parameter] = {key: value.to(parameter.device, copy=True) for key, value in state.items()}


def schedule(optimizer: AdamW, config: TrainConfig, *, steps: int, done: int = 0) -> LambdaLR:
    """The learning rate of every step, `factor` times `config.lr`; `done` of the steps are over."""
    return LambdaLR(optimizer, lambda step: factor(config, done + step, steps=steps))


def factor(config: TrainConfig, step: int, *, steps: int) -> float:
    """Learning-rate factor of optimizer step `step` (from 0): linear rise over `config.warmup * steps`, then `config.schedule`."""
    rise = max(1, math.ceil(config.warmup * steps))
    if config.warmup > 0 and step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, steps - rise)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return max(0.0, 1.0 - progress)
