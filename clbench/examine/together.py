"""Whether a model may read several sequences in one forward: rows packed end to end, batches padded on the left, a beginning read once."""

import copy

import torch
from torch.nn import Module

from clbench.data.encoder import Encoder, Ids
from clbench.examine.student import Student
from clbench.models.loss import causal_lm

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Nats a token between two ways of computing a log-likelihood that count as rounding."""
STRETCHED = ("dynamic", "longrope")
"""Kinds of rotary embedding that depend on the longest position of a forward, so that rows change each other."""


def reads_together(model: Module, encoder: Encoder) -> bool:
    """Whether scores and written tokens of a few random sequences are the same in one forward and one at a time."""
    inner = causal_lm(model)
    config = inner.config.get_text_config().to_dict()
    rope = (config.get("rope_parameters") or {}).get("rope_type")
    if not inner._supports_attention_backend or inner.config._attn_implementation not in ("sdpa", "eager"):
        return False
    if rope in STRETCHED or config.get("attention_chunk_size"):
        return False
    one, many = copy.copy(encoder), copy.copy(encoder)
    one.together, many.together = False, True
    alone, together = Student(model, one), Student(model, many)
    requests, prompts = _questions(config["vocab_size"])
    pairs = zip(alone.log_likelihoods(requests), together.log_likelihoods(requests), strict=True)
    gap = max(
        abs(a - b) / len(continuation) for ((a, _), (b, _)), (_, continuation) in zip(pairs, requests, strict=True)
    )
    written = [student.write(prompts, max_new_tokens=2) for student in (alone, together)]
    return gap <= TOLERANCES[inner.dtype] and written[0] == written[1]


def _questions(vocabulary: int) -> tuple[list[tuple[Ids, Ids]], list[Ids]]:
    """(context, continuation) pairs, some with a long common beginning, and prompts of several lengths."""
    rng = torch.Generator().manual_seed(0)

    def draw(length: int) -> Ids:
        return tuple(torch.randint(vocabulary, (length,), generator=rng).tolist())

    beginning = draw(40)
    contexts = [draw(9), draw(4), (*beginning, *draw(3)), (*beginning, *draw(6))]
    requests = [(context, draw(length)) for context in contexts for length in (1, 3, 5)]
    return requests, contexts
