"""The parts of a Hugging Face causal language model that clbench reads: its decoder, the decoder's layers, how far they look."""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.nn import Module, Parameter

from clbench.types import UserMistake

log = logging.getLogger("clbench")
_last: WeakKeyDictionary[Module, tuple[Module | None, tuple[Parameter, ...]]] = WeakKeyDictionary()

REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What code of others raises when it is called as it was not written for."""


def causal_lm(model: Module) -> Module:
    """The Hugging Face causal language model inside its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layers(decoder: Module) -> list[Module]:
    """The decoder's layers, the first one first."""
    return [part for part in decoder.modules() if type(part).__name__ in (decoder._no_split_modules or ())]


def sliding_window(model: Module) -> int | None:
    """How many tokens back the layers that do not see all of them look, themselves counted; None where every layer sees all."""
    # Some configurations say 0 for none.
    return getattr(causal_lm(model).config, "sliding_window", None) or None


def soft_cap(model: Module) -> float | None:
    """What the logits stay within, by a hyperbolic tangent; None where nothing caps them."""
    return getattr(causal_lm(model).config, "final_logit_softcapping", None)


def last_layer(decoder: Module) -> Module | None:
    """The last of `layers`, if it has any; looked for once, as a walk through all modules takes longer than a layer of a small model."""
    if decoder not in _last:
        layer = next(reversed(layers(decoder)), None)
        _last[decoder] = layer, tuple((layer or decoder).parameters())
    return _last[decoder][0]


def tried(
    known: MutableMapping[Module, bool], model: Module, try_out: Callable[[Module], bool], otherwise: str
) -> bool:
    """What `try_out` says of `model` in eval mode, found out once and kept in `known`; where it says no or fails, `otherwise` is said."""
    if model not in known:
        training = [part for part in model.modules() if part.training]
        model.eval()
        try:
            known[model], reason = try_out(model), ""
        except UserMistake:
            raise
        except REFUSALS as error:
            known[model], reason = False, f" ({type(error).__name__}: {error})".splitlines()[0]
        finally:
            for part in training:
                part.training = True
        if not known[model]:
            log.info("%s %s%s", type(model).__name__, otherwise, reason)
    return known[model]


def is_sharded(parameter: Tensor) -> bool:
    """Whether this rank keeps a slice of it."""
    return hasattr(parameter, "ds_tensor")


def in_slices(decoder: Module) -> bool:
    """Whether ranks hold slices of its weights (all of them or none), so that every rank must call it alike."""
    last_layer(decoder)
    return any(map(is_sharded, _last[decoder][1]))


def is_compiled(decoder: Module) -> bool:
    """Whether torch compiles its layers."""
    layer = last_layer(decoder)
    return layer is not None and layer._compiled_call_impl is not None
