"""The five interfaces of clbench: Method, Task, Probe, Engine and its Shard. Everything concrete is a final class elsewhere.

A method never meets DeepSpeed: it sees whole weights before and after a stage, and slices (`Engine.shards`) during it.
With engine.shard_base those of the base model are slices at all times; `pairs`, `cur` and `sharding.whole` make one of them whole.
Order of calls in one stage:

    begin_stage -> training_set -> per step: loss (once a micro-batch) -> correct_gradients -> step -> after_step
                -> end_stage -> consolidate -> views (while the model is examined)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from clbench.types import Batch, Example, Score, Source, Stage

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from clbench.data.rows import DatasetSpec
    from clbench.data.stream import Stream
    from clbench.examine.student import Student


class Shard(ABC):
    """A slice of one trainable tensor that this rank owns; assignment to `value` or `grad` writes through.

    `name` is the tensor's full parameter name; `value` and `grad` have equal shape, which is the tensor's own on one process
    and a flat piece of it under ZeRO. Elementwise work on shards is therefore the same everywhere.
    """

    name: str
    value: Tensor
    grad: Tensor

    @abstractmethod
    def part(self, whole: Tensor) -> Tensor:
        """The entries of `whole`, of the tensor's own shape, that lie where this slice lies; of the slice's shape."""


class Engine(ABC):
    """Runs backward and optimizer steps for one stage, on one process or many."""

    model: Module
    rank: int
    world_size: int

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of `loss`, this rank's part of the global batch's loss."""

    @abstractmethod
    def step(self) -> None:
        """Clips, takes the optimizer and schedule step, clears the gradients."""

    @abstractmethod
    def clear(self) -> None:
        """Clears the gradients without a step."""

    @abstractmethod
    def shards(self) -> Iterator[Shard]:
        """The slices of the trainable tensors that this rank owns; `grad` is complete once the last micro-batch is in.

        Which slices these are depends on the engine, so a method keeps state whole: `Shard.part` cuts it, `whole` joins it. Iterate to the
        end, on every rank: that is when what was assigned reaches the others.
        """

    @abstractmethod
    def matrices(self, names: Iterable[str]) -> Iterator[Shard]:
        """The named trainable tensors whole, one at a time, in the order of `names`; writes reach every rank."""

    @abstractmethod
    def whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trainable tensors' values of some kind whole, on every rank, from each rank's slices by name (none where it owns none)."""

    @abstractmethod
    def total(self, value: Tensor | float) -> Tensor | float:
        """Sum of `value` over ranks."""

    @abstractmethod
    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state as `optim` describes it, whole and on the CPU, on every rank."""

    @abstractmethod
    def gathered(self) -> AbstractContextManager:
        """While it lasts all weights are whole on every rank, to be read."""

    @abstractmethod
    def close(self) -> None:
        """Releases the optimizer; afterwards the model's weights are whole and writable."""


class Method(ABC):
    """A continual-learning method. Its keyword-only dataclass fields are its configuration; every default does nothing.

    `merges` declares that it writes into weights that do not train.
    """

    merges: bool = False

    @abstractmethod
    def wrap(self, model: Module) -> Module:
        """Once, on the pretrained model: adds adapters, freezes the rest, returns the model to train."""

    def begin_stage(self, stage: Stage, model: Module) -> None:
        """No engine is open: weights are whole and writable."""

    def training_set(self, stage: Stage) -> Sequence[Source]:
        """What the stage trains on; replay adds its memory as a second source."""
        return (Source(examples=stage.train),)

    @abstractmethod
    def loss(self, model: Module, batch: Batch) -> Tensor:
        """This micro-batch's share of the step's loss, in nats per answer token. No arithmetic on parameters here."""

    def correct_gradients(self, engine: Engine) -> Tensor | float:
        """Edits the complete, averaged gradients before the step; returns the value of the penalty added, for the log."""
        return 0.0

    def after_step(self, engine: Engine) -> None:
        """After the optimizer step."""

    def end_stage(self, stage: Stage, engine: Engine) -> None:
        """After the last step, engine still open: Fisher information, memory."""

    def consolidate(self, model: Module) -> None:
        """Engine closed: merge, snapshot."""

    def views(self, model: Module) -> dict[str, AbstractContextManager]:
        """The sets of weights to examine, by name; the first is the primary one."""
        return {"model": nullcontext()}

    def state_dict(self) -> dict[str, Any]:
        """Everything besides the trainable weights that resume needs: tensors and JSON values, flat."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; all of it, as a run that continues within a stage calls it a second time after `begin_stage`."""


class Task(ABC):
    """A kind of dataset: rows to examples, answers to scores. `name` and `metric` label the rows of the ledger.

    `dataset` is where its rows come from (None: they are made here), `licence` the terms they come under ("" where unstated).
    `metric_version` goes up when the metric gives other numbers for equal answers. `reference_score` is what a right answer scores at
    least: 1, unless the metric has no 1 (SARI). `max_new_tokens` bounds a written answer (None: the length of nearly all training answers).
    """

    name: str
    metric: str
    metric_version: int = 1
    reference_score: float = 1.0
    max_new_tokens: int | None = None
    dataset: DatasetSpec | None = None
    licence: str = ""

    @abstractmethod
    def examples(self, split: str) -> Sequence[Example]:
        """The examples of `split` ("train" or "test"), in a fixed order."""

    @abstractmethod
    def score(self, example: Example, answer: str) -> float:
        """How right `answer` is, in [0, 1]."""

    def is_valid(self, example: Example, answer: str) -> bool:
        """Whether `answer` has the form that the task asks for, right or wrong."""
        return bool(answer.strip())

    def answer_swaps(self, split: str, count: int) -> Sequence[tuple[Example, Example]]:
        """Up to `count` examples, each beside what its row makes with another row's answer in it; () where there are no rows to swap in."""
        return ()

    def corpus_scores(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
        """Further metrics that are not means over items (corpus BLEU, macro-F1), by name."""
        return {}


class Probe(ABC):
    """A measurement of the model as it is; sees nothing of how it was trained."""

    name: str

    def begin(self, student: Student) -> None:
        """Sees the untouched model once before any stage, also when a run continues: for what is compared with it."""

    def datasets(self) -> Sequence[DatasetSpec]:
        """Where its items come from; empty where they are made here."""
        return ()

    def fingerprints(self) -> Mapping[str, str]:
        """SHA-256 of the ids of its items by task, where it measures a part of a dataset."""
        return {}

    def documents(self) -> Mapping[str, Sequence[str]]:
        """The text of its items by task, for the search for overlaps with training data."""
        return {}

    @abstractmethod
    def measure(self, student: Student, stream: Stream, stage: int) -> Iterator[Score]:
        """Yields scores for stage `stage` (0: the untouched model)."""
