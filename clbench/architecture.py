"""The parts of a Hugging Face causal language model that clbench reads: its decoder, the decoder's layers, how far they look."""

from __future__ import annotations

from torch.nn import Module


def causal_lm(model: Module) -> Module:
    """The Hugging Face causal language model inside its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layers(decoder: Module) -> list[Module]:
    """The decoder's layers, the first one first."""
    return [part for part in decoder.modules() if type(part).__name__ in decoder._no_split_modules]


def sliding_window(model: Module) -> int | None:
    """How many tokens back the layers that do not see all of them look, themselves counted; None where every layer sees all."""
    return getattr(causal_lm(model).config, "sliding_window", None)


def in_slices(module: Module) -> bool:
    """Whether ranks hold slices of its weights, so that all of them must call it alike."""
    return any(hasattr(parameter, "ds_tensor") for parameter in module.parameters())


def is_compiled(decoder: Module) -> bool:
    """Whether torch compiles its layers."""
    return layers(decoder)[-1]._compiled_call_impl is not None
