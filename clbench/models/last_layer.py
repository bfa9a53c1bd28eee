"""The last layer where it is read: of all tokens what leads to keys and values, the rest at the wanted places alone.

Nothing reads the last layer at a prompt's tokens but for the last of them, so its MLP and its attention's output are work for nothing there:
in a model of four layers about a fifth of a forward and of a backward pass. The layer is called twice, for architectures whose attention
gives keys and values to a transformers `Cache` (found out by trying). The first call, on all tokens, ends where they are handed over; the
second, on the wanted tokens, gets those. Gradients flow through both.

Shape suffixes: B rows, T tokens of a row, S tokens it sees, W wanted places of a row, H hidden, N wanted places of all rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from clbench.models.architecture import in_slices, is_compiled, last_layer, tried

Integers = NDArray[np.int64]

_known: WeakKeyDictionary[Module, bool] = WeakKeyDictionary()


def filled(rows_N: Integers, places_N: Integers, *, rows: int) -> tuple[Integers, Integers]:
    """Each row's places in a row of their own, filled up with its last one, [B, W]; and where in it, flattened, each of the N is.

    `rows_N` ascend. A row without a place has place 0.

    >>> filled(np.array([0, 0, 2]), np.array([4, 5, 7]), rows=3)
    (array([[4, 5],
           [0, 0],
           [7, 7]]), array([0, 1, 4]))
    """
    counts_B = np.bincount(rows_N, minlength=rows)
    first_B = np.cumsum(counts_B) - counts_B
    widest = max(1, int(counts_B.max()))
    slots_N = np.arange(len(rows_N)) - first_B[rows_N]
    places_BW = np.zeros((rows, widest), dtype=np.int64)
    last_B = np.minimum(first_B + counts_B, len(places_N)) - 1
    places_BW[counts_B > 0] = places_N[last_B[counts_B > 0], None]
    places_BW[rows_N, slots_N] = places_N
    return places_BW, rows_N * widest + slots_N


def hidden_at(decoder: Module, places_BW: Tensor, *, input_ids: Tensor, **inputs: Any) -> Tensor:
    """The decoder's last hidden states [B, W, H] at these places of `input_ids` [B, T], after its last norm."""
    # With most places wanted, a second call costs more than it saves.
    if 4 * places_BW.shape[1] <= 3 * input_ids.shape[1] and is_callable_twice(decoder):
        return _narrowed(decoder, places_BW, input_ids=input_ids, **inputs)
    return states_at(decoder(input_ids=input_ids, **inputs).last_hidden_state, places_BW)


def keys_and_values(decoder: Module, ids_BT: Tensor, cache: Cache) -> None:
    """Adds those of `ids_BT` to `cache`."""
    hidden_at(decoder, ids_BT.new_zeros(len(ids_BT), 1), input_ids=ids_BT, past_key_values=cache, use_cache=True)


def states_at(hidden_BTH: Tensor, places_BW: Tensor) -> Tensor:
    """Of each row these places, [B, W, H]."""
    return hidden_BTH[_rows(places_BW), places_BW]


def is_callable_twice(decoder: Module) -> bool:
    """Whether its last layer can be called as this file does: not while it is compiled or its weights are in slices.

    In bfloat16 it is not: products of few rows are rounded otherwise there than those of many, so that two ranks would part from one process.
    """
    if in_slices(decoder) or is_compiled(decoder) or decoder.dtype != torch.float32:
        return False
    return tried(_known, decoder, _try_out, "is read whole: its last layer cannot be read at some places alone")


@torch.inference_mode()
def _try_out(decoder: Module) -> bool:
    """Whether two calls give what one does, with keys and values from before and without."""
    layer = last_layer(decoder)
    if (
        layer is None
        or not decoder._supports_attention_backend
        or decoder.config._attn_implementation not in ("sdpa", "eager")
        or "past_key_values" not in inspect.signature(layer.forward).parameters
    ):
        return False
    device = decoder.device
    ids_BT = (torch.arange(80, device=device).reshape(2, 40) * 7 + 3) % decoder.config.vocab_size
    places_BW = torch.tensor([[2, 39], [11, 20]], device=device)
    before, again = DynamicCache(), DynamicCache()
    for cache in (before, again):
        decoder(input_ids=ids_BT, past_key_values=cache, use_cache=True)
    for one, other in (({"use_cache": False},) * 2, ({"past_key_values": before}, {"past_key_values": again})):
        whole_BWH = states_at(decoder(input_ids=ids_BT, **one).last_hidden_state, places_BW)
        narrow_BWH = _narrowed(decoder, places_BW, input_ids=ids_BT, **other)
        if not ((narrow_BWH - whole_BWH).abs() <= 1e-3 * whole_BWH.abs().max()).all():
            return False
    return True


def _narrowed(decoder: Module, places_BW: Tensor, **inputs: Any) -> Tensor:
    layer = last_layer(decoder)
    tokens = inputs["input_ids"].shape[1]
    before = layer.register_forward_pre_hook(partial(_narrow, places_BW), with_kwargs=True)
    # The decoder is given as many states as it gave; zeros are not looked at.
    after = layer.register_forward_hook(lambda _layer, _args, states_BWH: _widened(states_BWH, tokens))
    # Of the last layer it saves no memory: the backward pass begins with it.
    recomputed = isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
    if recomputed:
        layer.gradient_checkpointing = False
    try:
        return decoder(**inputs).last_hidden_state[:, : places_BW.shape[1]]
    finally:
        before.remove()
        after.remove()
        if recomputed:
            layer.gradient_checkpointing = True


def _narrow(
    places_BW: Tensor, layer: Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """The first call of `layer`, and what to call it with the second time instead of `args` and `kwargs`."""
    bound = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
    given = {**bound, **bound.get("kwargs", {})}
    given.pop("kwargs", None)
    hidden_BTH = given.pop("hidden_states")
    taken = _Taken(given.pop("past_key_values", None))
    try:
        layer.forward(hidden_BTH, past_key_values=taken, **given)
    except _HandedOver:
        pass
    if taken.whole is None:
        raise Unforeseen("its last layer hands no keys and values over")
    mask, row_lengths = given.pop("attention_mask", None), given.pop("row_lengths", None)
    if row_lengths is not None:
        row_masks = tuple(
            causal(places_W[None], seen=length, tokens=length, dtype=hidden_BTH.dtype)
            for places_W, length in zip(places_by_row(places_BW[0], row_lengths), row_lengths, strict=True)
        )
        given |= {"row_lengths": row_lengths, "row_masks": row_masks}
    elif mask is None:
        mask = causal(places_BW, seen=taken.whole[0].shape[-2], tokens=hidden_BTH.shape[1], dtype=hidden_BTH.dtype)
    else:
        mask = mask.expand(len(places_BW), -1, -1, -1)[_rows(places_BW), :, places_BW].transpose(1, 2)
    given |= {name: _at(places_BW, given[name]) for name in given.keys() & {"position_ids", "position_embeddings"}}
    if any(isinstance(value, Tensor) for name, value in given.items() if name != "position_ids"):
        raise Unforeseen("its last layer is given more than is known here")
    return (), {
        **given,
        "hidden_states": states_at(hidden_BTH, places_BW),
        "attention_mask": mask,
        "past_key_values": _Given(taken.whole),
    }


def places_by_row(places_N: Tensor, row_lengths: Sequence[int]) -> list[Tensor]:
    """Of rows that follow one another, the wanted places in each, from the row's own beginning.

    >>> places_by_row(torch.tensor([2, 3, 4]), (4, 2))
    [tensor([2, 3]), tensor([0])]
    """
    ends_R = torch.tensor(row_lengths).cumsum(0)
    counts = torch.bincount(torch.searchsorted(ends_R, places_N, right=True), minlength=len(ends_R)).tolist()
    return [
        part - (end - length)
        for part, end, length in zip(places_N.split(counts), ends_R.tolist(), row_lengths, strict=True)
    ]


def _widened(states_BWH: Tensor | tuple[Tensor, ...], tokens: int) -> Any:
    """[B, tokens, H], zeros behind the states."""
    if isinstance(states_BWH, tuple):
        return _widened(states_BWH[0], tokens), *states_BWH[1:]
    return pad(states_BWH, (0, 0, 0, tokens - states_BWH.shape[1]))


def causal(places_BW: Tensor, *, seen: int, tokens: int, dtype: torch.dtype) -> Tensor:
    """What is added to attention's logits [B, 1, W, S] where the model says no more than that a token sees what is before it."""
    assert seen == tokens, (seen, tokens)
    unseen_BWS = torch.arange(seen, device=places_BW.device) > places_BW[..., None]
    mask_BWS = torch.zeros(unseen_BWS.shape, dtype=dtype, device=places_BW.device)
    return mask_BWS.masked_fill_(unseen_BWS, torch.finfo(dtype).min)[:, None]


def _at(places_BW: Tensor, value: Tensor | tuple[Tensor, ...] | None) -> Any:
    """Positions or their embeddings, [B or 1, T, ...], of these places."""
    if isinstance(value, tuple):
        return tuple(_at(places_BW, part) for part in value)
    return None if value is None else value.expand(len(places_BW), *value.shape[1:])[_rows(places_BW), places_BW]


def _rows(places_BW: Tensor) -> Tensor:
    return torch.arange(len(places_BW), device=places_BW.device)[:, None]


class _HandedOver(Exception):  # noqa: N818
    """All tokens' keys and values are there."""


class Unforeseen(RuntimeError):  # noqa: N818
    """The layer keeps no keys and values, or is given what this file does not know."""


class _Taken(Cache):
    """Ends the layer's call when it gets its keys and values, and keeps them, those of `before` first."""

    def __init__(self, before: Cache | None) -> None:
        super().__init__(layers=[])
        self.before = before
        self.whole: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Takes [B, heads, T, width] each; never returns."""
        own = key_states, value_states
        self.whole = own if self.before is None else self.before.update(*own, layer_idx, *args, **kwargs)
        raise _HandedOver


class _Given(Cache):
    """Gives these keys and values, whatever it is told to add."""

    def __init__(self, whole: tuple[Tensor, Tensor]) -> None:
        super().__init__(layers=[])
        self.whole = whole

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[B, heads, S, width] each."""
        return self.whole
