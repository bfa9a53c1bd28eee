"""lm-eval's tasks by name: what a name stands for, and task objects whose rows come from the hub, from `data_dir` or from memory.

A name is one of lm-eval's tasks, groups or tags, or that of a yaml of our own. A group or tag becomes one `Group` where all its tasks
measure the same thing in the same way (mmlu: 57 subjects); else each of its members does (openllm, metabench).
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import env

from clbench.data.rows import DatasetSpec, load_rows
from clbench.types import UserMistake

Rows = list[dict[str, Any]]
TaskConfig = dict[str, Any]
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
STRUCTURE = {field.name for field in fields(GroupConfig)} - {"task"} | {"tag", "task_list"}
FEWSHOT_SEED = 1234
"""lm-eval's default: the few-shot examples of a document are those that lm-eval shows."""
# lm-eval compiles a template each time that it fills one in, several times a document and after every stage; once is enough.
env.from_string = cache(env.from_string)


@dataclass(frozen=True, kw_only=True)
class Group:
    """One row of the ledger: the configurations of the tasks behind `name`, whose items stand one after the other in this order."""

    name: str
    tasks: tuple[TaskConfig, ...]


@cache
def registered_tasks() -> TaskManager:
    """lm-eval's index of its own tasks; reading its 14,000 files takes seconds, so only when one of them is asked for, and once."""
    return TaskManager()


def groups(name: str, *, include: str | None) -> list[Group]:
    """What `name` stands for: the yaml of our own in `include` ("package:folder") if there is one, else lm-eval's."""
    if include is not None:
        package, _, folder = include.partition(":")
        own = Path(str(importlib.resources.files(package))) / folder / f"{name}.yaml"
        if own.is_file():
            return [Group(name=name, tasks=(load_yaml(own, resolve_func=True),))]
    return _split(_resolve(name, {}))


@dataclass(frozen=True, kw_only=True)
class _Node:
    """A task (`config`) or a group or tag (`members`)."""

    name: str
    config: TaskConfig | None = None
    members: tuple[_Node, ...] = ()

    def tasks(self) -> Iterator[TaskConfig]:
        """Every task below, in order."""
        if self.config is not None:
            yield self.config
        for member in self.members:
            yield from member.tasks()


def _resolve(member: str | Mapping[str, Any], inherited: TaskConfig) -> _Node:
    """The tree below a name, or below a group's entry that changes settings of what it names; inner settings win over `inherited`."""
    stated = {"task": member} if isinstance(member, str) else dict(member)
    name = str(stated.pop("group") if "group" in stated else stated.pop("task"))
    below = _listed(stated.pop("task", None))
    settings = inherited | {key: value for key, value in stated.items() if key not in STRUCTURE}
    entry = registered_tasks().task_index.get(name)
    if entry is None and below:  # a group defined where it is used
        return _Node(name=name, members=tuple(_resolve(inner, settings) for inner in below))
    if entry is None and "dataset_path" in settings:  # a task defined where it is used
        return _Node(name=name, config={**settings, "task": name})
    if entry is None:
        raise UserMistake(
            f"probe.tasks names {name!r}, which lm-eval does not know; see `lm-eval ls tasks`, or set probe.tasks"
        )
    if entry.kind is Kind.TAG:
        return _Node(name=name, members=tuple(_resolve(inner, settings) for inner in sorted(entry.tags)))
    config = load_yaml(entry.yaml_path, resolve_func=True)
    if entry.kind is Kind.GROUP:
        own = {key: value for key, value in config.items() if key not in STRUCTURE | {"task"}}
        return _Node(name=name, members=tuple(_resolve(inner, own | settings) for inner in _listed(config["task"])))
    return _Node(name=name, config={**config, **settings})


def _listed(members: Any) -> list[Any]:
    return [members] if isinstance(members, str) else list(members or ())


def _split(node: _Node) -> list[Group]:
    tasks = tuple(node.tasks())
    if len({_measure(task) for task in tasks}) == 1:
        return [Group(name=node.name, tasks=tasks)]
    return [group for member in node.members for group in _split(member)]


def _measure(task: TaskConfig) -> tuple[Any, ...]:
    """What must be equal for the items of two tasks to be one sample: form of answer, metrics, filters, shots."""
    metrics = tuple(str(metric["metric"]) for metric in task.get("metric_list") or ())
    filters = tuple(str(one["name"]) for one in task.get("filter_list") or ())
    process = task.get("process_results")
    return task.get("class"), task.get("output_type"), metrics, filters, process, task.get("num_fewshot")


@dataclass(frozen=True, kw_only=True)
class Builder:
    """Makes task objects. `rows`: in memory, by task. `folders`: those below `data_dir`, by hub name or "hub name:configuration".

    `columns` names, by hub name, the column that holds the configuration where one folder has the rows of all of them (mmlu: subject).
    """

    rows: Mapping[str, Rows]
    data_dir: str | None
    folders: Mapping[str, str]
    columns: Mapping[str, str]
    _files: dict[tuple[str, str], Rows] = field(default_factory=dict, init=False, repr=False)

    def build(self, config: TaskConfig) -> Task:
        """lm-eval's object of one task; raises UserMistake where its rows cannot be had."""
        config = {key: value for key, value in config.items() if key not in STRUCTURE}
        name = config["task"]
        if name in self.rows:
            config["custom_dataset"] = _in_memory({split: self.rows[name] for split in _splits(config)})
        elif self.data_dir is not None:
            config |= self._local(config)
        try:
            if "class" in config:  # a task written in Python reads the hub in its own way
                task = next(iter(registered_tasks().load([name])["tasks"].values()))
            else:
                task = ConfigurableTask(config=config)
        except (OSError, DatasetNotFoundError, RuntimeError) as error:  # RuntimeError: the set is a loading script
            first_line = str(error).partition("\n")[0]
            raise UserMistake(
                f"probe task {name!r}: {config.get('dataset_path')!r} could not be loaded from the hub ({first_line}); "
                "take it out of probe.tasks, or set data_dir"
            ) from error
        task.set_fewshot_seed(FEWSHOT_SEED)
        return task

    def dataset(self, task: Task) -> DatasetSpec | None:
        """Where the task's rows are; None where they are made here."""
        hub, part = task.DATASET_PATH, task.DATASET_NAME
        if task.task_name in self.rows or hub is None:
            return None
        return DatasetSpec(name=self._folder(hub, part) or hub.rsplit("/", 1)[-1], hub=hub, config=part)

    def _folder(self, hub: str | None, part: str | None) -> str | None:
        return self.folders.get(f"{hub}:{part}", self.folders.get(str(hub)))

    def _local(self, config: TaskConfig) -> TaskConfig:
        """The settings that make the task read `data_dir`; raises UserMistake where its rows are not there."""
        name, hub, part = config["task"], config.get("dataset_path"), config.get("dataset_name")
        folder = self._folder(hub, part)
        if folder is None:
            raise UserMistake(
                f"probe task {name!r} reads {hub!r} ({part}), and data_dir is set: name its folder under probe.probes.*.folders (conf/probe)"
            )
        scored = config.get("test_split") or config.get("validation_split")
        present = {split: Path(str(self.data_dir), folder, f"{split}.jsonl").is_file() for split in _splits(config)}
        if not present[scored]:
            raise UserMistake(
                f"probe task {name!r}: data_dir={self.data_dir!r} has no {folder}/{scored}.jsonl; add its rows, or leave the task "
                "out of probe.tasks (conf/probe; probe=mini_local needs no lambada_openai)"
            )
        splits = {key: config.get(key) for key in SPLIT_KEYS}
        if not config.get("num_fewshot"):
            # Splits that are read for few-shot examples alone may be absent where none are asked for.
            splits = {key: split if split and present[split] else None for key, split in splits.items()}
        rows = {split: self._read(folder, split) for split in _splits(splits)}
        if hub in self.columns:
            rows = {split: [row for row in found if row[self.columns[hub]] == part] for split, found in rows.items()}
        if not rows[scored]:
            raise UserMistake(
                f"probe task {name!r}: {folder}/{scored}.jsonl in data_dir={self.data_dir!r} has no row of {part!r}"
            )
        return {**splits, "custom_dataset": _in_memory(rows)}

    def _read(self, folder: str, split: str) -> Rows:
        """Each file once: the tasks of a group may share it."""
        if (folder, split) not in self._files:
            self._files[folder, split] = load_rows(
                DatasetSpec(name=folder, hub=folder), split=split, data_dir=self.data_dir
            )
        return self._files[folder, split]


def _splits(config: Mapping[str, Any]) -> list[str]:
    return sorted({config[key] for key in SPLIT_KEYS if config.get(key)})


def _in_memory(splits: Mapping[str, Rows]) -> Callable[..., dict[str, datasets.Dataset]]:
    return lambda **_: {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
