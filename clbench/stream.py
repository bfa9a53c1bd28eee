"""From task names to stages: the order of a stream, its rows, which of them cannot be used, their fingerprints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from clbench.config import StreamConfig
from clbench.data.encoder import Encoder
from clbench.data.rows import DatasetSpec, fingerprint
from clbench.data.sampling import generator
from clbench.protocols import Stage, Stream, Task
from clbench.types import Example, Unusable, UserMistake

TOO_LONG = "the answer does not fit train.max_length"
NOT_RIGHT = "the task's own metric does not count the answer as right"
COUNTED = 256
"""Training rows, and test rows, of a task whose prompts are encoded to see how many are cut; rows stand in a fair order."""
WHERE = {"left": "at their beginning", "middle": "in their middle"}
NOT_RIGHT_AT_MOST = 0.05
"""Share of a task's rows that may be dropped as NOT_RIGHT; where there are more, the metric is wrong, and the canary `reference` says so."""


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
    """The stages of `tasks` in `order`; raises UserMistake for a task without rows."""
    found = {name: usable(name, tasks[name], config=config, encoder=encoder) for name in ordered([*tasks], order)}
    whole = tuple(example for train, _, _ in found.values() for example in train)
    made = {"collate": encoder.collate, "whole_stream": whole}
    return Stream(
        name=config.name,
        order=order,
        unusable=tuple(one for _, _, left_out in found.values() for one in left_out),
        stages=tuple(
            Stage(index=index, name=name, task=tasks[name], train=train, test=test, **made)
            for index, (name, (train, test, _)) in enumerate(found.items(), start=1)
        ),
    )


def usable(
    name: str, task: Task, *, config: StreamConfig, encoder: Encoder
) -> tuple[tuple[Example, ...], tuple[Example, ...], list[Unusable]]:
    """The training and the test examples of a task, and what was left out of them; raises UserMistake where none are left."""
    caps = {"train": config.train_rows, "test": config.test_rows}
    found = {split: by_fault(task, split, cap=cap, encoder=encoder) for split, cap in caps.items()}
    if config.too_long == "refuse":
        for example in [*found["train"][TOO_LONG], *found["test"][TOO_LONG]]:
            longest = max(len(encoder.answer(text)) for text in (example.answer, *example.choices))
            raise UserMistake(
                f"{task.origin(example)}: an answer has {longest} tokens, which do not fit train.max_length={encoder.max_length} with BOS and EOS; "
                f"make that larger, or leave such rows out with stream.too_long=drop (task {name})"
            )
    looked = sum(len(examples) for faults in found.values() for examples in faults.values())
    few = sum(len(faults[NOT_RIGHT]) for faults in found.values()) <= NOT_RIGHT_AT_MOST * looked
    unusable = [
        Unusable(
            task=name,
            split=split,
            why=why,
            count=len(faults[why]),
            of=sum(map(len, faults.values())),
            dropped=few or why != NOT_RIGHT,
        )
        for split, faults in found.items()
        for why in (TOO_LONG, NOT_RIGHT)
        if faults[why]
    ]
    if not few:
        found = {split: by_fault(task, split, cap=cap, encoder=encoder, judge=False) for split, cap in caps.items()}
    train, test = tuple(found["train"][""]), tuple(found["test"][""])
    if not train or not test:
        raise UserMistake(
            f"task {name!r} has {len(train)} train and {len(test)} test examples; both must be at least 1 (conf/task)"
        )
    return train, test, unusable


def by_fault(
    task: Task, split: str, *, cap: int | None, encoder: Encoder, judge: bool = True
) -> dict[str, list[Example]]:
    """The examples of a split by what keeps them from being used ("": nothing), up to the first `cap` that can be."""
    found: dict[str, list[Example]] = {"": [], TOO_LONG: [], NOT_RIGHT: []}
    for example in task.examples(split):
        if len(found[""]) == cap:
            break
        read = (example.answer,) if split == "train" else example.choices
        fault = "" if all(map(encoder.fits, read)) else TOO_LONG
        if not fault and judge and not has_right_answers(task, example):
            fault = NOT_RIGHT
        found[fault].append(example)
    return found


def has_right_answers(task: Task, example: Example) -> bool:
    """Whether every answer that is given as right gets the full score, has the task's form and, in a closed task, is one of the choices."""
    return all(
        is_right(task, example, answer)
        and task.is_valid(example, answer)
        and (not example.choices or answer in example.choices)
        for answer in (example.answer, *example.references)
    )


def is_right(task: Task, example: Example, answer: str) -> bool:
    """Whether an answer scores what a right one scores at least, and no more than 1, rounding aside."""
    return task.reference_score - 1e-6 <= task.score(example, answer) <= 1 + 1e-6


@dataclass(frozen=True, kw_only=True)
class CutPrompts:
    """Of `of` prompts of a task `share` are cut to fit train.max_length; a cut one loses `median_tokens` of its `median_length`."""

    of: int
    share: float
    median_tokens: float
    median_length: float


def cut_prompts(stream: Stream, encoder: Encoder) -> dict[str, CutPrompts]:
    """The tasks of which prompts are cut. Counted are the first 256 training and test rows of each, as to encode all may take minutes."""
    found = {}
    for stage in stream.stages:
        examples = [
            *stage.train[:COUNTED],
            *(example for example in stage.test[:COUNTED] if encoder.fits(example.answer)),
        ]
        lost = {example.id: encoder.lost(example) for example in examples}
        cut = [example for example in examples if lost[example.id]]
        if cut:
            found[stage.name] = CutPrompts(
                of=len(examples),
                share=len(cut) / len(examples),
                median_tokens=median(lost[example.id] for example in cut),
                median_length=median(len(encoder.prompt(example.prompt)) for example in cut),
            )
    return found


def said_of(cut: CutPrompts, name: str, encoder: Encoder) -> str:
    """One line for a person."""
    advice = "; train.cut=middle keeps their beginning, where an instruction stands" if encoder.cut == "left" else ""
    return (
        f"{cut.share:.0%} of {cut.of} prompts of {name} do not fit train.max_length={encoder.max_length} and lose {cut.median_tokens:.0f} of "
        f"{cut.median_length:.0f} tokens (medians) {WHERE[encoder.cut]}{advice}"
    )


def chosen(names: Sequence[str], *, limit: int | None, last: int | None) -> list[str]:
    """The first `limit` of `names`, or the `last` so many; no order changes which.

    >>> chosen(["a", "b", "c"], limit=2, last=None), chosen(["a", "b", "c"], limit=None, last=1)
    (['a', 'b'], ['c'])
    """
    return list(names)[:limit][-last if last else None :]


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
    drawn: list[int] = torch.randperm(len(names), generator=generator(int(number), "stream order")).tolist()
    return [names[i] for i in drawn]
