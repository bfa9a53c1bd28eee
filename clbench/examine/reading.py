"""A causal language model reading sequences: last hidden states where they are asked for, shared beginnings computed once.

Shape suffixes: B rows, T tokens of a row, S tokens it sees, H hidden, N wanted places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module
from transformers import Cache, DynamicCache

from clbench.examine.packing import Group, Packed, Read, forwards, groups
from clbench.models.architecture import causal_lm, sliding_window, tried
from clbench.models.last_layer import filled, hidden_at, keys_and_values
from clbench.models.loss import project
from clbench.types import UserMistake

_known: WeakKeyDictionary[Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Reader:
    """`model` on `device`; `tokens_per_batch` bounds rows times padded length of a forward; without `branching` each read is a row of its own."""

    model: Module
    device: torch.device
    tokens_per_batch: int
    branching: bool

    def plan(self, reads: Sequence[Read]) -> Iterator[tuple[Group, Iterator[Packed]]]:
        """The forwards that `reads` take, by the beginning that they share."""
        for group in groups(reads, branching=self.branching):
            yield group, forwards(group, reads, tokens_per_batch=self.tokens_per_batch)

    def states(self, reads: Sequence[Read]) -> Iterator[tuple[Packed, Tensor]]:
        """Per forward the last hidden states [N, H] at its wanted places."""
        for group, batches in self.plan(reads):
            beginning = self._beginning(group) if group.shared else None
            for packed in batches:
                yield packed, self._hidden(packed, beginning)

    def _beginning(self, group: Group) -> Cache:
        """Keys and values of what the group's rows share."""
        cache = DynamicCache()
        ids_1T = torch.from_numpy(group.rows[0].ids[None, : group.shared]).to(self.device)
        keys_and_values(causal_lm(self.model).get_decoder(), ids_1T, cache)
        return cache

    def _hidden(self, packed: Packed, beginning: Cache | None) -> Tensor:
        """Last hidden states [N, H] of one forward. What fills a row up is on its right, where no token of the row sees it."""
        rows, length = packed.ids_BT.shape
        places_BW, wanted_N = filled(packed.wanted // length, packed.wanted % length, rows=rows)
        decoder = causal_lm(self.model).get_decoder()
        inputs = {"use_cache": False} if packed.sees_BTS is None else self._tree(packed, beginning)
        inputs["input_ids"] = torch.from_numpy(packed.ids_BT).to(self.device)
        hidden_BWH = hidden_at(decoder, torch.from_numpy(places_BW).to(self.device), **inputs)
        return hidden_BWH.flatten(0, 1)[torch.from_numpy(wanted_N).to(self.device)]

    def _tree(self, packed: Packed, beginning: Cache | None) -> dict[str, Any]:
        """What says which tokens see which, where that is not what is before them in their row."""
        rows, cache = len(packed.ids_BT), None
        if beginning is not None:
            spread = ((layer.keys, layer.values) for layer in beginning.layers)
            cache = DynamicCache([tuple(part.expand(rows, -1, -1, -1) for part in layer) for layer in spread])
        return {
            "position_ids": torch.from_numpy(packed.depths_BT).to(self.device),
            "attention_mask": self._mask(packed),
            "past_key_values": cache,
            "use_cache": cache is not None,
        }

    def _mask(self, packed: Packed) -> Tensor | dict[str, Tensor]:
        """What is added to attention's logits [B, 1, T, S]: one for all layers, or one for each kind of layer that the model has."""
        assert packed.sees_BTS is not None
        inner = causal_lm(self.model)
        sees_BTS = torch.from_numpy(packed.sees_BTS)
        window = sliding_window(self.model)
        if window is None:
            return additive(sees_BTS, dtype=inner.dtype, device=self.device)
        depths_BT = torch.from_numpy(packed.depths_BT)
        seen_BS = torch.cat([torch.arange(packed.shared).expand(len(depths_BT), -1), depths_BT], dim=1)
        near_BTS = sees_BTS & (depths_BT[:, :, None] - seen_BS[:, None, :] < window)
        near = additive(near_BTS, dtype=inner.dtype, device=self.device)
        if getattr(inner.config, "layer_types", None) is None:
            return near
        return {"full_attention": additive(sees_BTS, dtype=inner.dtype, device=self.device), "sliding_attention": near}


def additive(sees_BTS: Tensor, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 where a token is seen and the lowest number where it is not, [B, 1, T, S]."""
    mask_BTS = torch.zeros(sees_BTS.shape, dtype=dtype).masked_fill_(~sees_BTS, torch.finfo(dtype).min)
    return mask_BTS[:, None].to(device)


def branches(model: Module, device: torch.device) -> bool:
    """Whether the model reads a tree of tokens as it reads each branch; found out once per model, said where it does not.

    Raises UserMistake for a model whose logits are not its output embedding of the last hidden state, on which all scores and losses rest.
    """
    inner = causal_lm(model)
    try_out = partial(_try_out, device=device)
    return tried(_known, inner, try_out, "is read one continuation at a time: it does not take trees of tokens")


@torch.inference_mode()
def _try_out(inner: Module, device: torch.device) -> bool:
    trunk = tuple((7 * place + 3) % inner.config.vocab_size for place in range(40))
    reads = [Read((*trunk, *end), len(trunk)) for end in ((5, 6, 7), (5, 8), (9,))]
    reads += [Read((*trunk, 11, 12, *trunk), len(trunk) + 2)]
    plain = Reader(model=inner, device=device, tokens_per_batch=1, branching=False)
    alone = {index: states_NH for packed, states_NH in plain.states(reads) for index in packed.members}
    ids_1T = torch.tensor([reads[-1].ids], device=device)
    logits, ours = inner(input_ids=ids_1T).logits[0, reads[-1].first :].float(), project(inner, alone[3])
    tolerance = 1e-3 if inner.dtype == torch.float32 else 5e-2
    if not close(logits, ours, tolerance):
        raise UserMistake(
            f"{type(inner).__name__} does not make its logits from its output embedding of the last hidden state alone; choose another model"
        )
    if not getattr(inner, "_supports_attention_backend", False) or inner.config._attn_implementation not in (
        "sdpa",
        "eager",
    ):
        return False
    together = Reader(model=inner, device=device, tokens_per_batch=4096, branching=True)
    return all(
        close(
            states_NH[torch.from_numpy(packed.places).to(device)],
            torch.cat([alone[index] for index in packed.members]),
            tolerance,
        )
        for packed, states_NH in together.states(reads)
    )


def close(left: Tensor, right: Tensor, tolerance: float) -> bool:
    """Whether the largest difference is within `tolerance` of the largest entry."""
    return float((left - right).abs().max()) <= tolerance * float(right.abs().max())
