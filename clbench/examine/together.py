"""Whether a model may read several sequences in one forward: rows packed end to end, batches padded on the left, a beginning read once.

And what it is held against: plain forwards, of one sequence without a cache. Shape suffixes: T tokens of a sequence, V vocabulary.
"""

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy

from clbench.data.encoder import Encoder
from clbench.examine.student import Student, eos_ids
from clbench.models.limits import is_kept_as_keys, is_stretched, positions, settings
from clbench.models.loss import causal_lm, pack, read
from clbench.types import Example, Ids

TOLERANCES = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (5e-2, 0.5)}
"""Nats a token between two ways of computing a log-likelihood that count as rounding, at least and at most; see `rounding`."""


def reads_together(model: Module, encoder: Encoder) -> bool:
    """Whether scores, written tokens and losses of a few random sequences are the same in one forward and one at a time."""
    inner = causal_lm(model)
    config = settings(inner)
    if not inner._supports_attention_backend or inner.config._attn_implementation not in ("sdpa", "eager"):
        return False
    if not is_kept_as_keys(inner) or config.get("attention_chunk_size"):
        return False
    one, many = copy.copy(encoder), copy.copy(encoder)
    one.together, many.together = False, True
    alone, together = Student(model, one), Student(model, many)
    requests, prompts = _questions(config["vocab_size"])
    pairs = zip(alone.log_likelihoods(requests), together.log_likelihoods(requests), strict=True)
    gaps = [abs(a - b) / len(continuation) for ((a, _), (b, _)), (_, continuation) in zip(pairs, requests, strict=True)]
    written = zip(prompts, together.write(prompts, max_new_tokens=2), strict=True)
    gaps += [off_the_likeliest(model, encoder, prompt, ids, most=2) for prompt, ids in written]
    gaps.append(_gap_in_training(inner, [context for context, _ in requests], many))
    allowed = rounding(model, encoder)
    return all(gap <= allowed for gap in gaps)  # each by itself, as a NaN is in no order


def rounding(model: Module, encoder: Encoder) -> float:
    """Nats a token between two ways of computing a log-likelihood that count as rounding.

    In bfloat16 models differ: twice as much as tokens behind a continuation, which it does not see, move it, of a few random sequences at most.
    """
    least, most = TOLERANCES[causal_lm(model).dtype]
    if least == most or is_stretched(model):
        return least
    requests, (after, *_) = _questions(settings(model)["vocab_size"])
    longest = positions(causal_lm(model).config)
    gaps = [
        abs(sum(nats(model, context, answer)) - sum(nats(model, context, (*answer, *after))[: len(answer)]))
        / len(answer)
        for context, answer in requests
        if len(context) + len(answer) + len(after) <= longest
    ]
    return float(np.clip(2 * np.max(gaps, initial=0.0), least, most))


@torch.inference_mode()
def log_probs(model: Module, ids: Ids, *, first: int) -> Tensor:
    """Log-probabilities in nats after each token of one sequence from the `first` on, [T - first, V], float32."""
    input_ids = torch.tensor([ids], device=causal_lm(model).device)
    return causal_lm(model)(input_ids=input_ids, use_cache=False).logits[0, first:].float().log_softmax(-1)


def nats(model: Module, context: Ids, continuation: Ids, *, unread: int = 1) -> list[float]:
    """The log-likelihood of each token of the continuation, of which the last `unread` are not read: scoring leaves out one, training none."""
    ids = (*context, *continuation)
    log_probs_TV = log_probs(model, ids[: len(ids) - unread], first=len(context) - 1)[: len(continuation)]
    return [float(row[token]) for row, token in zip(log_probs_TV, continuation, strict=True)]


def off_the_likeliest(model: Module, encoder: Encoder, prompt: Ids, written: Sequence[int], *, most: int) -> float:
    """By how many nats a written token, or the end of the answer, is less likely than the likeliest there, at most; inf of a token after an end."""
    log_probs_TV = log_probs(model, (*prompt, *written), first=len(prompt) - 1)
    if is_stretched(model):  # what is said after a token depends on what follows
        steps = [log_probs(model, (*prompt, *written[:count]), first=-1)[0] for count in range(len(written) + 1)]
        log_probs_TV = torch.stack(steps)
    ends = [encoder.eos, *eos_ids(causal_lm(model))]
    if not set(ends).isdisjoint(written):
        return math.inf
    chosen = [[token] for token in written] + [ends] * (len(written) < most)
    off = [float(row.max() - row[tokens].max()) for row, tokens in zip(log_probs_TV, chosen, strict=False)]
    return float(np.max(off))


@torch.inference_mode()
def _gap_in_training(model: Module, rows: list[Ids], encoder: Encoder) -> float:
    """The largest difference of a token's loss, in nats, between rows read as one and each by itself."""
    width = min(map(len, rows))
    examples = [Example(id="", prompt="", answer="", ids=row[-width:]) for row in rows]

    def losses(part: list[Example]) -> Tensor:
        packed = pack(encoder.collate(part))
        return cross_entropy(read(model, packed)[0].float(), packed.labels, reduction="none")

    return float((losses(examples) - torch.cat([losses([one]) for one in examples])).abs().max())


def _questions(vocabulary: int) -> tuple[list[tuple[Ids, Ids]], list[Ids]]:
    """(context, continuation) pairs, some with a long common beginning, and prompts of several lengths.

    Two contexts are longer than the blocks of tokens that an accelerator's attention reads at once.
    """
    rng = torch.Generator().manual_seed(0)

    def draw(length: int) -> Ids:
        return tuple(torch.randint(vocabulary, (length,), generator=rng).tolist())

    beginning = draw(40)
    prompts = [draw(9), draw(4), (*beginning, *draw(3)), (*beginning, *draw(6))]
    requests = [(context, draw(length)) for context in (*prompts, draw(130), draw(150)) for length in (1, 3, 5)]
    return requests, prompts
