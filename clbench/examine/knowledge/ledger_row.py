"""A row of base knowledge in the ledger: lm-eval's tasks with their requests, what responses score, and what answers without knowledge do."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby, zip_longest
from typing import Any, cast

import numpy as np
from lm_eval.api import metrics
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from scipy.special import softmax

from clbench.examine.scores import Found, mean
from clbench.types import UserMistake

# Log-likelihoods of a choice that is taken and of one that is not, apart by more than any division by length can bridge.
CERTAIN, RULED_OUT = -1.0, -1e6
PROBABILITY = "probability"
"""The metric beside accuracy: the probability of the right choice among the choices."""


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """A row of the ledger: the tasks behind `name` with their requests built, the document ids chosen of each; `by_size` as in NamedRow."""

    name: str
    tasks: tuple[Task, ...]
    chosen: tuple[tuple[int, ...], ...]
    by_size: Mapping[str, bool] = field(default_factory=dict)

    def documents(self) -> list[tuple[Task, list[Instance]]]:
        """The requests of each document beside its task, in order."""
        by_document = [(task, groupby(task.instances, key=lambda request: request.doc_id)) for task in self.tasks]
        return [(task, list(members)) for task, documents in by_document for _, members in documents]

    @cached_property
    def offered(self) -> list[tuple[str, ...]]:
        """The choices of each document, in order."""
        return [tuple(task.doc_to_choice(asked[0].doc)) for task, asked in self.documents()]

    @cached_property
    def rights(self) -> list[list[float]]:
        """What each choice of each document scores by the task's metric when it is taken for certain: 1 for the right one, mostly."""
        asked = zip(self.documents(), self.offered, strict=True)
        return [choice_scores(*one, len(choices), cast(str, self.metric)) for one, choices in asked]

    @property
    def metric(self) -> str | None:
        """What multiple choice is scored by, `acc_norm` before `acc`; None where the tasks have neither, or no choices."""
        known = self.tasks[0].aggregation() if self.tasks[0].OUTPUT_TYPE == "multiple_choice" else {}
        return next((name for name in ("acc_norm", "acc") if name in known), None)


def outcomes_of(row: LedgerRow) -> dict[str, list[list[Any]]]:
    """Per metric (`metric,filter` where there are several filters) and task what each document gave by its requests' responses: a number, or what
    its aggregation takes. A document may lack a metric."""
    for task in row.tasks:
        for request in task.instances:
            request.filtered_resps = {}
        task.apply_filters()
    outcomes = defaultdict(lambda: [[] for _ in row.tasks])
    for number, (task, asked) in enumerate(row.documents()):
        filters, place = list(asked[0].filtered_resps), row.tasks.index(task)
        for name in filters:
            results = task.process_results(asked[0].doc, [request.filtered_resps[name] for request in asked])
            for metric, value in results.items():
                outcomes[metric if len(filters) == 1 else f"{metric},{name}"][place].append(value)
        if row.metric:
            outcomes[PROBABILITY][place].append(probability(row, number, [request.resps[0][0] for request in asked]))
    return outcomes


def probability(row: LedgerRow, number: int, log_likelihoods: Sequence[float]) -> float:
    """The probability that document `number` gives to its right choice among its choices: a softmax over their log-likelihoods in nats.

    Where `acc_norm` is the metric they are, as there, divided by the choice's length in characters. Requests after the choices count for nothing.
    """
    choices = row.offered[number]
    nats = np.array(log_likelihoods[: len(choices)])
    if row.metric == "acc_norm":
        nats = nats / [len(choice) for choice in choices]
    return float(softmax(nats) @ row.rights[number])


def aggregated(row: LedgerRow, metric: str, outcomes: Sequence[Sequence[Any]]) -> dict[str, Found]:
    """The metric of all items together, or, where lm-eval's group averages its tasks and that differs, the average of the tasks' metrics.

    It differs where tasks count equally (`weight_by_size: false`), and where the metric is no mean over items (perplexity, F1). Beside a mean of
    tasks' means stands METRIC_by_task, whose items these means are.
    """
    name = metric.partition(",")[0]
    aggregations, by_size = [task.aggregation().get(name, metrics.mean) for task in row.tasks], row.by_size.get(name)
    are_means = {*aggregations} == {metrics.mean}
    if by_size is None or (by_size and are_means):
        return {metric: of_items([*chain(*outcomes)], aggregations[0])}
    each = [of_items(values, own) for values, own in zip(outcomes, aggregations, strict=True) if values]
    values, sizes = [one.value for one in each], [one.n for one in each]
    average = Found(
        float(metrics.aggregate_subtask_metrics(values, sizes, by_size)),
        n=sum(sizes),
        stderr=math.nan if by_size else float(metrics.unweighted_mean_stderr([one.stderr for one in each])),
        items=(*chain(*(one.items for one in each)),),
    )
    return {metric: average} | ({f"{metric}_by_task": mean(values)} if are_means else {})


def of_items(values: Sequence[Any], aggregation: Callable[..., Any]) -> Found:
    """The mean of items with its standard error, or a metric of all items together (perplexity, F1), which keeps items that are numbers.

    Raises UserMistake where so few documents do not define the metric.
    """
    if aggregation is metrics.mean:
        return mean(values)
    try:
        value = float(aggregation(values))
    except OverflowError:  # the perplexity of a text that a broken model gives no chance at all
        value = math.inf
    except ZeroDivisionError as error:
        raise UserMistake(
            f"a probe's metric ({aggregation.__name__}) is not defined on the {len(values)} documents that are asked; ask more (probe.limit, "
            "probe.probes.*.items), or leave the task out of probe.tasks"
        ) from error
    numeric = all(isinstance(item, (int, float, np.number)) for item in values)
    return Found(value, len(values), items=tuple(map(float, values)) if numeric else ())


def floors(row: LedgerRow) -> dict[str, Found]:
    """What answering without knowledge gives: `chance` by guessing, `majority` by always the same answer.

    Chance is the mean score over a document's choices of a model that is certain of one of them, so it holds for one right choice of
    many, for several, and for a share of probability (truthfulqa_mc2). Majority is the one answer that scores best over all documents, by its words
    or by its position. Where the right choice always has the same position that is how the rows are written (TruthfulQA's first), not what a model
    could see, and words count alone, if they score more than chance. Answers that are written have chance 0, and where a right one occurs more
    than once and is scored by exact_match, as majority what the commonest scores. Running text has neither.
    """
    form = row.tasks[0].OUTPUT_TYPE
    if form == "loglikelihood_rolling" or (form == "multiple_choice" and row.metric is None):
        return {}
    if form != "multiple_choice":
        return {"chance": mean([0.0] * len(row.documents()))} | ({} if form != "generate_until" else commonest(row))
    found = {"chance": mean([float(np.mean(scored)) for scored in row.rights])}
    by_place = np.array(list(zip_longest(*row.rights, fillvalue=0.0)))
    place = by_place[np.argmax(by_place.mean(axis=1))].tolist()
    by_words = [dict(zip(*one, strict=True)) for one in zip(row.offered, row.rights, strict=True)]
    totals = Counter[str]()
    for one in by_words:
        totals.update(one)  # adds
    (best, _), *_ = totals.most_common(1)
    words = [one.get(best, 0.0) for one in by_words]
    if len(set(row.offered)) == 1 or min(place) < 1:
        found["majority"] = mean(max(place, words, key=sum))
    elif np.mean(words) > found["chance"].value:
        found["majority"] = mean(words)
    return found


def commonest(row: LedgerRow) -> dict[str, Found]:
    """`majority` of answers that are written: what the one that is right most often scores when it is always given."""
    targets = Counter[str]()
    for task, asked in row.documents():
        target = task.doc_to_target(asked[0].doc)
        targets.update(set(map(str, target if isinstance(target, list) else [target])))
    (text, count), *_ = targets.most_common(1)
    if count == 1:
        return {}
    for task in row.tasks:
        for request in task.instances:
            request.resps = [text]
    exact = [[*chain(*outcomes)] for metric, outcomes in outcomes_of(row).items() if metric.startswith("exact_match")]
    return {"majority": mean(max(exact, key=sum))} if exact else {}


def choice_scores(task: Task, asked: Sequence[Instance], count: int, metric: str) -> list[float]:
    """What each of a document's `count` choices scores by `metric` when it is taken for certain."""
    found = []
    for taken in range(count):
        # Requests after the choices ask for their probability without the question; there all are equal.
        certain = (taken, *range(count, len(asked)))
        responses = [(CERTAIN if k in certain else RULED_OUT, k == taken) for k in range(len(asked))]
        found.append(float(task.process_results(asked[0].doc, responses)[metric]))
    return found
