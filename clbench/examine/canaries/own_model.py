"""Canaries about the run's own model, tokenizer and adapter: the fast way gives what plain forwards give.

The fast way is the student's and the loss's: the encoder's tokens, many sequences in a forward, beginnings read once, a cache, adapters folded
into weights of float32, the model as it trains. The plain way is the tokenizer's own tokens of the whole text, one sequence at a time without a
cache, the adapter as it trains, no dropout. They are compared on a few prompts of the stream and at lengths around every bound that the
configurations name, and on a question as lm-eval's tasks ask them. After stage 1 what the model says is also compared with what it said before
the method merged.

Shape suffixes: T tokens of a sequence, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import Module

from clbench.data.encoder import SIGN, Encoder
from clbench.data.sampling import seeded
from clbench.examine.student import Student
from clbench.examine.together import nats, off_the_likeliest, rounding
from clbench.models.limits import LENGTHS, rope_settings, settings
from clbench.models.loss import answer_loss
from clbench.protocols import Stream
from clbench.types import Example, Ids

EXAMPLES = 6
WRITTEN = 4
LONGEST = 1024
"""How many examples are compared, the tokens that are written after each, and the longest sequence, in tokens."""
QUESTION, ANSWER = "Is a dog an animal?\nAnswer:", " yes"
"""What lm-eval's tasks are taken to ask."""
Request = tuple[Ids, Ids]
"""The ids of a context and its continuation."""
Scored = tuple[float, bool]
"""A continuation's log-likelihood in nats, and whether it is the likeliest."""
BOUNDS = (
    *LENGTHS,
    "original_max_position_embeddings",
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "attention_chunk_size",
    "window_size",
    "block_size",
    "chunk_size",
    "mamba_chunk_size",
)
"""What configurations call a length at which positions, attention or a scan begin to be other ones."""


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
def check_model(
    student: Student, stream: Stream, *, folded: AbstractContextManager, before: Sequence[float] = ()
) -> tuple[Gap, ...]:
    """The gaps of scoring, writing and training, of what lm-eval is told, and of merging where `before` is what `said` gave then.

    The fast way runs inside `folded`, the plain way outside of it.
    """
    model, encoder = student.model, student.encoder
    examples = chosen(stream)
    plain = [plain_request(encoder, example) for example in examples]
    requests = [(one.ids[: one.answer_start], one.ids[one.answer_start :]) for one in map(encoder.example, examples)]
    tried, _ = bounds(model, encoder)
    longer = list(crossing(requests, tried, most=student.positions))
    several = [part for prompt, _ in requests for part in (prompt, prompt[: 1 + len(prompt) // 2])]  # of unlike lengths
    several += [context for context, answer in longer if len(context) + len(answer) in tried]
    prompts = [prompt for prompt in several if len(prompt) + WRITTEN <= student.positions]
    rows = [Example(id="", prompt="", answer="", ids=(*context, *answer)) for context, answer in longer]
    long = [row for row in rows if len(row.ids) <= encoder.max_length]
    learned = [(examples, plain), (long, [(row.ids[:1], row.ids[1:]) for row in long])]
    with folded:
        asked = requests + longer
        scored = student.log_likelihoods(asked, max_length=max(len(a) + len(b) for a, b in asked))
        answered, by_lm_eval = lm_eval(student)
        written = student.write(prompts, max_new_tokens=WRITTEN)
    with in_training(model):
        trained = [loss(model, encoder, given) for given, _ in learned if given]
    found = [sum(nats(model, *request)) for request in plain + longer]
    expected = [
        mean([-value for one in asked for value in nats(model, *one, unread=0)]) for _, asked in learned if asked
    ]
    gaps = {
        "scoring": apart(scored, found, asked),
        "writing": [
            off_the_likeliest(model, encoder, prompt, ids, most=WRITTEN)
            for prompt, ids in zip(prompts, written, strict=True)
        ],
        "training": [abs(a - b) for a, b in zip(trained, expected, strict=True)],
    }
    if by_lm_eval:
        gaps["lm_eval"] = apart(answered, [sum(nats(model, *request)) for request in by_lm_eval], by_lm_eval)
    if before:
        gaps["merging"] = [abs(a - b) for a, b in zip(said(model, encoder, stream), before, strict=True)]
    assert all(gaps.values()), gaps
    allowed = rounding(model, encoder)
    # Not max(), which passes over a NaN that is not the first.
    return tuple(Gap(name=name, nats=float(np.max(off)), allowed=allowed, n=len(off)) for name, off in gaps.items())


def apart(scored: Sequence[Scored], expected: Sequence[float], requests: Sequence[Request]) -> list[float]:
    """How far the log-likelihood of each request is from what is expected, in nats a token."""
    asked = zip(scored, expected, requests, strict=True)
    return [abs(value - nats) / len(continuation) for (value, _), nats, (_, continuation) in asked]


def loss(model: Module, encoder: Encoder, examples: Sequence[Example]) -> float:
    """The mean loss in nats of the examples' answer tokens as a step of training has it."""
    parts = encoder.micro_batches([(example, 0, 1.0) for example in examples], rows=len(examples))
    return sum(float(answer_loss(model, part)) for part in parts)


def chosen(stream: Stream) -> list[Example]:
    """The examples that are compared, one of a stage after the other: training examples, whose answers fit."""
    rows = [stage.train[row] for row in range(EXAMPLES) for stage in stream.stages if row < len(stage.train)]
    return rows[:EXAMPLES]


def plain_request(encoder: Encoder, example: Example) -> tuple[Ids, Ids]:
    """The prompt and the answer with EOS as the tokenizer itself gives them of the whole text.

    The encoder's own prompt where training cuts it, its own answer where one token spans both. An EOS that the tokenizer puts behind a text stands
    behind the answer alone: the model is to go on after a prompt.
    """
    one, eos = encoder.example(example), encoder.eos
    settings: dict[str, Any] = {"add_special_tokens": False} if encoder.chat else {"split_special_tokens": True}
    texts = [SIGN, encoder.spelled(example.prompt), encoder.spelled(example.prompt, example.answer)]
    sign, prompt, whole = (tuple(encoder.tokenizer(text, **settings)["input_ids"]) for text in texts)
    if sign[-1] == eos:
        prompt, whole = prompt[:-1], whole[:-1]
    follows = prompt and whole[: len(prompt)] == prompt
    answer = (*whole[len(prompt) :], eos) if follows else one.ids[one.answer_start :]
    fits = prompt and len(prompt) + len(answer) <= encoder.max_length
    return prompt if fits else one.ids[: one.answer_start], answer


def lm_eval(student: Student) -> tuple[list[Scored], list[Request]]:
    """What lm-eval's tasks are told of a few contexts, and the ids that its own class (`HFLM` at its defaults) would have the model read there.

    One is plain, one begins with BOS, one holds EOS, and one is too long: it loses its beginning. None where a token spans context and answer.
    """
    # These take a while to import.
    from lm_eval.api.instance import Instance

    from clbench.examine.lm import StudentLM

    encoder = student.encoder
    tokenizer: Any = encoder.tokenizer
    bos, eos = (tokenizer.decode([token]) for token in (encoder.bos, encoder.eos))
    short = [QUESTION, f"{bos}{QUESTION}", f"{QUESTION}{eos}{QUESTION}"]
    texts = [(context, ANSWER) for context in (*short, " ".join(short))]
    ids = []
    for context, answer in texts:
        settings = {"add_special_tokens": False} if context.startswith(bos) else {}
        before, whole = (tuple(tokenizer.encode(text, **settings)) for text in (context, context + answer))
        ids.append((before, whole[len(before) :]))
    longest = max(len(before) + len(answer) for before, answer in ids[:-1]) - 1  # the last of which is not read
    lm = StudentLM(student, max_length=min(longest, student.positions))
    if any(not 0 < len(answer) <= lm.max_length for _, answer in ids):
        return [], []
    asked = [Instance(request_type="loglikelihood", doc={}, arguments=one, idx=0) for one in texts]
    read = [(before[-(lm.max_length + 1 - len(answer)) :], answer) for before, answer in ids]
    return lm.loglikelihood(asked, disable_tqdm=True), read


@contextmanager
def in_training(model: Module) -> Iterator[None]:
    """The model as in training, but for the dropout of adapters, which a method asks for."""
    model.train()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.eval()
    with seeded(0, "canary"):
        yield
    model.eval()


@torch.inference_mode()
def said(model: Module, encoder: Encoder, stream: Stream) -> list[float]:
    """The mean log-likelihood in nats of each compared answer's tokens, by plain forwards."""
    found = [nats(model, *plain_request(encoder, example)) for example in chosen(stream)]
    return [sum(each) / len(each) for each in found]


def bounds(model: Module, encoder: Encoder) -> tuple[list[int], list[int]]:
    """The lengths at which a model or the run begins to do something else, in tokens: up to LONGEST, which are tried, and beyond."""
    config = settings(model)
    stated = [place.get(name) for place in (config, *rope_settings(config)) for name in BOUNDS]
    found = sorted({bound for bound in (*stated, encoder.max_length) if isinstance(bound, int)})
    return [bound for bound in found if bound <= LONGEST], [bound for bound in found if bound > LONGEST]


def crossing(requests: Sequence[tuple[Ids, Ids]], bounds: Sequence[int], *, most: int) -> Iterator[tuple[Ids, Ids]]:
    """For each bound two requests, made of the tokens of `requests`, of which one token less and one more than the bound are read."""
    tokens = [token for prompt, answer in requests for token in (*prompt[1:], *answer)]
    for bound in bounds:
        for length in (bound, bound + 2):
            if 3 <= length <= most:
                ids = (requests[0][0][0], *(tokens * (length // len(tokens) + 1))[: length - 1])
                yield ids[:-2], ids[-2:]
