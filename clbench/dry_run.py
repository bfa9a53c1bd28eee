"""Training without numbers: the very code of a run on tensors without storage, to see how many bytes a device would hold.

Model, method, loss, engine and optimizer's moments are a run's own, on torch's meta device, so whatever a method keeps or computes is
counted as it is. Sequences are as long as they may be. Where the code asks for a number that is not there, a stand-in answers (`meta.Shapes`).
Not here: what ZeRO makes of it (`clbench.footprint`).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from clbench.adapters import folded, trainable
from clbench.architecture import causal_lm
from clbench.config import TrainConfig
from clbench.data import Encoder
from clbench.engine import LocalEngine
from clbench.last_layer import keep_whole
from clbench.loss import hidden_states, project
from clbench.meta import META, Held, Shapes
from clbench.protocols import Engine, Method, Task
from clbench.student import TOKENS_PER_BATCH
from clbench.train import global_batch, plan_stage, train_step
from clbench.types import Example, Stage

TOKENS_EXAMINED = TOKENS_PER_BATCH["cuda"]
"""Tokens of one forward of an examination, as `student.Student` bounds them."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that one process holds, nothing sharded. `frozen`, `trained`: weights; `moments`: the optimizer's two per trained entry.

    `working`: the most that gradients, activations and all that passes by need at once; `examining`: the same in an examination.
    `extras`: what the method holds beside the model after the stream's last stage; `checkpoint`: what is then saved.
    `largest`: the largest trained tensor; `entry`: one entry of a frozen weight.
    """

    frozen: int
    trained: int
    moments: int
    working: int
    examining: int
    extras: int
    checkpoint: int
    largest: int
    entry: int

    @property
    def training(self) -> int:
        """The most at once in training."""
        return self.frozen + self.trained + self.extras + self.moments + self.working

    @property
    def examination(self) -> int:
        """The most at once in an examination; the optimizer is gone by then."""
        return self.frozen + self.trained + self.extras + self.examining


class Moments(Optimizer):
    """What fused AdamW holds from its first step on and nothing else: two moments of each trained entry."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}

    def step(self, closure: None = None) -> None:
        """Nothing: values are not there to be changed."""


class OneTokenPerWord:
    """Stands in for a tokenizer: ids have no meaning here, only a number."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """An id for each word."""
        return {"input_ids": [0] * len(text.split())}


class NoTask(Task):
    """The task of a dry stage."""

    name = metric = "dry"

    def examples(self, split: str) -> list[Example]:
        """None."""
        return []

    def score(self, example: Example, answer: str) -> float:
        """Nothing is right."""
        return 0.0


@dataclass(kw_only=True)
class DryRun:
    """A method on a model without storage, and what is held: `run` trains stages of one example each and gives the footprint.

    `sharded`: as where ranks hold slices of the weights, and read the last layer whole.
    """

    method: Method
    model: Module
    config: TrainConfig
    processes: int
    answer_length: int
    sharded: bool = False
    held: Held = field(default_factory=Held)

    def run(self, *, stages: int) -> Footprint:
        """The footprint after `stages` stages. What a method holds is taken to grow alike with each stage from the second on."""
        with ExitStack() as modes:
            modes.enter_context(Shapes(answer_length=self.answer_length))
            modes.enter_context(self.held)
            if self.sharded:
                keep_whole(causal_lm(self.model).get_decoder())
            self.held.count([*self.model.parameters(), *self.model.buffers()])
            self.model = self.method.wrap(self.model)
            return self._footprint(stages)

    def _footprint(self, stages: int) -> Footprint:
        encoder = dry_encoder(self.config.max_length)
        example = dry_example(self.config.max_length, answer_length=self.answer_length)
        grown: list[tuple[int, int]] = [(self._extras(), self._checkpoint())]
        working = 0
        for index in range(1, min(stages, 2) + 1):
            stage = Stage(
                index=index,
                name="dry",
                task=NoTask(),
                train=(example,),
                test=(),
                collate=encoder.collate,
                whole_stream=(example,),
            )
            working = self._train(stage, encoder)
            grown.append((self._extras(), self._checkpoint()))
        examining = self._examine(encoder)
        frozen, trained = self._weights()
        extras, checkpoint = (
            last + (last - before) * max(0, stages - 2) for before, last in zip(*grown[-2:], strict=True)
        )
        return Footprint(
            frozen=frozen,
            trained=trained,
            moments=2 * trained,
            working=working,
            examining=examining,
            extras=extras,
            checkpoint=checkpoint,
            largest=max((4 * tensor.numel() for tensor in trainable(self.model).values()), default=0),
            entry=min(parameter.element_size() for parameter in self.model.parameters()),
        )

    def _train(self, stage: Stage, encoder: Encoder) -> int:
        """One step of a stage and what follows; gives the most bytes at once beyond what was there before and the moments."""
        self.method.begin_stage(stage, self.model)
        before = self.held.live
        self.held.mark()
        micro = self.config.micro_batch_size or self.config.batch_size
        # Two micro-batches a rank show the most that more would: the second runs beside the first one's gradients.
        batch_size = min(self.config.batch_size, 2 * micro * self.processes)
        config = replace(self.config, steps=1, epochs=None, batch_size=batch_size)
        plan = plan_stage(self.method.training_set(stage), config)
        engine = dry_engine(self.model, processes=self.processes)
        self.model.train()
        if plan.steps and trainable(self.model):
            rows = global_batch(plan, 0, config=config, seed=0, stage=stage.index)
            train_step(rows, method=self.method, engine=engine, encoder=encoder, config=config)
        self.model.eval()
        self.method.end_stage(stage, engine)
        engine.close()
        moments = 2 * self._weights()[1] if plan.steps else 0
        working = self.held.peak - before - moments
        del engine
        self.method.consolidate(self.model)
        return working

    @torch.no_grad()
    def _examine(self, encoder: Encoder) -> int:
        """One forward of every view; the most bytes at once beyond what was there before."""
        before = self.held.live
        self.held.mark()
        rows = max(1, TOKENS_EXAMINED // self.config.max_length)
        ids = torch.empty(rows, self.config.max_length, dtype=torch.int64, device=META)
        for number, weights in enumerate(self.method.views(self.model).values()):
            with weights, folded(self.model) if number == 0 else nullcontext():
                (hidden_BTH,) = hidden_states(self.model, input_ids=ids, attention_mask=torch.ones_like(ids))
                torch.log_softmax(project(self.model, hidden_BTH[:, : self.answer_length].flatten(0, 1)), dim=-1)
        return self.held.peak - before

    def _weights(self) -> tuple[int, int]:
        """Bytes of the frozen and of the trained parameters."""
        sizes = {True: 0, False: 0}
        for parameter in self.model.parameters():
            sizes[parameter.requires_grad] += parameter.numel() * parameter.element_size()
        return sizes[False], sizes[True]

    def _extras(self) -> int:
        """Bytes that are held now beyond the parameters."""
        return self.held.live - sum(self._weights())

    def _checkpoint(self) -> int:
        """Bytes of the tensors that are saved after a stage."""
        tensors = (value for value in self.method.state_dict().values() if isinstance(value, Tensor))
        return self._weights()[1] + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def dry_encoder(max_length: int) -> Encoder:
    """An encoder of rows without a tokenizer, onto the meta device."""
    return Encoder(OneTokenPerWord(), max_length=max_length, device=META)


def dry_example(length: int, *, answer_length: int) -> Example:
    """A row of `length` tokens, of which the last `answer_length` are the answer with its end."""
    return Example(id="dry", prompt="w " * length, answer="w " * (answer_length - 1))


def dry_engine(model: Module, *, processes: int) -> Engine:
    """An engine that is one of `processes` ranks as far as batches go."""
    parameters = list(trainable(model).values())
    if not parameters:
        return LocalEngine(model, optimizer=None, schedule=None, clip=0.0)
    optimizer = Moments(parameters)
    engine = LocalEngine(model, optimizer=optimizer, schedule=LambdaLR(optimizer, lambda step: 1.0), clip=1.0)
    engine.world_size = processes
    return engine
