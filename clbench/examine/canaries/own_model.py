"""Canaries about the run's own model, tokenizer and adapter: the fast way gives what plain forwards give.

The fast way is the student's and the loss's: many sequences in a forward, beginnings read once, a cache, adapters folded into the weights. The
plain way is one sequence at a time without a cache, the adapter as it trains. They are compared on a few prompts of the stream and at lengths
around every bound that the configurations name.

Shape suffixes: T tokens of a sequence, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from clbench.data.encoder import Encoder, Ids
from clbench.examine.student import Student, eos_ids
from clbench.examine.together import TOLERANCES
from clbench.models.loss import answer_loss, causal_lm
from clbench.protocols import Stream
from clbench.types import Example

EXAMPLES = 6
WRITTEN = 4
LONGEST = 1024
"""How many examples are compared, the tokens that are written after each, and the longest sequence, in tokens."""
BOUNDS = ("sliding_window", "original_max_position_embeddings", "max_position_embeddings")


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How far the two ways of doing `name` are apart over `n` sequences, in nats a token, and how far they may be."""

    name: str
    nats: float
    allowed: float
    n: int

    @property
    def failed(self) -> bool:
        return not self.nats <= self.allowed


@torch.inference_mode()
def check_model(student: Student, stream: Stream, *, folded: AbstractContextManager) -> tuple[Gap, ...]:
    """The gaps of scoring, writing and training. The fast way runs inside `folded`, the plain way outside of it."""
    model, encoder = student.model, student.encoder
    examples = [stage.test[0] for stage in stream.stages[:EXAMPLES]]
    requests = [(encoder.prompt(example.prompt), encoder.answer(example.answer)) for example in examples]
    several = [part for prompt, _ in requests for part in (prompt, prompt[: 1 + len(prompt) // 2])]  # of unlike lengths
    prompts = [prompt for prompt in several if len(prompt) + WRITTEN <= student.positions]
    requests += list(crossing(requests, bounds(model, encoder), most=student.positions))
    with folded:
        scored = student.log_likelihoods(requests, max_length=max(len(a) + len(b) for a, b in requests))
        written = student.write(prompts, max_new_tokens=WRITTEN)
    trained = float(answer_loss(model, encoder.collate(examples)))
    allowed = TOLERANCES[causal_lm(model).dtype]
    gaps = {
        "scoring": [
            abs(value - sum(nats(model, *request))) / len(request[1])
            for (value, _), request in zip(scored, requests, strict=True)
        ],
        "writing": [
            off_the_likeliest(model, encoder, prompt, ids) for prompt, ids in zip(prompts, written, strict=True)
        ],
        "training": [abs(trained - plain_loss(model, encoder, examples))],
    }
    return tuple(
        Gap(name=name, nats=max(found, default=0.0), allowed=allowed, n=len(found)) for name, found in gaps.items()
    )


def bounds(model: Module, encoder: Encoder) -> list[int]:
    """The lengths at which a model or the run begins to do something else, in tokens; none beyond LONGEST."""
    config = causal_lm(model).config.get_text_config().to_dict()
    places = config, config.get("rope_parameters") or {}
    stated = [place.get(name) for place in places for name in BOUNDS]
    return sorted({bound for bound in (*stated, encoder.max_length) if isinstance(bound, int) and bound <= LONGEST})


def crossing(requests: Sequence[tuple[Ids, Ids]], bounds: Sequence[int], *, most: int) -> Iterator[tuple[Ids, Ids]]:
    """For each bound two requests that end one token before and one after it, made of the tokens of `requests`."""
    tokens = [token for prompt, answer in requests for token in (*prompt[1:], *answer)]
    for bound in bounds:
        for length in (bound - 1, bound + 1):
            if 3 <= length <= most:
                ids = (requests[0][0][0], *(tokens * (length // len(tokens) + 1))[: length - 1])
                yield ids[:-2], ids[-2:]


def log_probs(model: Module, ids: Ids) -> Tensor:
    """Log-probabilities in nats after each token of one sequence, [T, V], float32."""
    input_ids = torch.tensor([ids], device=causal_lm(model).device)
    return causal_lm(model)(input_ids=input_ids, use_cache=False).logits[0].float().log_softmax(-1)


def nats(model: Module, context: Ids, continuation: Ids) -> list[float]:
    """The log-likelihood of each token of the continuation."""
    log_probs_TV = log_probs(model, (*context, *continuation))[len(context) - 1 : -1]
    return [float(row[token]) for row, token in zip(log_probs_TV, continuation, strict=True)]


def off_the_likeliest(model: Module, encoder: Encoder, prompt: Ids, written: Sequence[int]) -> float:
    """By how many nats a written token, or the end of the answer, is less likely than the likeliest there, at most."""
    log_probs_TV = log_probs(model, (*prompt, *written))[len(prompt) - 1 :]
    ends = [encoder.tokenizer.eos_token_id, *eos_ids(causal_lm(model))]
    chosen = [[token] for token in written] + [ends] * (len(written) < WRITTEN)
    return max(float(row.max() - row[tokens].max()) for row, tokens in zip(log_probs_TV, chosen, strict=False))


def plain_loss(model: Module, encoder: Encoder, examples: Sequence[Example]) -> float:
    """The mean negative log-likelihood over the answer tokens of all examples."""
    encoded = [encoder.example(example) for example in examples]
    found = [nats(model, one.ids[: one.answer_start], one.ids[one.answer_start :]) for one in encoded]
    return -sum(map(sum, found)) / sum(map(len, found))
