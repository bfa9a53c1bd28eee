"""Canaries about tokens: training and examination read the same ids, and a score depends on nothing but the ids."""

import copy
from collections.abc import Sequence

import torch
from torch.nn import Module

from clbench.data.encoder import Encoder, Ids
from clbench.examine.canaries.answers import Verdict
from clbench.examine.student import Student
from clbench.protocols import Stage
from clbench.types import Example

NEW_TOKENS = 16
"""What a random model writes, and what is compared of a continuation, at most, in tokens."""
COMPARED_ROWS = 8
COMPARED_CHOICES = 2
EVERYTHING = 10**9
"""Tokens of a batch that holds all there is."""
TOLERANCE = 1e-4
"""Nats between two ways of computing one log-likelihood in float32."""


class Watched:
    """A student that keeps the (context, continuation) ids it is given and writes at most NEW_TOKENS tokens."""

    def __init__(self, student: Student) -> None:
        self.student = student
        self.encoder = student.encoder
        self.asked: set[tuple[Ids, Ids]] = set()

    def log_likelihoods(self, requests: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        self.asked.update(requests)
        return self.student.log_likelihoods(requests)

    def generate(self, prompts: Sequence[Ids], *, max_new_tokens: int) -> list[str]:
        self.asked.update((prompt, ()) for prompt in prompts)
        return self.student.generate(prompts, max_new_tokens=min(max_new_tokens, NEW_TOKENS))


def encodable(stage: Stage, encoder: Encoder) -> list[Example]:
    """The test and training examples whose answer, with BOS and EOS, fits `train.max_length`: no other can be trained on at all."""
    examples = (*stage.test, *stage.train)
    return [example for example in examples if len(encoder.answer(example.answer)) + 2 <= encoder.max_length]


def one_bos(stage: Stage, encoder: Encoder) -> Verdict:
    """Whether encoded examples begin with BOS, end with EOS and hold no other BOS.

    The final EOS is not looked at, so the count is right where BOS and EOS are one token; PAD is never part of an encoded example.
    """
    bos, eos = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    encoded = [encoder.example(example).ids for example in encodable(stage, encoder)]
    good = sum(ids[0] == bos and ids[-1] == eos and ids[:-1].count(bos) == 1 for ids in encoded)
    return good == len(encoded) > 0, f"{good} of {len(encoded)} examples have one BOS, at the start"


def same_prompt(stage: Stage, encoder: Encoder, *, asked: set[tuple[Ids, Ids]]) -> Verdict:
    """Whether prompts and answers have the same ids in training and in examination, and examination did read them so.

    A prompt that training cuts must be what its cut leaves of the one examined, and more than the BOS. Of closed tasks the right answer must
    have been scored, too. `asked` is what the student was given for `chance`.
    """
    examples = encodable(stage, encoder)
    same = cut = lost = 0
    for example in examples:
        encoded = encoder.example(example)
        context, answer = encoder.prompt(example.prompt), encoder.answer(example.answer)
        kept = encoder.clipped(context, encoder.max_length - len(answer) - 1)
        same += encoded.ids == (*kept, *answer, encoder.tokenizer.eos_token_id) and encoded.answer_start == len(kept)
        cut += kept != context
        lost += len(context) > 1 == len(kept)
    asked = asked | {(context, ()) for context, _ in asked}
    read = sum(
        (encoder.prompt(example.prompt), encoder.answer(example.answer) if example.choices else ()) in asked
        for example in stage.test
    )
    left_out = len(stage.test) + len(stage.train) - len(examples)
    return (
        same == len(examples) > 0 == lost and read == len(stage.test),
        f"{same} of {len(examples)} examples are the same in training and examination, {cut} cut and {lost} without a prompt among them "
        f"({left_out} left out: the answer alone is longer than train.max_length); {read} of {len(stage.test)} were examined as they are",
    )


def invariance(stage: Stage, model: Module, encoder: Encoder) -> Verdict:
    """Whether log-likelihoods and the first token written depend on nothing but the ids.

    Log-likelihoods in one batch, alone, and in reverse order agree to 1e-4 nats. The likeliest token of a forward of one unpadded row is
    the one that `log_likelihoods` (rows packed) calls greedy and that `generate` (padded on the left) writes.
    """
    tests = stage.test[:COMPARED_ROWS]
    prompts = [encoder.prompt(example.prompt) for example in tests]
    continuations = [
        (prompt, encoder.answer(answer)[:NEW_TOKENS])
        for prompt, example in zip(prompts, tests, strict=True)
        for answer in (*example.choices[:COMPARED_CHOICES], example.answer)
    ]
    tokens = [likeliest(model, encoder.clipped(prompt, encoder.max_length)) for prompt in prompts]
    requests = [request for request in continuations if request[1]]
    requests += [(prompt, (token,)) for prompt, token in zip(prompts, tokens, strict=True)]
    one_by_one = copy.copy(encoder)
    one_by_one.together = False
    together = Student(model, encoder, tokens=EVERYTHING).log_likelihoods(requests)
    alone = Student(model, one_by_one).log_likelihoods(requests)
    backwards = Student(model, encoder).log_likelihoods(requests[::-1])[::-1]
    gap = max(
        abs(value - other[0])
        for (value, _), *others in zip(together, alone, backwards, strict=True)
        for other in others
    )
    same = [flag for _, flag in together] == [flag for _, flag in alone] == [flag for _, flag in backwards]
    written = Student(model, encoder).generate(prompts, max_new_tokens=1)
    texts = [encoder.tokenizer.decode([token], skip_special_tokens=True).strip() for token in tokens]
    packed = sum(flag for _, flag in together[-len(tokens) :])
    padded = sum(text == answer for text, answer in zip(texts, written, strict=True))
    return (
        gap <= TOLERANCE and same and packed == padded == len(tokens),
        f"{len(requests)} log-likelihoods differ by {gap:.1e} nats at most with batch and order; of {len(tokens)} first tokens "
        f"{packed} are the likeliest in a packed row, {padded} in a padded batch",
    )


@torch.inference_mode()
def likeliest(model: Module, ids: Ids) -> int:
    """The token that follows `ids` by a plain forward of the one row."""
    return int(model(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1].argmax())
