"""What clbench is made of: ModelSource, Task, Stage and Stream, Method, Engine, Probe. What implements them is elsewhere.

A method never meets DeepSpeed: before and after a stage it sees the model's weights, during it the engine's tensors, always whole.
The order of calls in one stage:

    begin_stage -> training_set -> per step: loss (once a micro-batch) -> correct_gradients -> step -> after_step
                -> end_stage -> consolidate -> views (while the model is examined)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from clbench.models.loss import answer_loss
from clbench.types import Batch, Example, Score, Source, Unusable

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor
    from torch.nn import Module, Parameter
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from clbench.data.encoder import Encoder
    from clbench.data.rows import DatasetSpec
    from clbench.examine.student import Student


@runtime_checkable
class ModelSource(Protocol):
    """Where a pretrained model comes from: what the group `model` of a configuration names. Its field `label` names it in tables."""

    def record(self, cache_dir: Path) -> dict[str, str]:
        """What the manifest says of the weights that are there now: `model_fingerprint`, their hash."""
        ...

    def load(self, cache_dir: Path, *, dtype: torch.dtype = ...) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """The model in `dtype` on the CPU, in eval mode, and its tokenizer."""
        ...

    def configuration(self, cache_dir: Path) -> PretrainedConfig:
        """The model's own configuration; no weights are read."""
        ...

    def sizes(self, cache_dir: Path) -> PretrainedConfig:
        """What is enough to count its parameters, without a download where that is to be had."""
        ...

    def load_tokenizer(self, cache_dir: Path) -> PreTrainedTokenizerFast:
        """The tokenizer alone."""
        ...


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

    def origin(self, example: Example) -> str:
        """Where an example stands, for messages: the file and line of its row, the first of several, if it has one."""
        return example.id

    @abstractmethod
    def score(self, example: Example, answer: str) -> float:
        """How right `answer` is, in [0, 1]."""

    def is_valid(self, example: Example, answer: str) -> bool:
        """Whether `answer` has the form that the task asks for, right or wrong."""
        return bool(answer.strip())

    def guesses(self, example: Example) -> Sequence[str]:
        """What may be answered without understanding the question; overridden where the choices stand in the prompt alone."""
        return example.choices

    def answer_swaps(self, split: str, count: int) -> Sequence[tuple[Example, Example]]:
        """Up to `count` examples, each beside what its row makes with another row's answer in it; () where there are no rows to swap in."""
        return ()

    def corpus_scores(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
        """Further metrics that are not means over items (corpus BLEU, macro-F1), by name."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One task's turn in the stream: `index` counts from 1 (0 is the untouched model).

    `collate` encodes examples into one Batch in which every answer token weighs 1 / (answer tokens in the batch). `whole_stream` is the
    training examples of all stages: for upper bounds (joint training) only, no continual method may look at it.
    """

    index: int
    name: str
    task: Task
    train: Sequence[Example]
    test: Sequence[Example]
    collate: Callable[[Sequence[Example]], Batch]
    whole_stream: Sequence[Example]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The stages in the order in which they are trained, and which rows of their tasks could not be used."""

    name: str
    order: str
    stages: tuple[Stage, ...]
    unusable: tuple[Unusable, ...] = ()

    def stage_name(self, index: int) -> str:
        """The name of stage `index`; 0 is "base"."""
        return self.stages[index - 1].name if index else "base"


class Trainable(ABC):
    """One trainable tensor, whole, under its full parameter name; assignment to `value` or `grad` reaches every rank.

    Every rank assigns the same. What is read is a copy or the tensor itself, so edit it and assign (`tensor.grad += ...` does both).
    """

    value: Tensor
    grad: Tensor

    def __init__(self, name: str, parameter: Parameter) -> None:
        self.name = name
        self.parameter = parameter


class Engine(ABC):
    """Runs backward passes and optimizer steps for one stage, on one process or many."""

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
    def tensors(self, names: Iterable[str] | None = None) -> Iterator[Trainable]:
        """The named trainable tensors (None: all) one at a time, in that order; every rank iterates over the same ones.

        `grad` is complete: summed over micro-batches and ranks.
        """

    @abstractmethod
    def total(self, value: Tensor) -> Tensor:
        """Sum of `value` over ranks."""

    @abstractmethod
    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state as `train.optimizer` describes it, whole and on the CPU, on every rank."""

    @abstractmethod
    def close(self) -> None:
        """Releases the optimizer; afterwards the model's weights are whole and writable."""


class Method(ABC):
    """A continual-learning method. Its keyword-only dataclass fields are its configuration; every default does nothing.

    `merges` declares that it writes into weights that do not train, `keeps` that the first view after stage 1 gives what was trained, as it does
    unless it averages along the way, or merges another function than the one that was trained, `decomposes` that it makes its layers of whole
    weights, which no rank has with engine.shard_base.
    """

    merges: bool = False
    keeps: bool = True
    decomposes: bool = False

    @abstractmethod
    def wrap(self, model: Module) -> Module:
        """Once, on the pretrained model: adds adapters, freezes the rest, returns the model to train."""

    def documents(self) -> Sequence[str]:
        """The texts that it trains on besides the stream's rows, for the search for overlaps with probes; known before `wrap`."""
        return ()

    def begin_stage(self, stage: Stage, model: Module) -> None:
        """No engine is open: weights are whole and writable."""

    def training_set(self, stage: Stage) -> Sequence[Source]:
        """What the stage trains on; replay adds its memory as a second source."""
        return (Source(examples=stage.train),)

    def loss(self, model: Module, batch: Batch) -> Tensor:
        """This micro-batch's share of the step's loss in nats per answer token, by default cross-entropy. No arithmetic on parameters here."""
        return answer_loss(model, batch)

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

    def still(self) -> Sequence[str]:
        """The views that are the untouched model whatever was trained: a run does not read it again."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Everything besides the trainable weights that resume needs: tensors and JSON values, flat."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; all of it, as a run that continues within a stage calls it a second time after `begin_stage`."""


class Probe(ABC):
    """A measurement of the model as it is; sees nothing of how it was trained."""

    name: str

    def begin(self, student: Student) -> None:
        """Sees the untouched model once before any stage, also when a run continues: for what is compared with it."""

    def datasets(self) -> Sequence[DatasetSpec]:
        """Where its items come from; empty where they are made here."""
        return ()

    def documents(self) -> Mapping[str, Sequence[str]]:
        """The text of its items by task, for the search for overlaps with training data."""
        return {}

    def longest(self, encoder: Encoder) -> int:
        """The most tokens that it reads at once, whatever the model; 0 where it keeps to what the model can read."""
        return 0

    @abstractmethod
    def measure(self, student: Student, stream: Stream, stage: int) -> Iterator[Score]:
        """Yields scores for stage `stage` (0: the untouched model)."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run is made of besides its model: `source` makes that. `adapted` names the layers on which `method` puts adapters."""

    source: Any
    method: Method
    adapted: tuple[str, ...]
    encoder: Encoder
    stream: Stream
    probes: tuple[Probe, ...]
