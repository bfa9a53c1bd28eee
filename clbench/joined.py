"""Rows of unequal length read as one, without what fills them up: where each token costs its own time, on the CPU.

Everything in a decoder but attention treats tokens alone, so rows can follow one another in a single one; attention takes them apart again and is
computed row by row, in a function that the model's attention modules are pointed to. Without `row_lengths` that is transformers' own.

Shape suffixes: B rows, T tokens of the longest, N tokens of all, W wanted places of a row, H hidden.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from clbench.architecture import in_slices, is_compiled, sliding_window, tried
from clbench.last_layer import Unforeseen, hidden_at

NAME = "clbench_row_by_row"
NO_MASK = torch.zeros(1, 1, 1, 1)
"""Stands where a mask would be, as transformers makes one where there is none."""

_known: WeakKeyDictionary[Module, bool] = WeakKeyDictionary()


def row_by_row(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_lengths: tuple[int, ...] | None = None,
    row_masks: tuple[Tensor, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention [1, N, heads, width] of rows that follow one another, [1, heads, N, width] each of query, key and value.

    With `row_masks` [1, 1, queries, tokens] those queries of each row; else those of all tokens, each seeing what is before it in its row.
    """
    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not NO_MASK or kwargs.get("position_bias") is not None:
        raise Unforeseen("its attention makes a mask of its own")
    masks = row_masks or (None,) * len(row_lengths)
    queries = query.split([mask.shape[2] for mask in row_masks] if row_masks else row_lengths, dim=2)
    rows = zip(queries, key.split(row_lengths, dim=2), value.split(row_lengths, dim=2), masks, strict=True)
    found = [sdpa_attention_forward(module, *row, **kwargs)[0] for row in rows if row[0].shape[2]]
    return torch.cat(found, dim=1), None


AttentionInterface.register(NAME, row_by_row)


@dataclass(frozen=True)
class Joined:
    """Rows of `row_lengths` tokens, one after another: `input_ids`, `position_ids` [1, N]; `starts_B1` where each begins, `real_BT` where it was."""

    row_lengths: tuple[int, ...]
    input_ids: Tensor
    position_ids: Tensor
    starts_B1: Tensor
    real_BT: Tensor

    @property
    def inputs(self) -> dict[str, Any]:
        """What the decoder is called with."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": NO_MASK,
            "row_lengths": self.row_lengths,
            "use_cache": False,
        }

    def apart(self, hidden_1NH: Tensor) -> Tensor:
        """[B, T, H], zeros where rows are filled up."""
        apart_BTH = hidden_1NH.new_zeros(*self.real_BT.shape, hidden_1NH.shape[-1])
        return apart_BTH.masked_scatter(self.real_BT[..., None], hidden_1NH)


def join(decoder: Module, ids_BT: Tensor, mask_BT: Tensor) -> Joined | None:
    """The rows joined; None where that saves nothing, or the decoder does not read them so. `mask_BT` is 1 where a row has tokens, on its left."""
    if ids_BT.device.type != "cpu" or bool(mask_BT.all()) or not reads_joined(decoder):
        return None
    window = sliding_window(decoder)
    if window is not None and int(mask_BT.sum(1).max()) > window:
        return None
    return joined(ids_BT, mask_BT)


def joined(ids_BT: Tensor, mask_BT: Tensor) -> Joined:
    """The rows, one after another."""
    lengths, real_BT = mask_BT.sum(1), mask_BT.bool()
    positions_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    return Joined(
        row_lengths=tuple(lengths.tolist()),
        input_ids=ids_BT[real_BT][None],
        position_ids=positions_BT[real_BT][None],
        starts_B1=(lengths.cumsum(0) - lengths)[:, None],
        real_BT=real_BT,
    )


def reads_joined(decoder: Module) -> bool:
    """Whether the decoder reads joined rows as it reads each; found out once per decoder. Not in bfloat16, for the reason of `last_layer`."""
    if in_slices(decoder) or is_compiled(decoder) or decoder.dtype != torch.float32:
        return False
    return tried(_known, decoder, _try_out, "is read in padded rows: it does not take rows of unequal length as one")


@torch.inference_mode()
def _try_out(decoder: Module) -> bool:
    if (
        not decoder._supports_attention_backend
        or decoder.config._attn_implementation != "sdpa"
        or decoder.config.to_dict().get("attention_chunk_size")
    ):
        return False
    ids_BT = (torch.arange(15).reshape(3, 5) * 7 + 3) % decoder.config.vocab_size
    real_BT = torch.arange(5) < torch.tensor([[5], [2], [4]])
    expected_NH = decoder(input_ids=ids_BT, use_cache=False).last_hidden_state[real_BT]
    config = copy.copy(decoder.config)
    config._attn_implementation = NAME
    pointed = [
        part for part in decoder.modules() if "layer_idx" in vars(part) and vars(part).get("config") is decoder.config
    ]
    for module in pointed:
        module.config = config
    good = False
    try:
        rows = joined(ids_BT, real_BT.long())
        places_1N = torch.tensor([[0, 4, 5, 7, 10]])
        whole_NH = decoder(**rows.inputs).last_hidden_state[0]
        wanted_NH = hidden_at(decoder, places_1N, **rows.inputs)[0]
        limit = 1e-3 * expected_NH.abs().max()
        good = bool(
            ((whole_NH - expected_NH).abs() <= limit).all()
            and ((wanted_NH - expected_NH[places_1N[0]]).abs() <= limit).all()
        )
    finally:
        for module in pointed if not good else ():
            module.config = decoder.config
    return good
