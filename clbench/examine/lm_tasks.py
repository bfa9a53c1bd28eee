"""lm-eval's tasks by name: what a name stands for, and task objects whose rows come from the hub, from `data_dir` or from memory.

A name is one of lm-eval's tasks, groups or tags, or that of a yaml of our own. A group or tag is one row of the ledger where all its tasks
measure the same thing in the same way (mmlu: 57 subjects); else each of its members is (openllm, metabench). A row whose tasks show another
number of examples than their own yamls say has that number in its name: mmlu@5.

A subset of `count` documents is the `count` whose hash of (task, index) is lowest, in the order of their index: the same for every model, stage and
machine. The index is lm-eval's own document id (its `--samples`), by which lm-eval can measure it again; a larger subset holds every smaller one.

>>> subset("quiz", size=6, wanted=3), subset("quiz", size=6, wanted=4), subset("quiz", size=6, wanted=[5, 1])
((1, 3, 5), (0, 1, 3, 5), (1, 5))
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from datasets.exceptions import DatasetsError
from jinja2 import Environment, meta
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from clbench.config.names import nearest
from clbench.data.rows import DatasetSpec, kind_of, load_rows, place
from clbench.types import UserMistake

Rows = list[dict[str, Any]]
Settings = dict[str, Any]
Wanted = int | Sequence[int] | None  # how many documents, or which, or all
FILES = ("json", "csv", "parquet", "text")  # what stands for a dataset where a yaml names files (`dataset_kwargs`)
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
# Keys of lm-eval's yamls that say nothing of how a task is measured.
STRUCTURE = {"group", "group_alias", "aggregate_metric_list", "metadata", "tag", "task", "task_list"}
FEWSHOT_SEED = 1234  # lm-eval's default: the few-shot examples of a document are those that lm-eval shows


@dataclass(frozen=True, kw_only=True)
class Named:
    """One of lm-eval's tasks: its `config` (functions by their names), of which the groups that it was named through state `changes`."""

    name: str
    config: Settings
    changes: Settings


@dataclass(frozen=True, kw_only=True)
class NamedRow:
    """A row of the ledger: its `tasks`, the name that was `asked` for, and the metrics that its group averages over tasks, each with whether a
    task counts by its size."""

    asked: str
    tasks: tuple[Named, ...]
    by_size: Mapping[str, bool] = field(default_factory=dict)


def task_index(names: Iterable[str], *, search: Sequence[str] = (), own: Sequence[Path] = ()) -> TaskManager:
    """An index that knows `names`: of the folders `own` and the folders `search` of lm_eval/tasks, or the whole."""
    home = Path(lm_eval.tasks.__path__[0])
    few = TaskManager(include_defaults=False, include_path=[*(home / folder for folder in search), *own])
    # A tag may have tasks in other folders; a name that no file has in its text is a slip, for which no index is made.
    missing = set(names) - {*few.all_subtasks, *few.all_groups}
    spelled, files = re.compile("|".join(map(re.escape, missing)).encode()), home.rglob("*") if missing else ()
    return whole_index(*own) if any(path.is_file() and spelled.search(path.read_bytes()) for path in files) else few


@cache
def whole_index(*own: Path) -> TaskManager:
    """The index of all of lm-eval's tasks and of the folders `own`; made once, as lm-eval's 14,000 files take 5 to 30 s."""
    return TaskManager(include_path=list(own))


def name_of(member: str | Settings) -> str:
    """The task or group that a member of probe.tasks, or of one of lm-eval's groups, names; raises UserMistake where it names neither."""
    name = (member.get("group") or member.get("task")) if isinstance(member, dict) else member
    if not isinstance(name, str):
        raise UserMistake(
            f"probe.tasks: the entry {str(member):.80} names neither a task nor a group of lm-eval (its t0_eval has such entries); "
            "write NAME, {task: NAME, ...} or {group: NAME, ...}, or leave it out"
        )
    return name


def with_shots(member: str | Settings, shots: int | Mapping[str, int] | None, index: TaskManager) -> str | Settings:
    """A member of probe.tasks and the number of examples that it is to show; what it states itself stays.

    As in lm-eval, one number for all leaves a task alone whose own yaml says 0.
    """
    stated, name = {"task": member} if isinstance(member, str) else member, name_of(member)
    entry, for_all = index.task_index.get(name), not isinstance(shots, Mapping)
    wanted = shots.get(name) if isinstance(shots, Mapping) else shots
    fixed = for_all and entry is not None and (entry.cfg or {}).get("num_fewshot") == 0
    return member if wanted is None or fixed or "num_fewshot" in stated else {**stated, "num_fewshot": wanted}


def resolve(member: str | Settings, index: TaskManager, inherited: Settings | None = None) -> dict[str, NamedRow]:
    """The rows of the ledger that a name stands for, or a group's entry that changes settings of what it names; inner settings win."""
    stated: Settings = {"task": member} if isinstance(member, str) else member
    name, below = name_of(member), stated.get("task", ())
    changes = (inherited or {}) | _settings(stated)
    entry, means = index.task_index.get(name), stated.get("aggregate_metric_list")
    if entry is None and not isinstance(below, list):  # a list: a group that is defined where it is used
        raise UserMistake(
            f"probe.tasks names {name!r}, which lm-eval does not know; {nearest(name, index.task_index)}all: `lm-eval ls tasks`"
        )
    if entry is not None and entry.kind.name == "TAG":
        below = sorted(entry.tags)
    elif entry is not None and entry.kind.name == "GROUP":
        below, changes = entry.cfg["task"], _settings(entry.cfg) | changes
        means = means or entry.cfg.get("aggregate_metric_list")
    elif entry is not None:
        task = Named(name=name, config=entry.cfg | changes, changes=changes)
        return {_label(name, [task], index): NamedRow(asked=name, tasks=(task,))}
    rows: dict[str, NamedRow] = {}
    for inner in [below] if isinstance(below, str) else below:
        rows |= resolve(inner, index, changes)
    tasks = tuple(task for row in rows.values() for task in row.tasks)
    if len({_measure(task.config) for task in tasks}) > 1:
        return rows
    listed = [means] if isinstance(means, dict) else means or ()
    by_size = {one["metric"]: bool(one.get("weight_by_size", True)) for one in listed}
    return {_label(name, tasks, index): NamedRow(asked=name, tasks=tasks, by_size=by_size)}


def _label(name: str, tasks: Sequence[Named], index: TaskManager) -> str:
    shots = tasks[0].config.get("num_fewshot") or 0
    usual = {(index.task_index[task.name].cfg or {}).get("num_fewshot") or 0 for task in tasks}
    return name if usual == {shots} else f"{name}@{shots}"


def _settings(stated: Settings) -> Settings:
    return {key: value for key, value in stated.items() if key not in STRUCTURE}


def _measure(config: Settings) -> tuple[Any, ...]:
    """What must be equal for the items of two tasks to be one sample: form of answer, metrics, filters, shots."""
    metrics = tuple(str(metric["metric"]) for metric in config.get("metric_list") or ())
    filters = tuple(str(one["name"]) for one in config.get("filter_list") or ())
    return (metrics, filters, *map(config.get, ("class", "output_type", "process_results", "num_fewshot")))


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """Where tasks have their rows: `rows` in memory by task, else `data_dir`, else (None) the hub.

    `folders`: those below `data_dir`, by hub name or "hub name:configuration". `columns` names, by hub name, the column that holds the
    configuration where one folder has the rows of all of them (mmlu: subject).
    """

    rows: Mapping[str, Rows]
    data_dir: str | None
    folders: Mapping[str, str]
    columns: Mapping[str, str]
    _files: dict[tuple[str, str], Rows] = field(default_factory=dict, init=False, repr=False)

    def dataset(self, hub: str, part: str | None) -> DatasetSpec:
        """The dataset `hub` in its configuration `part`; what `folders` does not name has a folder to itself."""
        own = f"{hub}:{part}"
        return DatasetSpec(name=self.folders.get(own, self.folders.get(hub, own)), hub=hub, config=part)

    def build(self, named: Named, index: TaskManager) -> Task:
        """lm-eval's object of one task; raises UserMistake where its rows cannot be had."""
        hub, part = named.config.get("dataset_path"), named.config.get("dataset_name")
        try:
            # Settings reach a task of the index as an entry of a group.
            entry = {"task": named.name, **named.changes, **self._local(named)}
            (task,) = index.load([{"group": "one", "task": [entry]}])["tasks"].values()
        except (ValueError, OSError, DatasetsError, RuntimeError) as error:
            # ValueError: a configuration that there is not, or a UserMistake; RuntimeError: a loading script.
            reason = " ".join(str(error).split())
            raise UserMistake(
                f"probe task {named.name!r}: {hub!r} could not be loaded ({reason}); mend that, leave the task out of probe.tasks (probe=mini_local "
                f"has no lambada_openai), or set data_dir and the folder of {hub}:{part} under probe.probes.*.folders (conf/probe)"
            ) from error
        shots = named.config.get("num_fewshot") or 0
        if shots and len(there := task.fewshot_docs()) < shots:
            raise UserMistake(
                f"probe task {named.name!r} is to show {shots} examples, its split for them has {len(there)}; lower probe.shots"
            )
        return task

    def _local(self, named: Named) -> Settings:
        """The settings that make the task read memory or `data_dir`; none where it reads the hub."""
        if named.name not in self.rows and (self.data_dir is None or named.config.get("dataset_path") in FILES):
            return {}
        scored = "test_split" if named.config.get("test_split") else "validation_split"
        # lm-eval reads all splits that the yaml names; here those may be absent that nothing is taken from.
        read = {scored} | ({_shown_from(named.config)} if named.config.get("num_fewshot") else set())
        splits = {key: named.config.get(key) if key in read else None for key in SPLITS}
        names = {str(split) for key, split in splits.items() if split or key == scored}
        found = {name: datasets.Dataset.from_list(self._read(named, name)) for name in names}
        return {**splits, "custom_dataset": lambda **_: found}

    def _read(self, named: Named, split: str) -> Rows:
        """The task's rows from memory or `data_dir`, where each file is read once: the tasks of a group may share it."""
        if named.name in self.rows:
            return self.rows[named.name]
        spec = self.dataset(str(named.config.get("dataset_path")), named.config.get("dataset_name"))
        if (spec.name, split) not in self._files:
            self._files[spec.name, split] = load_rows(spec, split=split, data_dir=self.data_dir)
        column, rows = self.columns.get(spec.hub), self._files[spec.name, split]
        chosen = {number: row for number, row in enumerate(rows) if column is None or row.get(column) == spec.config}
        if not chosen:
            raise UserMistake(f"{spec.name}/{split}.jsonl in data_dir={self.data_dir!r} has no row of {spec.config!r}")
        needed = needed_columns(named.config, {name for row in rows for name in row})
        for number, row in chosen.items():
            if wrong := unreadable(row, named.config, needed=needed):
                raise UserMistake(f"{place(spec, split=split, data_dir=self.data_dir, row=number)}: {wrong}")
        return list(chosen.values())


def needed_columns(config: Settings, columns: Collection[str]) -> set[str]:
    """The columns that a task's templates name, whether rows have them or not; all that they have where Python code reads them."""
    code = [config.get(key) for key in ("class", "process_docs", "process_results")]
    templates = [str(config.get(key) or "") for key in ("doc_to_text", "doc_to_choice", "doc_to_target")]
    if any(code) or any(Path(template).is_absolute() for template in templates):
        return set(columns)
    named = {name for template in templates for name in meta.find_undeclared_variables(Environment().parse(template))}
    return named - Environment().globals.keys() | {*templates} & {*columns}  # a template may be a column's name


def unreadable(row: Mapping[str, Any], config: Settings, *, needed: Iterable[str]) -> str:
    """What is wrong with a row as the task's templates read it, which lm-eval would ask or score all the same; "" where nothing is."""
    for column in sorted(needed):
        if has_null(row.get(column)):
            return f"column {column!r} is missing or holds null, which the task reads; text or a number is due"
    choices, target = (bare(config.get(key), row) for key in ("doc_to_choice", "doc_to_target"))
    if choices is not None and kind_of(choices) != "list of text":
        return f"column {str(config['doc_to_choice']).strip('{ }')!r} holds {choices!r}; a list of texts is due, numbers in quotes"
    if not choices or target is None:
        return ""
    if isinstance(config["doc_to_choice"], str) and isinstance(target, str) and target not in choices:
        wrong = f"{target!r}, which is none of {choices}; a position, from 0 to {len(choices) - 1}, is written without quotes"
    else:
        wrong = wrong_target(target, choices)
    return f"column {str(config['doc_to_target']).strip('{ }')!r} holds {wrong}" if wrong else ""


def bare(template: Any, row: Mapping[str, Any]) -> Any:
    """What a template gives that is only a column's name, or a list of choices; None for any other."""
    return template if isinstance(template, list) else row.get(str(template).strip("{ }"))


def has_null(value: Any) -> bool:
    """Whether a list, or a list inside a mapping, holds null."""
    if isinstance(value, dict):
        return any(isinstance(inner, list) and has_null(inner) for inner in value.values())
    return any(map(has_null, value)) if isinstance(value, list) else value is None


def wrong_target(target: Any, choices: Sequence[str]) -> str:
    """What is wrong with a right answer, or with one of several: neither a choice nor the position of one; "" where nothing is.

    >>> wrong_target("2", ["x", "y", "z"]), wrong_target(3, ["x", "y", "z"])
    ('', "3, which is no position from 0 to 2 and none of ['x', 'y', 'z']")
    """
    for one in target if isinstance(target, list) else [target]:
        position = int(one) if isinstance(one, str) and one.isdigit() else one  # as lm-eval reads it
        if one not in choices and not (isinstance(position, int) and 0 <= position < len(choices)):
            return f"{one!r}, which is no position from 0 to {len(choices) - 1} and none of {list(choices)}"
    return ""


def _shown_from(config: Settings) -> str | None:
    """The key of the split that lm-eval takes examples from; None where the yaml lists them."""
    order = ("fewshot_split", *SPLITS[:3])
    return None if (config.get("fewshot_config") or {}).get("samples") else next(filter(config.get, order), None)


def subset(task: str, *, size: int, wanted: Wanted) -> tuple[int, ...]:
    """The indices, ascending, of the wanted documents of `task`, which has `size`; raises UserMistake where it has not that many."""
    if wanted is None:
        return tuple(range(size))
    by_hash = sorted(range(size), key=lambda index: hashlib.sha256(f"{task}/{index}".encode()).digest())
    given, count = (by_hash[:wanted], wanted) if isinstance(wanted, int) else (wanted, len(wanted))
    indices = tuple(sorted(set(given) & set(range(size))))
    if not indices or len(indices) != count:
        raise UserMistake(
            f"probe.probes.*.items asks for {wanted} of {task}, which has {size} documents; ask for 1 to {size}, or list some of 0 to {size - 1} once"
        )
    return indices


def wanted_of_each(group: str, *, wanted: Wanted, tasks: int) -> Wanted:
    """What a group of `tasks` tasks asks of each: an equal part; raises UserMistake where that is no whole number."""
    if wanted is None or tasks == 1:
        return wanted
    if not isinstance(wanted, int) or wanted < tasks or wanted % tasks:
        raise UserMistake(
            f"probe.probes.*.items asks for {wanted} of {group}, which has {tasks} tasks; ask for a multiple, e.g. {tasks}, or list them by task"
        )
    return wanted // tasks
