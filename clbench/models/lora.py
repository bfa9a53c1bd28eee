"""LoRA and DoRA through PEFT, and the layers that adapters go on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from clbench.data.sampling import seeded
from clbench.models.limits import settings
from clbench.models.loss import causal_lm
from clbench.models.sharding import gathering, shape
from clbench.types import UserMistake

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the output embedding."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685): a weight's update is `alpha / rank * B A`, A [rank, in], B [out, rank]."""

    rank: PositiveInt
    alpha: float
    targets: list[str] | str
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    dora: bool = False

    def add(self, model: Module, *, seed: int) -> PeftModel:
        """`model` with its weights frozen and fresh adapters on every layer whose name ends in one of `targets`, of which each must name one."""
        layers = targeted(model, self.targets, kinds=(nn.Linear, nn.Embedding, Conv1D))
        # A gate of one output has no rank to speak of and is adapted beside others.
        most = max(min(shape(layer.get_parameter("weight"))) for layer in layers.values())
        if self.rank > most:
            raise UserMistake(
                f"method.lora.rank={self.rank} is more than the smaller side of every layer; set it to {most} at most (conf/method)"
            )
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType] (PEFT declares int, and takes any number)
            target_modules=list(layers if isinstance(self.targets, str) else self.targets),
            lora_dropout=self.dropout,
            use_dora=self.dora,
            task_type="CAUSAL_LM",
        )
        with seeded(seed, "adapter"):
            try:
                adapted = get_peft_model(model, config)
            except ValueError as error:  # PEFT knows layers that kernels read past an adapter (Mamba's out_proj)
                raise UserMistake(
                    f"method.lora.targets={self.targets}: {str(error).splitlines()[0]} (conf/method)"
                ) from error
        # PEFT takes some names of mixtures of experts for the fused weights of all experts.
        added = {name for name, layer in adapted.get_base_model().named_modules() if isinstance(layer, LoraLayer)}
        if added != layers.keys():
            unlike = min(added ^ layers.keys())
            raise UserMistake(
                f"method.lora.targets={self.targets} of a {causal_lm(model).config.model_type}: PEFT turns {unlike!r} into adapters "
                "of fused experts, which cannot be folded; name the layers of attention, e.g. [q_proj, k_proj, v_proj, o_proj] (conf/method)"
            )
        return adapted


def targeted(model: Module, targets: Sequence[str] | str, *, kinds: tuple[type[Module], ...]) -> dict[str, Module]:
    """The layers whose full names end in one of `targets`, by name, as PEFT finds them; raises UserMistake where one cannot be adapted.

    Besides `kinds` descendants of Linear are allowed, as some models have their own (Falcon).
    """
    names = {name: module for name, module in model.named_modules() if name}
    fitting = {name: module for name, module in names.items() if type(module) in kinds or isinstance(module, nn.Linear)}
    if isinstance(targets, str):
        if targets != ALL_LINEAR:
            raise UserMistake(f"targets={targets!r} is unknown; give a list of layers' names, or {ALL_LINEAR}")
        head = causal_lm(model).get_output_embeddings()
        chosen = {
            name: module
            for name, module in fitting.items()
            if isinstance(module, nn.Linear | Conv1D) and module is not head
        }
    else:
        found = {target: [name for name in names if f".{name}".endswith(f".{target}")] for target in targets}
        allowed = ", ".join(roles(fitting))
        for target, members in found.items():
            refused = sorted({type(names[name]).__name__ for name in members if name not in fitting})
            if not members or refused:
                what = f"is a {', '.join(refused)}" if refused else "is in no layer's name"
                listed = " or ".join(kind.__name__ for kind in kinds)
                raise UserMistake(
                    f"target {target!r} {what}; choose layers of type {listed}: {allowed}, or {ALL_LINEAR} (conf/method)"
                )
        together = {name for members in found.values() for name in members}
        chosen = {name: module for name, module in names.items() if name in together}
    check_reached(model, chosen)
    return chosen


def role(name: str) -> str:
    """What layers of a kind are called in every block.

    >>> role("model.layers.0.self_attn.q_proj")
    'q_proj'
    """
    return name.rpartition(".")[2]


def roles(names: Iterable[str]) -> list[str]:
    """What some layers are called in every block, each once."""
    return sorted({role(name) for name in names})


def check_reached(model: Module, layers: Mapping[str, Module]) -> None:
    """Raises UserMistake where a forward in training takes a layer's weight past the layer, or the layer gives more than one tensor.

    An adapter there would do nothing, or break. Of experts some may not be called, so a role counts as reached if one of its layers is.
    """
    if not isinstance(model, PreTrainedModel) or any(parameter.is_meta for parameter in model.parameters()):
        return
    reached: set[str] = set()

    def note(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            reached.add(role(name))

    hooks = [
        layer.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, layer in layers.items()
    ]
    was_training, device = model.training, next(model.parameters()).device
    ids = torch.arange(8, device=device)[None] % settings(model)["vocab_size"]
    with seeded(0, "reached"), gathering(model), torch.no_grad():
        model.train()(input_ids=ids, use_cache=False)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    passed_by = sorted({*roles(layers)} - reached)
    if passed_by:
        kept = ", ".join(sorted({*roles(layers)} & reached))
        raise UserMistake(
            f"a {model.config.model_type} model computes past its layers {', '.join(passed_by)}, so adapters on them would not act; "
            f"leave them out: targets [{kept}] (conf/method)"
        )
