"""Base knowledge through lm-eval's task objects: its prompts, choices, filters and metrics, our scoring of its requests.

Requests are built once per run; after every stage the same requests are scored again, so items pair up between stages. lm-eval's own loop
(`lm_eval.evaluator.evaluate`) builds them anew at each call, which takes seconds, so `answer` stands in for it. A group of tasks (mmlu) is one
row of the ledger, its items one after the other.
"""

import contextlib
import importlib.resources
import io
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby, islice, zip_longest
from pathlib import Path
from typing import Any, cast

import numpy as np
from lm_eval.api import metrics
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from scipy.special import softmax

from clbench.data.rows import DatasetSpec
from clbench.examine.lm import StudentLM
from clbench.examine.lm_tasks import (
    FEWSHOT_SEED,
    NamedRow,
    Rows,
    RowSource,
    Wanted,
    check_targets,
    resolve,
    subset,
    task_index,
    wanted_of_each,
    with_shots,
)
from clbench.examine.scores import Found, mean, scores
from clbench.examine.student import Student
from clbench.protocols import Probe, Stream
from clbench.types import Score, UserMistake

# Log-likelihoods of a choice that is taken and of one that is not, apart by more than any division by length can bridge.
CERTAIN, RULED_OUT = -1.0, -1e6
PROBABILITY = "probability"
"""The metric beside accuracy: the probability of the right choice among the choices."""


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """A row of the ledger: the tasks behind `name` with their requests built, the document ids chosen of each; `unweighted` as in NamedRow."""

    name: str
    tasks: tuple[Task, ...]
    chosen: tuple[tuple[int, ...], ...]
    unweighted: frozenset[str] = frozenset()

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


def names_in(members: Iterable[str | Mapping[str, Any]]) -> Iterator[str]:
    """The names in probe.tasks, those inside a group that is defined there, too."""
    for member in members:
        stated = {"task": member} if isinstance(member, str) else member
        inner = stated.get("task", ())
        yield from [str(stated["group"])] if "group" in stated else []
        yield from [inner] if isinstance(inner, str) else names_in(inner)


@dataclass(kw_only=True, eq=False)
class Knowledge(Probe):
    """The lm-eval `tasks` (tasks or groups), each on the documents that `items` names, at most the first `limit` of each task.

    `items` maps a name of `tasks` to a number (a fixed subset, see `lm_tasks`; an equal part for each task of a group) or, for a single
    task, to a list of indices; a task that it does not name is measured whole. Names that are not in `tasks` lie idle, so that a yaml can state
    the items of more tasks than a run measures. `shots` is the number of few-shot examples, of all tasks or by such a name (None: what each
    task's own yaml says); a row that shows another number is named `task@shots`. `max_length` is the longest input in tokens; None: what the
    model can read, as in lm-eval.
    `include` ("package:folder") and `include_path`, lm-eval's option of that name, are folders with yamls of one's own; `search`: see
    `lm_tasks.task_index`; the last four: see `lm_tasks.RowSource`.
    """

    name: str
    tasks: Sequence[str]
    limit: int | None = None
    items: Mapping[str, Wanted] | None = None
    shots: int | Mapping[str, int] | None = None
    max_length: int | None = None
    search: Sequence[str] = ()
    include: str | None = None
    include_path: str | None = None
    rows: Mapping[str, Rows] = field(default_factory=dict)
    data_dir: str | None = None
    folders: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        wanted = set(self.items or ())
        shots = self.shots if isinstance(self.shots, Mapping) else {"all": self.shots}
        for task, count in shots.items():
            if count is not None and (type(count) is not int or count < 0):
                raise UserMistake(
                    f"probe.shots asks for {count!r} of {task}; give whole numbers from 0 on, as 5 or {{mmlu: 5}}"
                )
        named = {task if isinstance(task, str) else str(task.get("group") or task["task"]) for task in self.tasks}
        own = [] if self.include_path is None else [Path(self.include_path).resolve()]
        if self.include is not None:
            package, _, folder = self.include.partition(":")
            own.append(Path(str(importlib.resources.files(package)), folder))
        index = task_index({*wanted, *names_in(self.tasks)}, search=self.search, own=own)
        for task in shots.keys() - named - index.task_index.keys() - {"all"}:
            raise UserMistake(
                f"probe.shots names {task!r}; it goes by the names of probe.tasks: {', '.join(sorted(named))}"
            )
        asked = [with_shots(task, self.shots, index) for task in self.tasks]
        found = {name: row for task in asked for name, row in resolve(task, index).items()}
        for item in wanted - {row.asked for row in found.values()}:
            if item in self.tasks or item not in index.task_index:
                raise UserMistake(
                    f"probe.probes.*.items names {item!r}, which lm-eval does not know, or whose tasks measure different things and are "
                    f"reported one by one; of {', '.join(found)}, name those that you mean (conf/probe)"
                )
        self._source = RowSource(rows=self.rows, data_dir=self.data_dir, folders=self.folders, columns=self.columns)
        # lm-eval and datasets draw a progress bar per task, over the run's own line.
        with contextlib.redirect_stderr(io.StringIO()):
            self.ledger_rows = [self._prepared(name, row, index) for name, row in found.items()]

    def _prepared(self, name: str, row: NamedRow, index: TaskManager) -> LedgerRow:
        """Builds the tasks of a row, and the requests of the chosen documents of each."""
        tasks = tuple(self._source.build(one, index) for one in row.tasks)
        each, chosen = wanted_of_each(name, wanted=(self.items or {}).get(row.asked), tasks=len(tasks)), []
        for task in tasks:
            size = len(task.eval_docs)
            chosen.append(subset(task.task_name, size=size, wanted=each)[: self.limit])
            check_targets(task, chosen[-1])
            build_requests(task, chosen[-1])
        return LedgerRow(name=name, tasks=tasks, chosen=tuple(chosen), unweighted=row.unweighted)

    def datasets(self) -> Sequence[DatasetSpec]:
        tasks = [task for row in self.ledger_rows for task in row.tasks if task.task_name not in self.rows]
        return tuple(self._source.dataset(task.DATASET_PATH, task.DATASET_NAME) for task in tasks if task.DATASET_PATH)

    def documents(self) -> Mapping[str, Sequence[str]]:
        """Each chosen document's text without few-shot examples, with its choices."""
        return {row.name: [text(task, asked[0].doc) for task, asked in row.documents()] for row in self.ledger_rows}

    def begin(self, student: Student) -> None:
        """Puts the questions as a chat where the tasks' are, as `lm-eval --apply_chat_template` does: examples are turns of it."""
        if student.encoder.chat:
            model = StudentLM(student)
            for row in self.ledger_rows:
                for task, chosen in zip(row.tasks, row.chosen, strict=True):
                    build_requests(task, chosen, chat_template=model.apply_chat_template)

    def measure(self, student: Student, stream: Stream, stage: int) -> Iterator[Score]:
        """Each row's metrics; at stage 0 also its `floors`."""
        model = StudentLM(student, max_length=self.max_length)
        for row in self.ledger_rows:
            student.about(self.name, row.name)
            started = time.perf_counter()
            found = floors(row) if stage == 0 else {}
            for metric, values in answer(row, model).items():
                found |= aggregated(row, metric, values)
            seconds = time.perf_counter() - started
            yield from scores(found, stream=stream, stage=stage, probe=self.name, task=row.name, seconds=seconds)


def build_requests(task: Task, chosen: Sequence[int], *, chat_template: Callable[..., str] | None = None) -> None:
    """Has lm-eval make the requests of the chosen documents; what it draws meanwhile would lie over the run's own line."""
    task.set_fewshot_seed(FEWSHOT_SEED)  # each time, as examples are drawn from where the last draw left off
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True} if chat_template else {}
    with contextlib.redirect_stderr(io.StringIO()):
        samples = list(chosen) if len(chosen) < len(task.eval_docs) else None
        task.build_all_requests(samples=samples, chat_template=chat_template, **chat)


def answer(row: LedgerRow, model: StudentLM) -> dict[str, list[Any]]:
    """Per metric (`metric,filter` where there are several filters) what each document gave: a number, or what its aggregation takes."""
    requests = [request for task in row.tasks for request in task.instances]
    for ask in (model.loglikelihood, model.loglikelihood_rolling, model.generate_until):
        asked = [request for request in requests if request.request_type == ask.__name__]  # as lm-eval calls them
        for request, response in zip(asked, ask(asked, disable_tqdm=True), strict=True):
            request.resps = [response]
    return outcomes_of(row)


def outcomes_of(row: LedgerRow) -> dict[str, list[Any]]:
    """The same of the responses that the row's requests have been given."""
    for task in row.tasks:
        for request in task.instances:
            request.filtered_resps = {}
        task.apply_filters()
    outcomes = defaultdict(list)
    for number, (task, asked) in enumerate(row.documents()):
        filters = list(asked[0].filtered_resps)
        for name in filters:
            results = task.process_results(asked[0].doc, [request.filtered_resps[name] for request in asked])
            for metric, value in results.items():
                outcomes[metric if len(filters) == 1 else f"{metric},{name}"].append(value)
        if row.metric:
            outcomes[PROBABILITY].append(probability(row, number, [request.resps[0][0] for request in asked]))
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


def aggregated(row: LedgerRow, metric: str, values: Sequence[Any]) -> dict[str, Found]:
    """The mean over items, of tasks' means, or a metric of all items together (perplexity, F1), which keeps items that are numbers.

    Beside a mean of tasks' means stands METRIC_by_task, whose items these means are.
    """
    name = metric.partition(",")[0]
    aggregation = row.tasks[0].aggregation().get(name, metrics.mean)
    if aggregation is metrics.mean and name in row.unweighted:
        rest = iter(values)
        means = [mean(list(islice(rest, len(chosen)))) for chosen in row.chosen]
        stderr = float(metrics.unweighted_mean_stderr([one.stderr for one in means]))
        by_task = mean([one.value for one in means])
        return {metric: replace(mean(values), value=by_task.value, stderr=stderr), f"{metric}_by_task": by_task}
    if aggregation is metrics.mean:
        return {metric: mean(values)}
    try:
        value = float(aggregation(values))
    except OverflowError:  # the perplexity of a text that a broken model gives no chance at all
        value = math.inf
    numeric = all(isinstance(item, (int, float, np.number)) for item in values)
    return {metric: Found(value, len(values), items=tuple(map(float, values)) if numeric else ())}


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
    exact = [values for metric, values in outcomes_of(row).items() if metric.startswith("exact_match")]
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


def text(task: Task, doc: Mapping[str, Any]) -> str:
    """What a document says: question and choices, the sentence with each choice in its gap, or the whole text."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return f"{task.doc_to_text(doc)}{'' if task.OUTPUT_TYPE == 'generate_until' else task.doc_to_target(doc)}"
    choices = task.doc_to_choice(doc)
    if task.multiple_input:
        return "\n".join(f"{choice} {task.doc_to_target(doc)}" for choice in choices)
    return "\n".join([str(task.doc_to_text(doc)), *choices])
