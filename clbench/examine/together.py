"""Whether a model may read several sequences in one forward: rows packed end to end, batches padded on the left, a beginning read once."""

import copy

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy

from clbench.data.encoder import Encoder
from clbench.examine.student import Student
from clbench.models.limits import is_kept_as_keys, settings
from clbench.models.loss import causal_lm, pack, read
from clbench.types import Example, Ids

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Nats a token between two ways of computing a log-likelihood that count as rounding."""


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
    written = [student.write(prompts, max_new_tokens=2) for student in (alone, together)]
    gaps.append(_gap_in_training(inner, [context for context, _ in requests], many))
    # Each by itself, as a NaN is in no order.
    return all(gap <= TOLERANCES[inner.dtype] for gap in gaps) and written[0] == written[1]


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
