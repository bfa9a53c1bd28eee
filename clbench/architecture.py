"""The parts of a Hugging Face causal language model that clbench reads: its decoder, the decoder's layers, how far they look."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch.nn import Module, Parameter

_last: WeakKeyDictionary[Module, tuple[Module, tuple[Parameter, ...]]] = WeakKeyDictionary()


def causal_lm(model: Module) -> Module:
    """The Hugging Face causal language model inside its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layers(decoder: Module) -> list[Module]:
    """The decoder's layers, the first one first."""
    return [part for part in decoder.modules() if type(part).__name__ in decoder._no_split_modules]


def sliding_window(model: Module) -> int | None:
    """How many tokens back the layers that do not see all of them look, themselves counted; None where every layer sees all."""
    return getattr(causal_lm(model).config, "sliding_window", None)


def last_layer(decoder: Module) -> Module:
    """The last of `layers`; looked for once, as a walk through all modules takes longer than a layer of a small model."""
    if decoder not in _last:
        layer = layers(decoder)[-1]
        _last[decoder] = layer, tuple(layer.parameters())
    return _last[decoder][0]


def in_slices(decoder: Module) -> bool:
    """Whether ranks hold slices of its weights (all of them or none), so that every rank must call it alike."""
    last_layer(decoder)
    return any(hasattr(parameter, "ds_tensor") for parameter in _last[decoder][1])


def is_compiled(decoder: Module) -> bool:
    """Whether torch compiles its layers."""
    return last_layer(decoder)._compiled_call_impl is not None
