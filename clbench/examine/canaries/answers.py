"""Canaries about answers: what cannot know the right one does not find it, and what is right counts as right."""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from math import ceil, sqrt
from statistics import mode

from clbench.examine.copying import copies
from clbench.examine.matrix import choose, copied_from, examine, floors
from clbench.examine.student import Student
from clbench.protocols import Stage, Task
from clbench.stream import NOT_RIGHT, is_right
from clbench.types import Example, Unusable

STANDARD_ERRORS = 4
NEAR_ZERO = 0.05
"""What a random model may always score on a generative task."""
COPIED = 0.95
"""Share of examples from which on a task counts as solved by copying."""
ENOUGH = 16
"""So many examples are copied from at least: a few may be solved by luck."""
SHUFFLED_AT_MOST = 0.9
"""Mean score of other examples' answers on a generative task; sentences made after one pattern share most of their words."""

Verdict = tuple[bool, str]
"""Whether a canary passed, and the numbers that it saw."""


def chance(stage: Stage, student: Student) -> Verdict:
    """Whether a random model's choices are right no more and no less often than choices that ignore the question.

    Expected is the sum over places among the choices of (share answered there) times (share right there), as for a model that may favour
    a label; the accuracy lies within four standard errors of it, and one example (counts are whole).
    """
    tests = stage.test
    answers, _ = choose(student, tests)
    accuracy = sum(map(stage.task.score, tests, answers)) / len(tests)
    given = Counter(place(example, answer) for example, answer in zip(tests, answers, strict=True))
    right = Counter(place(example, example.answer) for example in tests)
    expected = sum(count * right[position] for position, count in given.items()) / len(tests) ** 2
    allowed = STANDARD_ERRORS * sqrt(expected * (1 - expected) / len(tests)) + 1 / len(tests)
    return (
        abs(accuracy - expected) <= allowed,
        f"random weights: accuracy {accuracy:.3f}, {expected:.3f} expected of answers that ignore the question, {allowed:.3f} off allowed",
    )


def place(example: Example, answer: str) -> int:
    """Where `answer` stands among the choices; -1 where it is none."""
    return example.choices.index(answer) if answer in example.choices else -1


def near_zero(stage: Stage, student: Student, wrong: Sequence[float]) -> Verdict:
    """Whether a random model's greedy text scores no more than answers that ignore the question.

    These are the answers of other examples (mean of `wrong`) and the commonest answer; 0.05 is allowed in any case.
    """
    items, _ = examine(student, stage)
    score = sum(items[stage.task.metric]) / len(stage.test)
    constant = mode(example.answer for example in stage.test)
    commonest = sum(stage.task.score(example, constant) for example in stage.test) / len(stage.test)
    other = sum(wrong) / max(len(wrong), 1)
    allowed = max(NEAR_ZERO, other, commonest)
    return (
        score <= allowed,
        f"random weights: {score:.3f}, at most {allowed:.3f} (others' answers {other:.3f}, the commonest answer {commonest:.3f})",
    )


def copier(stage: Stage) -> Verdict:
    """Whether no reader of `copies` is right on 95 per cent of the examples, and on more of them than the commonest answer.

    The last condition spares tasks on which nearly all answers are alike. Training examples fill up a short test set, which may be solved
    by luck. A task whose answer does stand at a fixed place of the prompt fails, on purpose: it can be solved without being understood.
    """
    examples = (*stage.test, *stage.train)[: max(len(stage.test), ENOUGH)]
    constant = [mode(example.answer for example in examples)] * len(examples)
    least = max(ceil(COPIED * len(examples)), solved(stage.task, examples, constant) + 1)
    readers = 0
    for name, answers in copies(examples):
        readers += 1
        right = solved(stage.task, examples, answers)
        if right >= least:
            return False, f"{name} are right {right} times in {len(examples)}; {least - 1} are allowed"
    return True, f"none of {readers} readers that only copy is right {least} times in {len(examples)}"


def solved(task: Task, examples: Sequence[Example], answers: Sequence[str]) -> int:
    """How many of the answers get the full score."""
    return sum(is_right(task, example, answer) for example, answer in zip(examples, answers, strict=True))


def above_floors(stage: Stage) -> Verdict:
    """Whether no reader of `copies`, no constant answer and no constant word scores more than the highest of the task's floors.

    The constants are the commonest answer and the commonest first word of one, which is all that some metrics look at. Four standard errors and
    one example are allowed.
    """
    found, answers = floors(stage), [example.answer for example in stage.test]
    highest = max(found, key=lambda name: found[name])
    first_words = [next(iter(answer.split()), answer) for answer in answers]
    tried = {"the commonest answer": [mode(answers)] * len(answers)}
    tried |= {"the commonest first word": [mode(first_words)] * len(answers)} | dict(copies(copied_from(stage)))
    scored = {name: sum(map(stage.task.score, stage.test, given)) / len(given) for name, given in tried.items()}
    best = max(scored, key=lambda name: scored[name])
    score, n = scored[best], len(tried[best])
    allowed = found[highest] + STANDARD_ERRORS * sqrt(score * (1 - score) / n) + 1 / n
    return (
        score <= allowed,
        f"of {len(tried)} ways to answer without understanding, {best} scores most, {score:.3f}, at most {allowed:.3f}; "
        f"the highest floor is {highest}, {found[highest]:.3f}",
    )


def swap(pairs: Sequence[tuple[Example, Example]]) -> Verdict:
    """Whether no prompt changes when another row's answer is put into its row."""
    changed = [example.id for example, swapped in pairs if example.prompt != swapped.prompt]
    return not changed, f"{len(changed)} of {len(pairs)} prompts change with the answer"


def reference(stage: Stage, unusable: Sequence[Unusable]) -> Verdict:
    """Whether every right answer gets the full score, is of a valid form and, in a closed task, is one of the choices.

    Rows of which this does not hold were dropped when the stream was built, a few in a hundred at most: more show that the metric is wrong.
    """
    accepted = [(example, answer) for example in stage.test for answer in (example.answer, *example.references)]
    full = sum(is_right(stage.task, example, answer) for example, answer in accepted)
    valid = sum(
        stage.task.is_valid(example, answer) and (not example.choices or answer in example.choices)
        for example, answer in accepted
    )
    wrong = [one for one in unusable if one.task == stage.name and one.why == NOT_RIGHT]
    return (
        full == valid == len(accepted) and all(one.dropped for one in wrong),
        f"of {len(accepted)} right answers {full} get the full score and {valid} are valid"
        + "".join(f"; of the {one.split} rows {one.count} of {one.of} do not" for one in wrong),
    )


def wrong_scores(stage: Stage) -> list[float]:
    """Scores of wrong answers: of a closed task every wrong choice, else for each example the next answer that is not its own.

    The answers of training examples follow those of the test examples in that rotation. Empty where no wrong answer is to be had.
    """
    scores = []
    answers = [example.answer for example in (*stage.test, *stage.train)]
    for index, example in enumerate(stage.test):
        right = {example.answer, *example.references}
        if example.choices:
            scores += [stage.task.score(example, choice) for choice in example.choices if choice not in right]
        else:
            others = (answer for answer in (*answers[index + 1 :], *answers[:index]) if answer not in right)
            scores += [stage.task.score(example, answer) for answer in islice(others, 1)]
    return scores


def shuffled(wrong: Sequence[float], *, closed: bool) -> Verdict:
    """Whether wrong answers score 0 on a closed task, else at most 0.9 on average.

    Fails where no answer is wrong: nothing then shows that the score can be less than full.
    """
    if not wrong:
        return False, "there is no wrong answer to score: all are alike"
    mean, allowed = sum(wrong) / len(wrong), 0.0 if closed else SHUFFLED_AT_MOST
    return mean <= allowed, f"{len(wrong)} wrong answers score {mean:.3f} on average, at most {allowed:.3f}"
