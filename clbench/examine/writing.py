"""Greedy decoding of a batch of prompts; every row stops by itself and leaves the batch.

Shape suffixes: B rows still being written, T tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedTokenizerBase

from clbench.data.encoder import Ids

HasEnded = Callable[[list[list[int]]], list[bool]]
"""Of the tokens that each row has written so far: whether the row is done."""


@torch.inference_mode()
def write_greedily(
    model: Module,
    prompts: Sequence[Ids],
    *,
    shared: int,
    max_new_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    has_ended: HasEnded | None = None,
) -> list[list[int]]:
    """The likeliest next token, again and again, after each prompt: its token ids without EOS.

    The prompts' first `shared` tokens are the same and read once; the rest is padded on the left. A row is done at EOS, where `has_ended` says
    so and after `max_new_tokens`.
    """
    device, end = model.device, tokenizer.eos_token_id
    cache = DynamicCache()
    if shared:
        model(input_ids=torch.tensor([prompts[0][:shared]], device=device), past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(len(prompts))
    rests = [torch.tensor(prompt[shared:]) for prompt in prompts]
    ids_BT = pad_sequence(rests, True, tokenizer.pad_token_id, "left").to(device)
    seen_BT = pad_sequence([torch.ones_like(rest) for rest in rests], True, 0, "left").to(device)
    seen_BT = torch.cat([seen_BT.new_ones(len(prompts), shared), seen_BT], dim=1)
    is_padded = not bool(seen_BT.all())
    written: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    for step in range(max_new_tokens):
        positions_BT = (seen_BT.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        padding = {"attention_mask": seen_BT, "position_ids": positions_BT} if is_padded else {}
        logits_BV = model(input_ids=ids_BT, past_key_values=cache, logits_to_keep=1, **padding).logits[:, -1]
        tokens_B = logits_BV.argmax(-1)
        tokens = tokens_B.tolist()
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
            tokens_B, seen_BT, live = tokens_B[kept], seen_BT[kept], [live[place] for place in going]
        ids_BT = tokens_B[:, None]
        seen_BT = torch.cat([seen_BT, torch.ones_like(ids_BT)], dim=1)
    return written
