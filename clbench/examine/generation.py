"""Greedy decoding of one batch: prompts are read in parts of like length, every row stops by itself and leaves the batch.

Shape suffixes: B rows still being written, T tokens of the longest prompt after what all share, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from clbench.models.architecture import causal_lm
from clbench.models.last_layer import hidden_at, keys_and_values
from clbench.models.loss import project

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
    tokens_per_batch: int,
    has_ended: Callable[[list[list[int]]], list[bool]] | None = None,
) -> list[list[int]]:
    """The likeliest next token, again and again, after each of `prompts`, the longest first: its token ids without `end`.

    The prompts' first `shared` tokens are the same and read once; what follows is padded on the left, and read `tokens_per_batch` tokens
    at a time. A row is done at `end`, where `has_ended` says so of what the rows wrote so far, and after `max_new_tokens`.
    """
    inner = causal_lm(model)
    decoder = inner.get_decoder()
    ids_BT, mask_BT = pad_left([ids[shared:] for ids in prompts], pad=pad, device=device)
    mask_BT = torch.cat([mask_BT.new_ones(len(prompts), shared), mask_BT], dim=1)
    beginning = torch.tensor(prompts[0][:shared], dtype=torch.int64, device=device)
    cache, state_BH = prefill(
        decoder, ids_BT, mask_BT, shared=beginning, room=max_new_tokens, tokens_per_batch=tokens_per_batch
    )
    written: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    for step in range(max_new_tokens):
        next_B = project(inner, state_BH).argmax(-1)
        tokens = next_B.tolist()
        for row, token in zip(live, tokens, strict=True):
            if token != end:
                written[row].append(token)
        stopped = has_ended([written[row] for row in live]) if has_ended else [False] * len(live)
        going = [place for place, token in enumerate(tokens) if token != end and not stopped[place]]
        if not going or step + 1 == max_new_tokens:
            break
        if len(going) < len(live):
            order = closed_up(going)
            kept = torch.tensor(order, device=device)
            cache.batch_select_indices(kept)
            next_B, mask_BT, live = next_B[kept], mask_BT[kept], [live[place] for place in order]
        mask_BT = torch.cat([mask_BT, torch.ones_like(next_B)[:, None]], dim=1)
        state_BH = forward(decoder, next_B[:, None], mask_BT, cache)
    return written


def closed_up(going: Sequence[int]) -> list[int]:
    """The ascending places `going`, the last of them moved to where places are free, so that few rows move.

    >>> closed_up([0, 2, 3, 5])
    [0, 5, 2, 3]
    """
    staying = {place for place in going if place < len(going)}
    moving = iter(going[len(staying) :])
    return [place if place in staying else next(moving) for place in range(len(going))]


def prefill(
    decoder: Module, ids_BT: Tensor, mask_BT: Tensor, *, shared: Tensor, room: int, tokens_per_batch: int
) -> tuple[Cache, Tensor]:
    """Reads the prompts: their keys and values with `room` for more tokens, and the last hidden state of each [B, H].

    `shared` [tokens] is what comes before all of `ids_BT`, `mask_BT` covers both. Each part of the rows is as long as its longest.
    """
    beginning = DynamicCache()
    if len(shared):
        keys_and_values(decoder, shared[None], beginning)
    layers = [
        Reserved(rows=len(ids_BT), tokens=mask_BT.shape[1], room=room) for _ in range(decoder.config.num_hidden_layers)
    ]
    states, first = [], 0
    while first < len(ids_BT):
        length = int(mask_BT[first, len(shared) :].sum())
        last = first + max(1, tokens_per_batch // length)
        ids, mask = ids_BT[first:last, -length:], mask_BT[first:last]
        mask = torch.cat([mask[:, : len(shared)], mask[:, -length:]], dim=1)
        spread = ((layer.keys, layer.values) for layer in beginning.layers)
        part = DynamicCache([tuple(each.expand(len(ids), -1, -1, -1) for each in layer) for layer in spread])
        states.append(forward(decoder, ids, mask, part))
        for layer, read in zip(layers, part.layers, strict=True):
            layer.place(read.keys, read.values, first=first, shared=len(shared))
        first = last
    return Cache(layers=layers), torch.cat(states)


def forward(decoder: Module, ids_BT: Tensor, mask_BT: Tensor, cache: Cache) -> Tensor:
    """The hidden state of each row's last token [B, H]; `mask_BT` covers what the cache holds, too."""
    inputs = dict(
        input_ids=ids_BT,
        attention_mask=None if bool(mask_BT.all()) else mask_BT,
        position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    )
    last_B1 = ids_BT.new_full((len(ids_BT), 1), ids_BT.shape[1] - 1)
    return hidden_at(decoder, last_B1, **inputs)[:, 0]


class Reserved(DynamicLayer):
    """A layer's keys and values with room for more tokens, so that a new one is written and the old ones are not copied.

    `rows` prompts of `tokens` tokens are put in place first, on the right.
    """

    def __init__(self, *, rows: int, tokens: int, room: int) -> None:
        super().__init__()
        self.rows = rows
        self.room = room
        self.length = tokens
        self.buffers: tuple[Tensor, Tensor] | None = None

    def place(self, keys: Tensor, values: Tensor, *, first: int, shared: int) -> None:
        """Puts in the prompts from row `first` on; their first `shared` tokens on the left, where nothing fills them up."""
        if self.buffers is None:
            self.lazy_initialization(keys, values)
            # Zeros: what is masked must still be a number.
            self.buffers = tuple(
                states.new_zeros(self.rows, states.shape[1], self.length + self.room, states.shape[3])
                for states in (keys, values)
            )
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            rows = buffer[first : first + len(states)]
            rows[:, :, :shared] = states[:, :, :shared]
            rows[:, :, self.length - (states.shape[2] - shared) : self.length] = states[:, :, shared:]
        self._look()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Adds the newest tokens'; gives all so far, [rows, heads, tokens, width]."""
        last = self.length + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : last] = states
        self.length = last
        return self._look()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows; those that change places come from behind the last place kept, and are all that is copied."""
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        assert bool((indices[moved] >= len(indices)).all()), indices
        for buffer in self.buffers:
            buffer[moved, :, : self.length] = buffer[indices[moved], :, : self.length]
        self.buffers = tuple(buffer[: len(indices)] for buffer in self.buffers)
        self._look()

    def _look(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values


def pad_left(rows: Sequence[Ids], *, pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, T], filled up with `pad` on the left, and which of them count (1)."""
    length = max(map(len, rows))
    ids_BT = torch.tensor([[pad] * (length - len(ids)) + list(ids) for ids in rows])
    mask_BT = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in rows])
    return ids_BT.to(device), mask_BT.to(device)
