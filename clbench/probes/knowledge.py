"""Base knowledge through lm-eval's task objects: its prompts, choices, filters and metrics, our scoring of its requests.

Requests are built once per run; after every stage the same requests are scored again, so items pair up between stages. Any lm-eval
task name works; so does a yaml beside us (`include`). Rows come from the hub, from `data_dir/<folder>/<split>.jsonl` where `folders`
maps the dataset's hub name to its folder, or from `rows` given in memory.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import io
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from clbench.data import DatasetSpec, load_rows
from clbench.probes.matrix import item_score
from clbench.protocols import Probe
from clbench.stream import Stream
from clbench.student import Student
from clbench.types import Score, UserMistake

Rows = list[dict[str, Any]]
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")


class StudentLM(TemplateLM):
    """A Student as lm-eval sees a model: contexts begin with one BOS, continuations are scored by the Student."""

    backend = "causal"

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token's id."""
        return self.student.encoder.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: BOS."""
        return self.student.encoder.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids with one BOS in front unless `add_special_tokens` is False."""
        if add_special_tokens is False:
            return self.student.encoder.text(string)
        return list(self.student.encoder.prompt(string))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return self.student.log_likelihoods(
            [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        )

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of whole texts, in disjoint windows of the longest input."""
        texts = [tuple(self.student.encoder.text(request.args[0])) for request in requests]
        return [-nll for nll in self.student.window_nll(texts, window=self.student.encoder.max_length)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut at the first stop string."""
        answers = []
        for request in requests:
            prompt, settings = request.args
            (answer,) = self.student.generate(
                [tuple(self.tok_encode(prompt))], max_new_tokens=settings.get("max_gen_toks", 256)
            )
            stops = [answer.index(stop) for stop in settings.get("until", []) if stop and stop in answer]
            answers.append(answer[: min(stops)] if stops else answer)
        return answers


class Knowledge(Probe):
    """The lm-eval `tasks`, each on its first `limit` items (None: all)."""

    def __init__(
        self,
        *,
        name: str,
        tasks: Sequence[str],
        limit: int | None = None,
        include: str | None = None,
        rows: Mapping[str, Rows] | None = None,
        data_dir: str | None = None,
        folders: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        build = Builder(include=include, rows=rows or {}, data_dir=data_dir, folders=folders or {})
        # lm-eval and datasets draw a progress bar per task, over the run's own line.
        with contextlib.redirect_stderr(io.StringIO()):
            self.tasks = {task: build(task) for task in tasks}
            for task in self.tasks.values():
                task.build_all_requests(limit=limit)

    def measure(self, student: Student, stream: Stream, stage: int) -> Iterator[Score]:
        """Each task's metrics; at stage 0 also the chance and majority rates of multiple-choice tasks."""
        model = StudentLM(student)
        stage_name = stream.stages[stage - 1].name if stage else "base"
        for name, task in self.tasks.items():
            started = time.perf_counter()
            outcomes = run_task(task, model)
            if stage == 0 and task.OUTPUT_TYPE == "multiple_choice":
                outcomes |= choice_floors(task)
            seconds = time.perf_counter() - started
            for metric, items in outcomes.items():
                yield item_score(stage, stage_name, self.name, name, metric, items, seconds=seconds)
                seconds = 0.0


class Builder:
    """Makes lm-eval task objects by name."""

    def __init__(
        self, *, include: str | None, rows: Mapping[str, Rows], data_dir: str | None, folders: Mapping[str, str]
    ) -> None:
        self.rows = rows
        self.data_dir = data_dir
        self.folders = folders
        self.include = None if include is None else _folder(include)

    def __call__(self, name: str) -> ConfigurableTask:
        """The task `name`: our own yaml if `include` has one, else lm-eval's."""
        own = self.include / f"{name}.yaml" if self.include is not None else None
        if own is not None and own.is_file():
            config = load_yaml(own, resolve_func=True)
        else:
            config = self._registered(name)
        if name in self.rows:
            config["custom_dataset"] = _in_memory({split: self.rows[name] for split in _splits(config)})
        elif self.data_dir is not None:
            config["custom_dataset"] = self._local(name, config)
        return ConfigurableTask(config=config)

    def _registered(self, name: str) -> dict[str, Any]:
        entry = registered_tasks().task_index.get(name)
        if entry is None or entry.yaml_path is None:
            raise UserMistake(
                f"probe.tasks names {name!r}, which lm-eval does not know; see `lm-eval ls tasks`, or set probe.tasks"
            )
        return load_yaml(entry.yaml_path, resolve_func=True)

    def _local(self, name: str, config: dict[str, Any]) -> Callable[..., dict[str, datasets.Dataset]]:
        hub = config["dataset_path"]
        folder = self.folders.get(hub)
        if folder is None:
            raise UserMistake(
                f"probe task {name!r} reads {hub!r}, and data_dir is set: name its folder under probe.folders in conf/probe"
            )
        spec = DatasetSpec(name=folder, hub=hub, config=config.get("dataset_name"))
        scored = config.get("test_split") or config.get("validation_split")
        for key in SPLIT_KEYS:
            split = config.get(key)
            # Splits that are only read for few-shot examples may be absent where none are asked for.
            if (
                split
                and split != scored
                and not config.get("num_fewshot")
                and not (Path(self.data_dir) / folder / f"{split}.jsonl").is_file()
            ):
                config[key] = None
        return _in_memory({split: load_rows(spec, split=split, data_dir=self.data_dir) for split in _splits(config)})


@cache
def registered_tasks() -> TaskManager:
    """lm-eval's index of its own tasks; reading its 14,000 files takes seconds, so only when one of them is asked for, and once."""
    return TaskManager()


def run_task(task: ConfigurableTask, model: StudentLM) -> dict[str, list[float]]:
    """Scores the task's requests and gives the per-item outcomes of every metric that is a number per item."""
    by_type: dict[str, list[Instance]] = defaultdict(list)
    for instance in task.instances:
        instance.resps, instance.filtered_resps = [], {}
        by_type[instance.request_type].append(instance)
    for kind, instances in by_type.items():
        verbs = {
            "loglikelihood": model.loglikelihood,
            "loglikelihood_rolling": model.loglikelihood_rolling,
            "generate_until": model.generate_until,
        }
        arguments = {} if kind == "generate_until" else {"disable_tqdm": True}
        for instance, response in zip(instances, verbs[kind](instances, **arguments), strict=True):
            instance.resps.append(response)
    task.apply_filters()
    outcomes: dict[str, list[float]] = defaultdict(list)
    for members in _by_document(task).values():
        for filtered in members[0].filtered_resps:
            results = task.process_results(members[0].doc, [instance.filtered_resps[filtered] for instance in members])
            for metric, value in results.items():
                if isinstance(value, (int, float)):
                    outcomes[metric].append(float(value))
    return dict(outcomes)


def choice_floors(task: ConfigurableTask) -> dict[str, list[float]]:
    """Per item: chance (one over its choices), and whether the commonest gold position is its own (majority)."""
    documents = list(_by_document(task).values())
    gold = [task.doc_to_target(members[0].doc) for members in documents]
    commonest, _ = Counter(str(target) for target in gold).most_common(1)[0]
    return {
        "chance": [1 / len(task.doc_to_choice(members[0].doc)) for members in documents],
        "majority": [float(str(target) == commonest) for target in gold],
    }


def _by_document(task: ConfigurableTask) -> dict[int, list[Instance]]:
    documents: dict[int, list[Instance]] = defaultdict(list)
    for instance in task.instances:
        documents[instance.doc_id].append(instance)
    return {
        document: sorted(members, key=lambda instance: instance.idx) for document, members in sorted(documents.items())
    }


def _splits(config: Mapping[str, Any]) -> list[str]:
    return sorted({config[key] for key in SPLIT_KEYS if config.get(key)})


def _in_memory(splits: Mapping[str, Rows]) -> Callable[..., dict[str, datasets.Dataset]]:
    return lambda **_: {split: datasets.Dataset.from_list(list(rows)) for split, rows in splits.items()}


def _folder(include: str) -> Path:
    """`package:folder` as a path, wherever the package is installed."""
    package, _, folder = include.partition(":")
    return Path(str(importlib.resources.files(package))) / folder
