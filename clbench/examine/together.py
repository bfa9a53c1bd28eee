"""Whether a model may read several sequences in one forward: rows packed end to end, batches padded on the left, a beginning read once."""

import copy
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy

from clbench.data.encoder import Encoder
from clbench.examine.student import Student
from clbench.models.limits import is_kept_as_keys, is_stretched, settings
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
    many = copy.copy(encoder)
    many.together = True
    alone, together = one_at_a_time(model, encoder), Student(model, many)
    requests, prompts = _questions(config["vocab_size"])
    pairs = zip(alone.log_likelihoods(requests), together.log_likelihoods(requests), strict=True)
    gaps = [abs(a - b) / len(continuation) for ((a, _), (b, _)), (_, continuation) in zip(pairs, requests, strict=True)]
    gaps += _gaps_in_writing(alone, together, prompts)
    gaps.append(_gap_in_training(inner, [context for context, _ in requests], many))
    allowed = rounding(model, encoder)
    return all(gap <= allowed for gap in gaps)  # each by itself, as a NaN is in no order


def rounding(model: Module, encoder: Encoder) -> float:
    """Nats a token between two ways of computing a log-likelihood that count as rounding.

    In bfloat16 models differ: twice as much as log p(a, b | context) is off log p(a | context) + log p(b | context, a), where a few sequences
    are read one at a time and only the tokens behind `a`, which it does not see, are others.
    """
    least, most = TOLERANCES[causal_lm(model).dtype]
    if least == most or is_stretched(model):
        return least
    alone = one_at_a_time(model, encoder)
    asked, (after, *_) = _questions(settings(model)["vocab_size"])
    # Cut sequences would be other ones.
    requests = [one for one in asked if sum(map(len, (*one, after))) <= alone.positions]
    if not requests:
        return least
    longer, first, second = (
        alone.log_likelihoods(asked, max_length=alone.positions)
        for asked in (
            [(context, (*answer, *after)) for context, answer in requests],
            requests,
            [((*context, *answer), after) for context, answer in requests],
        )
    )
    parts = zip(longer, first, second, requests, strict=True)
    gaps = [abs(whole - a - b) / len(answer) for (whole, _), (a, _), (b, _), (_, answer) in parts]
    return float(np.clip(2 * np.max(gaps), least, most))


def one_at_a_time(model: Module, encoder: Encoder) -> Student:
    """A student that reads each sequence by itself."""
    encoder = copy.copy(encoder)
    encoder.together = False
    return Student(model, encoder)


def _gaps_in_writing(alone: Student, together: Student, prompts: list[Ids]) -> list[float]:
    """By how many nats a token that is written together is less likely than the likeliest one there; infinite where one way ends earlier."""
    ways = [student.write(prompts, max_new_tokens=2) for student in (alone, together)]
    if list(map(len, ways[0])) != list(map(len, ways[1])):
        return [math.inf]
    asked = [(prompt, tuple(ids), range(len(ids))) for prompt, ids in zip(prompts, ways[1], strict=True) if ids]
    read = alone.read(asked, max_length=alone.positions)
    return [
        float(log_probs_V.max() - log_probs_V[token])
        for (_, ids, _), (_, _, log_probs_NV) in zip(asked, read, strict=True)
        for token, log_probs_V in zip(ids, log_probs_NV, strict=True)
    ]


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
