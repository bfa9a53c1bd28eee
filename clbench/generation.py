"""Greedy decoding of one batch: every row stops by itself and leaves the batch.

Shape suffixes: B rows still being written, T tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from transformers import DynamicCache

from clbench.loss import causal_lm, project

Ids = tuple[int, ...]


def decode(
    model: Module,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int,
    end: int,
    pad: int,
    device: torch.device,
    has_ended: Callable[[list[list[int]]], list[bool]] | None = None,
) -> list[list[int]]:
    """The likeliest next token, again and again, after each prompt: its token ids without `end`.

    A row is done at `end`, where `has_ended` says so of what the rows wrote so far, and after `max_new_tokens`. Prompts are padded on the left.
    """
    inner = causal_lm(model)
    decoder = inner.get_decoder()
    ids_BT, mask_BT = pad_left(prompts, pad=pad, device=device)
    cache = DynamicCache(config=inner.config)
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


def pad_left(rows: Sequence[Ids], *, pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, T], filled up with `pad` on the left, and which of them count (1)."""
    length = max(map(len, rows))
    ids_BT = torch.tensor([[pad] * (length - len(ids)) + list(ids) for ids in rows])
    mask_BT = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in rows])
    return ids_BT.to(device), mask_BT.to(device)
