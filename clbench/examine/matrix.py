"""The stream's own tasks as a probe: one row of the matrix R[stage, task], every task of the stream, seen or not yet.

A closed task is answered by its likeliest choice (sum of token log-probabilities), a generative one by greedy decoding. Beside the task's own
metric stand the share of answers of the right form, and for closed tasks how often greedy decoding itself begins with the right choice
(`exact_match`) and what that form costs (`format_loss`: the metric less exact_match, item by item).
"""

import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from statistics import mode

import numpy as np

from clbench.examine.copying import copies
from clbench.examine.scores import Found, mean, scores
from clbench.examine.student import Student
from clbench.protocols import Probe, Stage, Stream
from clbench.types import Example, Score

CHOSEN_ON, COPIED_ROWS, COPIED_CHARACTERS = 32, 256, 10**6
"""On how many test examples a copying reader is chosen; how many, and how much text, it then reads at most."""


class Matrix(Probe):
    """Scores every task of the stream. The leaderboard reads the matrix from the probe whose `name` is "stream"."""

    def __init__(self, *, name: str) -> None:
        self.name = name

    def measure(self, student: Student, stream: Stream, stage: int) -> Iterator[Score]:
        """Per task: its metric, format_validity, for closed tasks exact_match and format_loss, corpus metrics; at stage 0 the floors."""
        for asked in stream.stages:
            student.about(self.name, asked.name)
            started = time.perf_counter()
            items, totals = examine(student, asked)
            seconds = time.perf_counter() - started
            if stage == 0:
                totals |= floors(asked)
            found = {metric: mean(outcomes) for metric, outcomes in items.items()}
            found |= {metric: Found(value, len(asked.test)) for metric, value in totals.items()}
            yield from scores(found, stream=stream, stage=stage, probe=self.name, task=asked.name, seconds=seconds)


def examine(student: Student, stage: Stage) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Per-item outcomes by metric, and metrics of the whole test set, of one task."""
    task, tests = stage.task, stage.test
    if tests[0].choices:
        answers, greedy = choose(student, tests)
        valid = [float(found is not None) for found in greedy]
        pairs = zip(tests, greedy, strict=True)
        written = [0.0 if found is None else task.score(example, found) for example, found in pairs]
        assert task.metric not in ("format_validity", "exact_match", "format_loss"), task.metric
        chosen = _scores(stage, answers)
        lost = [likely - greedy_score for likely, greedy_score in zip(chosen, written, strict=True)]
        items = {task.metric: chosen, "format_validity": valid, "exact_match": written, "format_loss": lost}
    else:
        prompts = [student.encoder.prompt(example.prompt) for example in tests]
        answers = student.generate(prompts, max_new_tokens=longest_answer(student, stage))
        valid = [float(task.is_valid(example, answer)) for example, answer in zip(tests, answers, strict=True)]
        items = {task.metric: _scores(stage, answers), "format_validity": valid}
    return items, task.corpus_scores(tests, answers)


def _scores(stage: Stage, answers: Sequence[str]) -> list[float]:
    return [stage.task.score(example, answer) for example, answer in zip(stage.test, answers, strict=True)]


def choose(student: Student, examples: Sequence[Example]) -> tuple[list[str], list[str | None]]:
    """The likeliest choice of each example, and the choice that greedy decoding begins with (None: it begins with none of them)."""
    encoder = student.encoder
    requests = [
        (encoder.prompt(example.prompt), encoder.answer(choice)) for example in examples for choice in example.choices
    ]
    scored = iter(student.log_likelihoods(requests))
    likeliest: list[str] = []
    greedy: list[str | None] = []
    for example in examples:
        results = [(choice, *next(scored)) for choice in example.choices]
        likeliest.append(max(results, key=lambda result: result[1])[0])
        # One choice may begin another ("card", "card lost"): the longest that greedy decoding spells counts.
        spelled = [choice for choice, _, is_greedy in results if is_greedy]
        greedy.append(max(spelled, key=len) if spelled else None)
    return likeliest, greedy


def longest_answer(student: Student, stage: Stage) -> int:
    """Tokens to generate at most: the training answers' 99th percentile and one for EOS, but no more than the task allows."""
    lengths = [len(student.encoder.answer(example.answer)) for example in stage.train]
    usual = int(np.quantile(lengths, 0.99, method="higher")) + 1
    return min(usual, stage.task.max_new_tokens or usual)


def floors(stage: Stage) -> dict[str, float]:
    """What is to be had without an answer of one's own, as mean scores.

    `chance`: of the guesses that a question leaves (zero where it leaves none). `majority`: of the commonest test answer, or of the
    commonest right guess if that is more. `format_only` is what an answer of the right form scores that knows nothing of the question:
    test example i gets the answer of training example i (counted round where train is shorter), both in the task's fixed order.
    `copy`: of what stands at one place of each prompt (`copied`).
    """
    task, tests = stage.task, stage.test
    guessed = [[(guess, task.score(example, guess)) for guess in task.guesses(example)] for example in tests]
    chance = sum(sum(score for _, score in offered) / len(offered) for offered in guessed if offered) / len(tests)
    right = [guess for offered in guessed for guess, score in offered if score >= task.reference_score]
    common = [mode(said) for said in ([example.answer for example in tests], right) if said]
    majority = max(sum(task.score(example, constant) for example in tests) for constant in common) / len(tests)
    borrowed = (task.score(example, stage.train[i % len(stage.train)].answer) for i, example in enumerate(tests))
    return {"chance": chance, "majority": majority, "format_only": sum(borrowed) / len(tests), "copy": copied(stage)}


def copied(stage: Stage) -> float:
    """The mean score of the reader of `copying` that does best on the first 32 test examples.

    Of the others those of `copied_from` are read.
    """
    tests = copied_from(stage)

    def mean_score(answers: Sequence[str], rows: int) -> float:
        pairs = list(zip(tests, answers, strict=True))[:rows]
        return sum(stage.task.score(example, answer) for example, answer in pairs) / len(pairs)

    best = max((answers for _, answers in copies(tests)), key=lambda answers: mean_score(answers, CHOSEN_ON))
    return mean_score(best, len(tests))


def copied_from(stage: Stage) -> Sequence[Example]:
    """The first test examples, at most 256 and a million characters, as every reader keeps the places of all words."""
    characters = accumulate(len(example.prompt) for example in stage.test[:COPIED_ROWS])
    return stage.test[: max(sum(so_far <= COPIED_CHARACTERS for so_far in characters), 1)]
