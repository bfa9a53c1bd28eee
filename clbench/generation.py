"""Greedy decoding of one batch: every row stops by itself and leaves the batch.

Shape suffixes: B rows still being written, T tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from clbench.loss import causal_lm, project

Ids = tuple[int, ...]


def decode(
    model: Module,
    prompts: Sequence[Ids],
    *,
    shared: int,
    max_new_tokens: int,
    end: int,
    pad: int,
    device: torch.device,
    has_ended: Callable[[list[list[int]]], list[bool]] | None = None,
) -> list[list[int]]:
    """The likeliest next token, again and again, after each prompt: its token ids without `end`.

    The prompts' first `shared` tokens are the same and read once; what follows is padded on the left. A row is done at `end`, where
    `has_ended` says so of what the rows wrote so far, and after `max_new_tokens`.
    """
    inner = causal_lm(model)
    decoder = inner.get_decoder()
    ids_BT, mask_BT = pad_left([ids[shared:] for ids in prompts], pad=pad, device=device)
    room = max_new_tokens + (ids_BT.shape[1] if shared else 0)
    cache = Cache(layers=[Reserved(room) for _ in range(inner.config.num_hidden_layers)])
    if shared:
        beginning = DynamicCache()
        decoder(input_ids=torch.tensor([prompts[0][:shared]], device=device), past_key_values=beginning, use_cache=True)
        for layer, read in zip(cache.layers, beginning.layers, strict=True):
            layer.update(*(states.expand(len(prompts), -1, -1, -1) for states in (read.keys, read.values)))
        mask_BT = torch.cat([mask_BT.new_ones(len(prompts), shared), mask_BT], dim=1)
    written: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    for step in range(max_new_tokens):
        state_BTH = decoder(
            input_ids=ids_BT,
            attention_mask=None if bool(mask_BT.all()) else mask_BT,
            position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        next_B = project(inner, state_BTH[:, -1]).argmax(-1)
        tokens = next_B.tolist()
        for row, token in zip(live, tokens, strict=True):
            if token != end:
                written[row].append(token)
        stopped = has_ended([written[row] for row in live]) if has_ended else [False] * len(live)
        going = [place for place, token in enumerate(tokens) if token != end and not stopped[place]]
        if not going or step + 1 == max_new_tokens:
            break
        if len(going) < len(live):
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            next_B, mask_BT, live = next_B[kept], mask_BT[kept], [live[place] for place in going]
        ids_BT = next_B[:, None]
        mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], dim=1)
    return written


class Reserved(DynamicLayer):
    """A layer's keys and values with room for `room` more tokens than it is first given, so that a new one is written, not the old ones copied."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.length = 0
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Adds the newest tokens'; gives all so far, [rows, heads, tokens, width]."""
        if self.buffers is None:
            self.lazy_initialization(key_states, value_states)
            rows, heads, tokens, width = key_states.shape
            self.buffers = (
                key_states.new_empty(rows, heads, tokens + self.room, width),
                value_states.new_empty(rows, heads, tokens + self.room, value_states.shape[-1]),
            )
        last = self.length + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : last] = states
        self.length = last
        return self._look()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows."""
        assert self.buffers is not None
        self.buffers = (self.buffers[0][indices], self.buffers[1][indices])
        self._look()

    def _look(self) -> tuple[Tensor, Tensor]:
        assert self.buffers is not None
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values


def pad_left(rows: Sequence[Ids], *, pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, T], filled up with `pad` on the left, and which of them count (1)."""
    length = max(map(len, rows))
    ids_BT = torch.tensor([[pad] * (length - len(ids)) + list(ids) for ids in rows])
    mask_BT = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in rows])
    return ids_BT.to(device), mask_BT.to(device)
