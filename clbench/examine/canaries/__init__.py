"""Canaries: proof, before a run may be ranked, that the examination of its tasks is able to fail.

Per task, on its first test examples: what cannot know the answer does not find it (`chance`, a model with random weights; `copier`,
readers that only copy out of the prompt; `swap`, another row's answer put into the row; `shuffled`, wrong answers), what is right counts
as right (`reference`), and training and examination read the same tokens (`bos`, `prompt`, of a chat `template`). On all of them: no constant
answer and no copying reader beats the reported `floors`. Each is described where it is defined: about answers in `canaries.answers`, about
tokens here. `canaries.own_model` examines the run's own model, before and after its first stage.

Not here: weights that are missing or misfit, which are refused when they are loaded (`models.pretrained`), and another model's weights, which
have another fingerprint in the manifest; how a group averages its tasks, which is lm-eval's own function (`knowledge.ledger_row`); duplicates
and overlaps between texts (`record.overlaps`); what becomes of a run whose canary failed (the leaderboard).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import Module

from clbench.data.chat import own_template
from clbench.data.encoder import Encoder
from clbench.examine.canaries.answers import (
    Verdict,
    above_floors,
    chance,
    copier,
    near_zero,
    reference,
    shuffled,
    swap,
    wrong_scores,
)
from clbench.examine.student import Student
from clbench.models.tiny import fresh_llama
from clbench.protocols import Stage, Stream
from clbench.types import Example, Ids, Unusable

# A wide initialisation, so that the random model answers different prompts differently.
ARCHITECTURE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}

NEW_TOKENS = 16
"""What a random model writes, at most, in tokens."""


@dataclass(frozen=True, kw_only=True)
class Canary:
    """One check of one task: whether it passed, and the numbers that it saw."""

    name: str
    task: str
    passed: bool
    detail: str


def check_stream(stream: Stream, encoder: Encoder, *, seed: int = 0, rows: int = 32) -> tuple[Canary, ...]:
    """Every canary of every task, on its first `rows` test examples (`floors`: on all); the random model's weights depend on `seed` alone.

    All of it runs on the CPU, with the tokens of `encoder`, and so does not depend on the device of the run.
    """
    encoder = copy.copy(encoder)  # its tokens are shared
    encoder.device, encoder.together = torch.device("cpu"), True
    size = {"max_position_embeddings": encoder.max_length + NEW_TOKENS}
    model = fresh_llama(encoder.tokenizer, architecture=ARCHITECTURE | size, seed=seed).eval()
    found: list[Canary] = []
    for stage in stream.stages:
        few = replace(stage, train=stage.train[:rows], test=stage.test[:rows])
        verdicts = check_task(few, model=model, encoder=encoder, unusable=stream.unusable)
        verdicts["floors"] = above_floors(stage)
        for name, (passed, detail) in verdicts.items():
            found.append(Canary(name=name, task=stage.name, passed=passed, detail=detail))
    return tuple(found)


def check_task(stage: Stage, *, model: Module, encoder: Encoder, unusable: Sequence[Unusable]) -> dict[str, Verdict]:
    """The verdict of every canary on `stage`'s test examples; without `swap` where the task has no rows, without `template` unless in a chat."""
    student = Watched(model, encoder)
    closed = bool(stage.test[0].choices)
    wrong = wrong_scores(stage)
    pairs = stage.task.answer_swaps("test", len(stage.test))
    by_chance = chance(stage, student) if closed else near_zero(stage, student, wrong)
    return {
        "chance": by_chance,
        "copier": copier(stage),
        "reference": reference(stage, unusable),
        "shuffled": shuffled(wrong, closed=closed),
        "bos": one_bos(stage, encoder),
        "prompt": same_prompt(stage, encoder, asked=student.asked),
        **({"swap": swap(pairs)} if pairs else {}),
        **({"template": in_template(stage, encoder, asked=student.asked)} if encoder.chat else {}),
    }


class Watched(Student):
    """A student that keeps the (context, continuation) ids it is given and writes at most NEW_TOKENS tokens."""

    def __init__(self, model: Module, encoder: Encoder) -> None:
        super().__init__(model, encoder)
        self.asked: set[tuple[Ids, Ids]] = set()

    def log_likelihoods(self, requests: Sequence[tuple[Ids, Ids]], **settings: Any) -> list[tuple[float, bool]]:
        self.asked.update(requests)
        return super().log_likelihoods(requests, **settings)

    def generate(self, prompts: Sequence[Ids], *, max_new_tokens: int) -> list[str]:
        self.asked.update((prompt, ()) for prompt in prompts)
        return super().generate(prompts, max_new_tokens=min(max_new_tokens, NEW_TOKENS))


def encodable(stage: Stage, encoder: Encoder) -> list[Example]:
    """The test and training examples whose answer, with BOS and EOS, fits `train.max_length`: no other can be trained on at all."""
    return [example for example in (*stage.test, *stage.train) if encoder.fits(example.answer)]


def one_bos(stage: Stage, encoder: Encoder) -> Verdict:
    """Whether encoded examples begin with BOS where the tokenizer, or its chat template, gives one, end with EOS and hold no BOS of their own.

    The final EOS is not looked at, so the count is right where BOS and EOS are one token; PAD is never part of an encoded example.
    """
    bos, eos = encoder.bos, encoder.eos
    examples = [example for example in encodable(stage, encoder) if example.prompt]
    encoded, first = [encoder.example(example).ids for example in examples], encoder.begin[:1] == (bos,)
    count = (*encoder.begin, *encoder.end).count(bos)
    good = sum((ids[0] == bos) == first and ids[-1] == eos and ids[:-1].count(bos) == count for ids in encoded)
    said = "one BOS, at the start" if first else "no BOS, as the tokenizer gives none"
    return good == len(encoded) > 0, f"{good} of {len(encoded)} examples have {said}"


def same_prompt(stage: Stage, encoder: Encoder, *, asked: set[tuple[Ids, Ids]]) -> Verdict:
    """Whether prompts and answers have the same ids in training and in examination, and examination did read them so.

    A prompt that training cuts must be what its cut leaves of the one examined, and more than what is never cut. Of closed tasks the right answer
    must have been scored, too. `asked` is what the student was given for `chance`.
    """
    examples = encodable(stage, encoder)
    same = cut = lost = 0
    for example in examples:
        encoded = encoder.example(example)
        context, answer = encoder.prompt(example.prompt), encoder.answer(example.answer)
        kept = encoder.clipped(context, encoder.max_length - len(answer) - 1)
        same += encoded.ids == (*kept, *answer, encoder.eos) and encoded.answer_start == len(kept)
        cut += kept != context
        lost += len(context) > len(kept) == len(encoder.begin) + len(encoder.end)
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


def in_template(stage: Stage, encoder: Encoder, *, asked: set[tuple[Ids, Ids]]) -> Verdict:
    """Whether training and examination read the tokens that the tokenizer itself gives of its chat template; cut ones as far as they go.

    `asked` is what the student was given for `chance`.
    """
    contexts = {context for context, _ in asked}

    def by_itself(example: Example) -> Ids:
        messages = [{"role": "user", "content": example.prompt}]
        settings = {"chat_template": own_template(encoder.tokenizer), "add_generation_prompt": True}
        ids: Any = encoder.tokenizer.apply_chat_template(messages, return_dict=False, **settings)
        return tuple(ids)

    examples = encodable(stage, encoder)
    trained = [encoder.example(example) for example in examples]
    same = sum(
        one.ids[: one.answer_start] == encoder.clipped(by_itself(example), one.answer_start)
        for example, one in zip(examples, trained, strict=True)
    )
    read = sum(by_itself(example) in contexts for example in stage.test)
    return (
        same == len(examples) > 0 and read == len(stage.test),
        f"{same} of {len(examples)} examples are trained on and {read} of {len(stage.test)} are examined in the tokenizer's own template",
    )
