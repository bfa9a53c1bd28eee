"""From task names to stages: the order of a stream, its rows, their fingerprints."""

from collections.abc import Mapping, Sequence

import torch

from clbench.config import StreamConfig
from clbench.data.encoder import Encoder
from clbench.data.rows import DatasetSpec, fingerprint
from clbench.data.sampling import generator
from clbench.protocols import Stage, Stream, Task
from clbench.types import UserMistake


def fingerprints(stream: Stream) -> dict[str, dict[str, str | int]]:
    """Rows and SHA-256 of every task's train and test examples as they are used, where they come from, how they are scored."""
    return {
        stage.name: {
            "dataset": address(stage.task.dataset) if stage.task.dataset else "made here",
            "metric": f"{stage.task.metric} v{stage.task.metric_version}",
            "train_rows": len(stage.train),
            "train_sha256": fingerprint(stage.train),
            "test_rows": len(stage.test),
            "test_sha256": fingerprint(stage.test),
        }
        for stage in stream.stages
    }


def address(dataset: DatasetSpec) -> str:
    """Hub id, configuration and revision in one string."""
    return f"{dataset.hub}{f' : {dataset.config}' if dataset.config else ''} @ {dataset.revision or 'main'}"


def build_stream(config: StreamConfig, *, order: str, tasks: Mapping[str, Task], encoder: Encoder) -> Stream:
    """The stages of the first `config.limit` tasks in `order`; raises UserMistake for a task without rows."""
    names = ordered(list(tasks), order)[: config.limit]
    train = {name: tuple(tasks[name].examples("train")[: config.train_rows]) for name in names}
    test = {name: tuple(tasks[name].examples("test")[: config.test_rows]) for name in names}
    for name in names:
        if not train[name] or not test[name]:
            raise UserMistake(
                f"task {name!r} has {len(train[name])} train and {len(test[name])} test examples; both must be at least 1 (conf/task)"
            )
    whole = tuple(example for name in names for example in train[name])
    return Stream(
        name=config.name,
        order=order,
        stages=tuple(
            Stage(
                index=index,
                name=name,
                task=tasks[name],
                train=train[name],
                test=test[name],
                collate=encoder.collate,
                whole_stream=whole,
            )
            for index, name in enumerate(names, start=1)
        ),
    )


def ordered(names: Sequence[str], order: str) -> list[str]:
    """`names` in the named order.

    >>> ordered(["a", "b", "c"], "latin:1")
    ['b', 'c', 'a']
    """
    kind, _, number = order.partition(":")
    if kind == "default":
        return list(names)
    if kind == "reversed":
        return list(names)[::-1]
    if kind == "latin":
        shift = int(number) % len(names)
        return [*names[shift:], *names[:shift]]
    assert kind == "random", order
    return [names[i] for i in torch.randperm(len(names), generator=generator(int(number), "stream order")).tolist()]
