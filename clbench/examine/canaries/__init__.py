"""Canaries: proof, before a run may be ranked, that the examination of its tasks is able to fail.

Per task, on its first test examples: what cannot know the answer does not find it (`chance`, a model with random weights; `copier`,
readers that only copy out of the prompt; `swap`, another row's answer put into the row; `shuffled`, wrong answers), what is right counts
as right (`reference`), and training and examination read the same tokens (`bos`, `prompt`, of a chat `template`). Each is described where it is
defined: `canaries.answers` and `canaries.tokens`. `canaries.own_model` examines the run's own model, before and after its first stage.

Not here: duplicates and overlaps between texts (`record.overlaps`), and what becomes of a run whose canary failed (the leaderboard).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import Module

from clbench.data.encoder import Encoder
from clbench.data.sampling import seeded
from clbench.examine.canaries.answers import Verdict, chance, copier, near_zero, reference, shuffled, swap, wrong_scores
from clbench.examine.canaries.tokens import NEW_TOKENS, Watched, in_template, one_bos, same_prompt
from clbench.examine.student import Student
from clbench.models.tiny import fresh_llama
from clbench.protocols import Stage, Stream
from clbench.types import Unusable

# A wide initialisation, so that the random model answers different prompts differently.
ARCHITECTURE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


@dataclass(frozen=True, kw_only=True)
class Canary:
    """One check of one task: whether it passed, and the numbers that it saw."""

    name: str
    task: str
    passed: bool
    detail: str


def check_stream(stream: Stream, encoder: Encoder, *, seed: int = 0, rows: int = 32) -> tuple[Canary, ...]:
    """Every canary of every task, on its first `rows` test examples; the random model's weights depend on `seed` alone.

    All of it runs on the CPU, with the tokens of `encoder`, and so does not depend on the device of the run.
    """
    encoder = copy.copy(encoder)  # its tokens are shared
    encoder.device, encoder.together = torch.device("cpu"), True
    with seeded(seed, "canary"):  # what an accelerator draws next is left alone, too
        size = {"max_position_embeddings": encoder.max_length + NEW_TOKENS}
        model = fresh_llama(encoder.tokenizer, architecture=ARCHITECTURE | size, seed=seed).eval()
    return tuple(
        Canary(name=name, task=stage.name, passed=passed, detail=detail)
        for stage in stream.stages
        for name, (passed, detail) in check_task(
            replace(stage, train=stage.train[:rows], test=stage.test[:rows]),
            model=model,
            encoder=encoder,
            unusable=stream.unusable,
        ).items()
    )


def check_task(stage: Stage, *, model: Module, encoder: Encoder, unusable: Sequence[Unusable]) -> dict[str, Verdict]:
    """The verdict of every canary on `stage`'s test examples; without `swap` where the task has no rows, without `template` unless in a chat."""
    student = Watched(Student(model, encoder))
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
