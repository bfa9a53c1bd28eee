"""The records that travel between the parts of clbench: frozen, typed, without behaviour.

This module imports neither torch nor transformers, so that the command line can use it at once.

>>> Example(id="sums/test/0", prompt="sum of 2 and 3 :", answer="5").answer
'5'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


Ids = tuple[int, ...]
"""Token ids of a text."""
FLOORS = ("chance", "majority", "format_only", "copy")
"""The metrics of answers that know nothing of the question: rows of stage 0 alone."""


class UserMistake(ValueError):
    """What the user asked for cannot be done: one line with what was given, what is allowed, where to change it."""


class RankFailed(RuntimeError):
    """A process of a run of many ended before its time; the message is its own error, or the signal that killed it."""


class NotWritten(RuntimeError):
    """What had to be written could not be: no room, no permission, something in its place. One line; exit code 1, as nobody's mistake is known."""


class Diverged(FloatingPointError):
    """Training or what came of it is no longer finite: a result of the method, not a failure. The message says in which stage and step."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question of a task and its answer, as text.

    `prompt` is everything the model reads; `answer` is what it is trained to write after it (one separating space is added
    by the encoder). `choices` are the allowed answers of a closed task (empty: the task is generative). `references` are
    further accepted answers besides `answer`. `source` is the text to be transformed, for metrics that need it. `ids`, where a row to be
    replayed is not made from text: the token ids of prompt (the first) and answer in their place.
    """

    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    source: str = ""
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Source:
    """A pool of examples that a stage trains on.

    Every optimizer step draws `round(share * train.batch_size)` rows from it, and their mean loss per answer token enters
    the step's loss with `weight` (normalised over the sources present). With `after=True` the pool is not mixed in: it is passed once,
    on its own, when the stage's own steps are done.
    """

    examples: Sequence[Example]
    share: float = 1.0
    weight: float = 1.0
    after: bool = False


@dataclass(frozen=True, kw_only=True)
class Unusable:
    """`count` of the first `of` rows of a task's split cannot be used as they are, and `why`.

    They were `dropped`, unless there are too many of them for the rows to be at fault.
    """

    task: str
    split: str
    why: str
    count: int
    of: int
    dropped: bool


IGNORED = -100
"""Label of a position that is not part of an answer (the value that torch's cross-entropy skips)."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Encoded rows of a micro-batch, padded on the right.

    `input_ids`, `attention_mask`, `labels`: int64 [rows, length]; `labels` hold the answer's token ids at the answer's own
    positions and -100 elsewhere. `weights`: float32 [rows], the weight of each answer token of that row; over the global batch the
    weights of all answer tokens add to 1, so that the sum over micro-batches and ranks of `answer_loss` is the mean negative
    log-likelihood. `sources`: int64 [rows], index into what `Method.training_set` returned. `source_tokens`: attended tokens of each
    source in the global batch, the denominator of per-token means that are not over answers.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    weights: Tensor
    sources: Tensor
    source_tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One measured number: `value` of `metric` on `task` by `probe` after stage `stage`, over `n` items.

    `stderr` is the standard error of the mean over items, NaN where that has no meaning. `items` are the per-item outcomes,
    in a fixed item order, kept for paired tests (stored apart from the score lines).
    """

    stage: int
    stage_name: str
    probe: str
    task: str
    metric: str
    value: float
    n: int
    stderr: float
    seconds: float
    items: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How training went since the reading before: means over its steps of `loss` and of the part of it that is the method's penalty on
    parameters, both in nats per answer token; the last step's `learning_rate`; tokens read by all ranks together."""

    loss: float
    penalty: float
    learning_rate: float
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one stage cost: counts, seconds of wall time, bytes and floating-point operations."""

    stage: int
    steps: int
    tokens_trained: int
    tokens_replayed: int
    tokens_scored: int
    seconds_train: float
    seconds_probe: float
    seconds_other: float
    trainable_parameters: int
    peak_memory_bytes: int
    flops: float
    joules: float
