"""A real model, Gemma-3-270M (from the folder in CLBENCH_MODEL) or its shape with random weights, where the vocabulary is most of the work.

The same kinds of random tokens as for the small models, fewer of them: scoring, training on answers, writing, a stream of two tasks, and how
exact the scores are.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch.nn import Module

from clbench.data.encoder import Encoder
from clbench.examine.student import Student
from tests.benchmarks import scoring, stream, training
from tests.benchmarks.models import Subject, gemma, words
from tests.benchmarks.race import Figure, fastest, figure, race, value

ITEMS = {"ARC-like": 12, "HellaSwag-like": 6, "MMLU-like, few-shot": 6, "few-shot, several tokens": 2}
SHAPES = {name: (ITEMS[name], *shape) for name, (_, *shape) in scoring.SHAPES.items()}
WRITE_SIZES = (1, 4, 16)
"""Prompts of a forward of the peer, of which the fastest is raced."""


def run(subject: Subject | None = None) -> Iterator[Figure]:
    """The figures of every kind of work."""
    subject = subject or gemma()
    # HFLM is up to 1e-4 nats a token from float64 (`precision`), and the longest ending has 40.
    parts = (
        scoring.raced(
            subject, shapes=SHAPES, each="-", wanted=">= 3 (geometric mean)", repetitions=2, tried=4, most=4e-3
        ),
        training.raced(
            subject,
            "answer-only",
            wanted=">= 2 (fastest)",
            repetitions=2,
            count=2 * training.BATCH,
            sizes={"padded": (4, 2, 1), "flattened": (4, 2)},
            tried=training.BATCH,
        ),
        writing(subject),
        stream_of_two(subject),
        precision(subject),
    )
    for part in parts:
        for found in part:
            yield replace(found, benchmark="real", case=f"{found.benchmark}, {found.case}")


def stream_of_two(subject: Subject) -> Iterator[Figure]:
    """One figure; the peer has the rows a forward at which it is fastest."""
    yield stream.raced(subject, tasks=2, train=8, test=4, micro=1, batch=4, wanted=">= 4")


def writing(subject: Subject, *, prompts: int = 16, tokens: int = 16) -> Iterator[Figure]:
    """Greedy answers: ours against HFLM's `generate_until` at its best batch size, the same tokens first."""
    model, tokenizer = subject.make(), words(subject.vocabulary)
    encoder = Encoder(tokenizer, max_length=512)
    rows = [row.prompt for row in training.examples((20, 200), (1, 1), subject.vocabulary, count=prompts)]

    def ours() -> list[str]:
        written = Student(model, encoder).write([encoder.prompt(row) for row in rows], max_new_tokens=tokens)
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]

    def theirs(size: int) -> list[str]:
        peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=512, device="cpu")
        settings = {"max_gen_toks": tokens, "do_sample": False, "until": []}
        asked = [
            Instance(request_type="generate_until", doc={}, arguments=(row, settings), idx=number)
            for number, row in enumerate(rows)
        ]
        return peer.generate_until(asked, disable_tqdm=True)

    peers = {f"lm-eval HFLM, batch {size}": partial(theirs, size) for size in WRITE_SIZES}
    best = fastest(peers)
    found = race(ours, {best: peers[best]}, same=same_texts, repetitions=2)
    yield figure(
        "writing", f"{prompts} answers of {tokens} tokens, {subject.name}", raced=found, wanted="-", unit="CPU seconds"
    )


def same_texts(found: list[str], expected: list[str]) -> float:
    """0, where both wrote the same."""
    assert found == expected, [pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1]]
    return 0.0


def precision(subject: Subject) -> Iterator[Figure]:
    """The largest error of 24 endings' log-likelihoods in 1e-6 nats a token, ours and HFLM's, against float64 one sequence at a time."""
    model, tokenizer = subject.make(), words(subject.vocabulary)
    pairs = scoring.requests(SHAPES["HellaSwag-like"], subject.vocabulary)[:24]
    peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=2048, device="cpu")
    asked = [(("", str(number)), list(context), list(ending)) for number, (context, ending) in enumerate(pairs)]
    scores = {
        "clbench": Student(model, Encoder(tokenizer, max_length=2048)).log_likelihoods(pairs),
        "lm-eval HFLM, batch 4": peer._loglikelihood_tokens(asked, disable_tqdm=True),
    }
    exact = exact_scores(model.double(), pairs)
    for name, found in scores.items():
        error = max(abs(a - b) / len(ending) for (a, _), b, (_, ending) in zip(found, exact, pairs, strict=True))
        assert name != "clbench" or error <= 1e-4, error
        yield value(
            "precision",
            f"24 endings, {subject.name}",
            peer=f"{name} from float64",
            unit="1e-6 nats a token",
            value=error * 1e6,
            wanted="<= 100" if name == "clbench" else "-",
        )


@torch.inference_mode()
def exact_scores(model: Module, pairs: list[tuple[scoring.Ids, scoring.Ids]]) -> list[float]:
    """log p(continuation | context) in nats of each pair, by the model as it is, one sequence at a time."""
    found = []
    for context, ending in pairs:
        logits_TV = model(input_ids=torch.tensor([context + ending]), logits_to_keep=len(ending) + 1).logits[0]
        log_probs_TV = logits_TV[:-1].log_softmax(-1)
        found.append(float(log_probs_TV[range(len(ending)), list(ending)].sum()))
    return found
