"""Adapters folded into the weights while a model is examined, and export of an ordinary checkpoint."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from clbench.models.cur import CurLinear
from clbench.models.limits import shared_weights
from clbench.models.loss import causal_lm
from clbench.models.sharding import copied, is_first, is_sharded, stored, whole
from clbench.types import UserMistake


def adapted(model: Module) -> dict[str, BaseTunerLayer | CurLinear]:
    """The layers with adapters, by name."""
    layers = model.named_modules()
    return {name: layer for name, layer in layers if isinstance(layer, BaseTunerLayer | CurLinear)}


def foldable(model: Module) -> list[BaseTunerLayer | CurLinear]:
    """The adapted layers with a weight that is equal to layer and adapter (`CurLinear.foldable`), and that no other layer reads."""
    shared = shared_weights(model)
    return [
        layer
        for layer in adapted(model).values()
        if id(inner_layer(layer).weight) not in shared and (not isinstance(layer, CurLinear) or layer.foldable)
    ]


@contextmanager
def folded(model: Module) -> Iterator[Module]:
    """Adapters merged into the weights they adapt, for faster forwards; on exit every weight is bitwise what it was.

    Only into weights of float32: one of bfloat16 keeps 8 bits, and an update of less than half its last one would be lost. A model without
    adapters passes unchanged.
    """
    with merged_into(layer for layer in foldable(model) if inner_layer(layer).weight.dtype == torch.float32):
        yield model


@contextmanager
def merged_into(layers: Iterable[BaseTunerLayer | CurLinear]) -> Iterator[None]:
    """The layers' adapters merged into their weights, which are put back on exit."""
    layers = list(layers)
    weights = [inner_layer(layer).get_parameter("weight") for layer in layers]
    kept = [stored(weight).clone() for weight in weights]
    for layer in layers:
        with whole(inner_layer(layer), writing=True):
            merge(layer)
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, weight, before in zip(layers, weights, kept, strict=True):
                unmerge(layer)
                stored(weight).copy_(before)


def inner_layer(layer: BaseTunerLayer | CurLinear) -> Module:
    """The ordinary layer inside an adapted one."""
    return layer.base if isinstance(layer, CurLinear) else layer.get_base_layer()


@torch.inference_mode(False)  # PEFT puts another tensor in the place of some weights, and training goes on with it
@torch.no_grad()
def merge(layer: BaseTunerLayer | CurLinear) -> None:
    """Writes the layer's update into its weight; the layer's outputs stay what they were."""
    if isinstance(layer, CurLinear):
        layer.weight.copy_(layer.effective_weight(layer.core()))
        layer.folded = True
    else:
        layer.merge(safe_merge=False)


def unmerge(layer: BaseTunerLayer | CurLinear) -> None:
    """Marks the layer as not merged; its weight is the caller's to put back, bit for bit, which PEFT's own subtraction would not do."""
    if isinstance(layer, CurLinear):
        layer.folded = False
    else:
        layer.merged_adapters.clear()


def export(model: Module, folder: Path) -> None:
    """Writes an ordinary Hugging Face checkpoint to `folder`, adapters merged: the same logits from transformers alone.

    In bfloat16 the merged weights are rounded, and the logits differ by that.
    Of several processes all call it and the first one writes, from whole weights on its CPU where ranks hold slices.
    PEFT adapters go to `folder`/adapter as well; they are for the weights they adapt now, which merging methods change.
    """
    with merged_into(foldable(model)):
        plain = ordinary(causal_lm(model))
        if is_first():
            plain.save_pretrained(folder)
    if isinstance(model, PeftModel) and is_first():
        for adapter in model.peft_config.values():
            base = Path(str(adapter.base_model_name_or_path))
            if base.is_dir():  # which is to be found from wherever the adapter is opened
                adapter.base_model_name_or_path = str(base.resolve())
        model.save_pretrained(str(folder / "adapter"))


def ordinary(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same architecture without adapters that shares the tensors of `model`, whose adapters are folded.

    Where layers gained a bias, biases that the architecture then asks for besides are 0.
    """
    state, config = ordinary_state(model), copy.deepcopy(model.config)
    with torch.device("meta"):
        plain = type(model)(config)
        if not state.keys() <= plain.state_dict().keys() and "attention_bias" in config.to_dict():
            config.attention_bias = True
            plain = type(model)(config)
    expected = plain.state_dict()
    homeless = sorted(state.keys() - expected.keys())
    if homeless:
        kind = type(model).__name__
        raise UserMistake(f"{kind} has no place for {homeless[0]}; to export it, train with method.train_bias=false")
    missing = expected.keys() - state.keys()
    zeros = {name: torch.zeros(expected[name].shape, dtype=model.dtype, device=model.device) for name in missing}
    assert all(name.endswith(".bias") for name in missing), sorted(missing)
    plain.load_state_dict(state | zeros, assign=True)
    plain.generation_config = model.generation_config
    return plain


def ordinary_state(model: Module) -> dict[str, Tensor]:
    """The tensors of a model whose adapters are folded, by the names they have in a model without adapters; of slices, copies of the whole."""
    state, shared = dict(model.state_dict(keep_vars=True)), shared_weights(model)
    for name, layer in adapted(model).items():
        state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
        plain = dict(inner_layer(layer).state_dict(keep_vars=True))
        if id(inner_layer(layer).weight) in shared:
            raise UserMistake(f"{name} is adapted and its weight is another layer's, too: it cannot be exported")
        if isinstance(layer, CurLinear) and not layer.foldable:
            raise UserMistake(
                f"{name} has outputs that no weight gives, so it cannot be exported; change method.magnorm"
            )
        if isinstance(layer, CurLinear) and layer.beta is not None:
            with whole(layer.base):
                plain["bias"] = layer.shifted(plain.get("bias", torch.zeros_like(layer.weight[:, 0]))).detach()
        state |= {f"{name}.{key}": tensor for key, tensor in plain.items()}
    # By identity, so that tied tensors stay tied.
    found = {tensor: copied(tensor) if is_sharded(tensor) else tensor.detach() for tensor in state.values()}
    return {name: found[tensor] for name, tensor in state.items()}
