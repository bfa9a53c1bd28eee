"""Base knowledge through lm-eval's task objects: its prompts, choices, filters and metrics, our scoring of its requests.

Requests are built once per run; after every stage the same requests are scored again, so items pair up between stages. lm-eval's own loop
(`lm_eval.evaluator.evaluate`) builds them anew at each call, which takes seconds, so `answer` stands in for it. A group of tasks (mmlu) is one
row of the ledger, its items one after the other.
"""

import contextlib
import importlib.resources
import io
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from clbench.data.rows import DatasetSpec
from clbench.examine.knowledge.ledger_row import LedgerRow, aggregated, floors, outcomes_of
from clbench.examine.lm import StudentLM
from clbench.examine.lm_tasks import (
    FEWSHOT_SEED,
    NamedRow,
    Rows,
    RowSource,
    Settings,
    Wanted,
    name_of,
    resolve,
    subset,
    task_index,
    wanted_of_each,
    with_shots,
    wrong_target,
)
from clbench.examine.scores import scores
from clbench.examine.student import Student
from clbench.protocols import Probe, Stream
from clbench.types import Score, UserMistake


def names_in(members: Iterable[str | Settings]) -> Iterator[str]:
    """The names in probe.tasks, those inside a group that is defined there, too."""
    for member in members:
        name = name_of(member)
        inner = name if isinstance(member, str) else member.get("task", ())
        yield name
        if not isinstance(inner, str):
            yield from names_in(inner)
        elif inner != name:
            yield inner


@dataclass(kw_only=True, eq=False)
class Knowledge(Probe):
    """The lm-eval `tasks`, each on the documents that `items` names, at most the first `limit` of each task.

    A member of `tasks` is the name of a task or group, or an entry as lm-eval's groups have them, {task: NAME, num_fewshot: 5}.
    `items` maps a name of `tasks` to a number (a fixed subset, see `lm_tasks`; an equal part for each task of a group) or, for a single
    task, to a list of indices; a task that it does not name is measured whole. Names that are not in `tasks` lie idle, so that a yaml can state
    the items of more tasks than a run measures. `shots` is the number of few-shot examples, of all tasks or by such a name (None: what each
    task's own yaml says); a row that shows another number is named `task@shots`. `max_length` is the longest input in tokens; None: what the
    model can read, as in lm-eval.
    `include` ("package:folder") and `include_path`, lm-eval's option of that name, are folders with yamls of one's own; `search`: see
    `lm_tasks.task_index`; the last four: see `lm_tasks.RowSource`.
    """

    name: str
    tasks: Sequence[str | Settings]
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
        named = {*map(name_of, self.tasks)}
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
        return LedgerRow(name=name, tasks=tasks, chosen=tuple(chosen), by_size=row.by_size)

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
            for metric, outcomes in answer(row, model).items():
                found |= aggregated(row, metric, outcomes)
            seconds = time.perf_counter() - started
            yield from scores(found, stream=stream, stage=stage, probe=self.name, task=row.name, seconds=seconds)


def check_targets(task: Task, documents: Iterable[int]) -> None:
    """Raises UserMistake where the right answer of a document is none of its choices: lm-eval would count it as missed by every model."""
    if not isinstance(task, ConfigurableTask) or task.OUTPUT_TYPE != "multiple_choice":
        return
    for number in documents:
        doc = task.eval_docs[number]
        target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        if wrong := wrong_target(target, task.doc_to_choice(doc)):
            raise UserMistake(
                f"probe task {task.task_name!r}, document {number}: its answer is {wrong}; mend the row, or leave the task out of probe.tasks"
            )


def build_requests(task: Task, chosen: Sequence[int], *, chat_template: Callable[..., str] | None = None) -> None:
    """Has lm-eval make the requests of the chosen documents; what it draws meanwhile would lie over the run's own line."""
    task.set_fewshot_seed(FEWSHOT_SEED)  # each time, as examples are drawn from where the last draw left off
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True} if chat_template else {}
    with contextlib.redirect_stderr(io.StringIO()):
        samples = list(chosen) if len(chosen) < len(task.eval_docs) else None
        task.build_all_requests(samples=samples, chat_template=chat_template, **chat)


def answer(row: LedgerRow, model: StudentLM) -> dict[str, list[list[Any]]]:
    """`outcomes_of` what the model responds."""
    requests = [request for task in row.tasks for request in task.instances]
    for ask in (model.loglikelihood, model.loglikelihood_rolling, model.generate_until):
        asked = [request for request in requests if request.request_type == ask.__name__]  # as lm-eval calls them
        for request, response in zip(asked, ask(asked, disable_tqdm=True), strict=True):
            request.resps = [response]
    return outcomes_of(row)


def text(task: Task, doc: Mapping[str, Any]) -> str:
    """What a document says: question and choices, the sentence with each choice in its gap, or the whole text."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return f"{task.doc_to_text(doc)}{'' if task.OUTPUT_TYPE == 'generate_until' else task.doc_to_target(doc)}"
    choices = task.doc_to_choice(doc)
    if task.multiple_input:
        return "\n".join(f"{choice} {task.doc_to_target(doc)}" for choice in choices)
    return "\n".join([str(task.doc_to_text(doc)), *choices])
