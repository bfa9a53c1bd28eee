"""Base knowledge through lm-eval's task objects: its prompts, choices, filters and metrics, our scoring of its requests.

Requests are built once per run; after every stage the same requests are scored again, so items pair up between stages. A group of
tasks (mmlu) is one row of the ledger, its items one after the other. Rows come from the hub, from `data_dir/<folder>/<split>.jsonl`
where `folders` maps the dataset's hub name to its folder, or from `rows` given in memory.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task

from clbench.data.rows import DatasetSpec, fingerprint
from clbench.examine.items import Wanted, choose, share
from clbench.examine.lm import Outcomes, StudentLM, by_document, run_task
from clbench.examine.lm_tasks import Builder, Rows, groups, registered_tasks
from clbench.examine.matrix import item_score
from clbench.examine.student import Student
from clbench.protocols import Probe, Stream
from clbench.types import Score, UserMistake

CERTAIN, RULED_OUT = -1.0, -1e6
"""Log-likelihoods of a choice that is taken and of one that is not, apart by more than any division by length can bridge."""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """A row of the ledger: the tasks behind `name` with their requests built, and the document ids chosen of each."""

    name: str
    tasks: tuple[Task, ...]
    chosen: tuple[tuple[int, ...], ...]


class Knowledge(Probe):
    """The lm-eval `tasks` (tasks or groups), each on the documents that `items` names, at most the first `limit` of each task.

    `items` maps a name of `tasks` to a number (a fixed subset, see `probes.items`; an equal part for each task of a group) or, for a single
    task, to a list of indices; a task that it does not name is measured whole. Names that are not in `tasks` lie idle, so that a yaml can state
    the items of more tasks than a run measures. `max_length` is the longest input in tokens; None: what the model can read, as in lm-eval.
    """

    def __init__(
        self,
        *,
        name: str,
        tasks: Sequence[str],
        limit: int | None = None,
        items: Mapping[str, Wanted] | None = None,
        max_length: int | None = None,
        include: str | None = None,
        rows: Mapping[str, Rows] | None = None,
        data_dir: str | None = None,
        folders: Mapping[str, str] | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.max_length = max_length
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        builder = Builder(rows=rows or {}, data_dir=data_dir, folders=folders or {}, columns=columns or {})
        wanted = items or {}
        found = {group.name: group.tasks for task in tasks for group in groups(task, include=include)}
        check_items(wanted, tasks=tasks, measured=found)
        # lm-eval and datasets draw a progress bar per task, over the run's own line.
        with contextlib.redirect_stderr(io.StringIO()):
            self.examined = tuple(
                prepare(group, [builder.build(config) for config in configs], wanted=wanted.get(group), limit=limit)
                for group, configs in found.items()
            )
        specs = [builder.dataset(task) for row in self.examined for task in row.tasks]
        self._datasets = tuple(spec for spec in specs if spec is not None)

    def datasets(self) -> Sequence[DatasetSpec]:
        """The hub dataset of every lm-eval task; none for rows given in memory."""
        return self._datasets

    def documents(self) -> Mapping[str, Sequence[str]]:
        """Each chosen document's text without few-shot examples, with its choices."""
        return {
            row.name: [text(task, members[0].doc) for task in row.tasks for members in by_document(task)]
            for row in self.examined
        }

    def fingerprints(self) -> dict[str, str]:
        """Per row of the ledger the SHA-256, in hexadecimal, of the ids ("task/index") of its documents in their order."""
        return {
            row.name: fingerprint(
                [f"{task.task_name}/{index}" for task, ids in zip(row.tasks, row.chosen, strict=True) for index in ids]
            )
            for row in self.examined
        }

    def measure(self, student: Student, stream: Stream, stage: int) -> Iterator[Score]:
        """Each row's metrics; at stage 0 also its chance rate, and the majority rate where all its items offer the same choices."""
        model = StudentLM(student, max_length=self.max_length)
        stage_name = stream.stages[stage - 1].name if stage else "base"
        for row in self.examined:
            started = time.perf_counter()
            outcomes = [run_task(task, model) for task in row.tasks]
            items = {metric: [value for found in outcomes for value in found[metric]] for metric in outcomes[0]}
            aggregations = row.tasks[0].aggregation()
            if stage == 0:
                items |= floors(row.tasks)
            seconds = time.perf_counter() - started
            for metric, values in items.items():
                aggregation = aggregations.get(metric.partition(",")[0], mean)
                make = item_score if aggregation is mean else partial(corpus_score, aggregation=aggregation)
                yield make(stage, stage_name, self.name, row.name, metric, values, seconds=seconds)
                seconds = 0.0


def check_items(wanted: Mapping[str, Wanted], *, tasks: Sequence[str], measured: Mapping[str, object]) -> None:
    """Raises UserMistake for a name of `items` that nothing can ever match."""
    for name in wanted.keys() - measured.keys():
        if name in tasks:
            raise UserMistake(
                f"probe.probes.*.items names {name!r}, whose tasks measure different things and are reported one by one; "
                f"name them instead, of {', '.join(measured)} (conf/probe)"
            )
        if name not in registered_tasks().task_index:
            raise UserMistake(f"probe.probes.*.items names {name!r}, which lm-eval does not know (conf/probe)")


def prepare(name: str, tasks: Sequence[Task], *, wanted: Wanted, limit: int | None) -> Examined:
    """Builds the requests of the chosen documents of each of a group's tasks."""
    part = share(name, wanted=wanted, tasks=len(tasks))
    chosen = []
    for task in tasks:
        size = len(task.eval_docs)
        indices = choose(task.task_name, size=size, wanted=part)[:limit]
        task.build_all_requests(samples=list(indices) if len(indices) < size else None)
        chosen.append(indices)
    return Examined(name=name, tasks=tuple(tasks), chosen=tuple(chosen))


def corpus_score(
    stage: int,
    stage_name: str,
    probe: str,
    task: str,
    metric: str,
    values: Sequence[Any],
    *,
    aggregation: Callable[[Sequence[Any]], float],
    seconds: float,
) -> Score:
    """A metric of all items together (perplexity, F1), without a standard error; items that are numbers are kept."""
    try:
        value = float(aggregation(values))
    except OverflowError:  # the perplexity of a text that a broken model gives no chance at all
        value = math.inf
    numeric = all(isinstance(item, (int, float, np.number)) for item in values)
    return Score(
        stage=stage,
        stage_name=stage_name,
        probe=probe,
        task=task,
        metric=metric,
        value=value,
        n=len(values),
        stderr=math.nan,
        seconds=seconds,
        items=tuple(float(item) for item in values) if numeric else (),
    )


def floors(tasks: Sequence[Task]) -> Outcomes:
    """Per item what guessing gives: `chance`, and `majority` where every item offers the same choices (letters, yes and no).

    Chance is the mean score over a document's choices of a model that is certain of one of them, so it holds for one right choice of
    many, for several, and for a share of probability (truthfulqa_mc2). Majority is the one choice that scores best over all documents. Answers that
    are written have chance 0, running text has none.
    """
    if tasks[0].OUTPUT_TYPE != "multiple_choice":
        count = sum(len(by_document(task)) for task in tasks)
        return {} if tasks[0].OUTPUT_TYPE == "loglikelihood_rolling" else {"chance": [0.0] * count}
    metric = next((name for name in ("acc_norm", "acc") if name in tasks[0].aggregation()), None)
    if metric is None:
        return {}
    documents = [(task, members) for task in tasks for members in by_document(task)]
    choices = [tuple(task.doc_to_choice(members[0].doc)) for task, members in documents]
    scored = [
        choice_scores(task, members, count=len(offered), metric=metric)
        for (task, members), offered in zip(documents, choices, strict=True)
    ]
    found = {"chance": [float(np.mean(scores)) for scores in scored]}
    if len(set(choices)) == 1:
        best = int(np.argmax(np.mean(scored, axis=0)))
        found["majority"] = [scores[best] for scores in scored]
    return found


def choice_scores(task: Task, members: Sequence[Instance], *, count: int, metric: str) -> list[float]:
    """What each of a document's `count` choices scores by `metric` when it is taken for certain."""
    scores = []
    for taken in range(count):
        # Requests after the choices ask for their probability without the question; there all are equal.
        responses = [
            (CERTAIN if k in (taken, *range(count, k + 1)) else RULED_OUT, k == taken) for k in range(len(members))
        ]
        scores.append(float(task.process_results(members[0].doc, responses)[metric]))
    return scores


def text(task: Task, doc: Mapping[str, Any]) -> str:
    """What a document says: question and choices, the sentence with each choice in its gap, or the whole text."""
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(doc)
        if task.multiple_input:
            return "\n".join(f"{choice} {task.doc_to_target(doc)}" for choice in choices)
        return "\n".join([str(task.doc_to_text(doc)), *choices])
    if task.OUTPUT_TYPE == "generate_until":
        return str(task.doc_to_text(doc))
    return f"{task.doc_to_text(doc)}{task.doc_to_target(doc)}"
