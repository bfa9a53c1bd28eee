"""What a method is tried on: a tiny model, three toy tasks, and the very functions that an experiment calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedTokenizerFast

from clbench.build import make_method
from clbench.config import Config, StreamConfig
from clbench.data.encoder import Encoder
from clbench.experiment.underway import Run, open_engine, train
from clbench.models.tiny import fresh_llama, word_tokenizer
from clbench.protocols import Engine, Method, Parts, Stage, Task
from clbench.record.ledger import Checkpoint
from clbench.record.tracking import Tracker
from clbench.stream import build_stream
from clbench.train.loop import Plan, Trained, plan_stage, train_stage
from clbench.types import Batch, Example

WORDS = [f"w{index}" for index in range(50)]
STEPS, ROWS, TRAIN_ROWS = 5, 4, 10
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOY = (
    f"train.steps={STEPS}",
    f"train.batch_size={ROWS}",
    "train.max_length=32",
    "train.warmup=0",
    "train.schedule=constant",
)
"""How the toy stream is trained, as the command line says it."""


class ToyTask(Task):
    """Words follow words: prompts and answers of uneven length, another rule for every `index`."""

    metric = "accuracy"

    def __init__(self, index: int) -> None:
        self.name = f"toy{index}"
        self.index = index

    def examples(self, split: str) -> list[Example]:
        rng = torch.Generator().manual_seed(self.index)
        rows = []
        for number in range(TRAIN_ROWS):
            prompt = torch.randint(len(WORDS), (1 + number % 4,), generator=rng).tolist()
            answer = [WORDS[(word * 7 + 11 * self.index) % len(WORDS)] for word in prompt[: 1 + number % 3]]
            asked = " ".join(WORDS[word] for word in prompt)
            rows.append(Example(id=f"{self.name}/{number}", prompt=asked, answer=" ".join(answer)))
        return rows

    def score(self, example: Example, answer: str) -> float:
        return float(answer == example.answer)


@dataclass(kw_only=True)
class Lab:
    """A method on a tiny model with the toy stream.

    `base` has the first values of the model's own parameters by their identity, `plain` the logits that they give.
    """

    run: Run
    base: dict[int, Tensor]
    plain: Tensor
    moments: dict[str, Tensor] = field(default_factory=dict)
    within: Checkpoint | None = None

    @property
    def method(self) -> Method:
        return self.run.method

    @property
    def model(self) -> Module:
        return self.run.model

    def stage(self, number: int) -> Stage:
        """Stage `number`, from 1."""
        return self.run.stream.stages[number - 1]

    def train(self, number: int) -> Trained:
        """Stage `number`, whole."""
        tracker = Tracker(self.run.config, self.run.stream.stages, silent=True)
        _, trained, self.moments = train(
            self.run, self.stage(number), tracker, moments=self.moments, within=self.within
        )
        self.within = None
        self.model.eval()
        return trained

    def open(self, number: int) -> tuple[Plan, Engine]:
        """Stage `number` up to its first step."""
        self.method.begin_stage(self.stage(number), self.model)
        plan = plan_stage(self.method.training_set(self.stage(number)), self.run.config.train)
        return plan, open_engine(self.model, self.run.config, plan)

    def step(self, number: int) -> Engine:
        """Stage `number` up to its last step, the engine still open."""
        plan, engine = self.open(number)
        config = self.run.config
        train_stage(
            self.stage(number),
            plan,
            method=self.method,
            engine=engine,
            encoder=self.run.encoder,
            config=config.train,
            seed=config.seed,
            report=lambda *_: None,
        )
        return engine

    def logits(self) -> Tensor:
        """Of the first task's training rows, [rows, length, vocabulary]."""
        return logits(self.model, self.run.encoder.collate(self.stage(1).train))


@torch.no_grad()
def logits(model: Module, batch: Batch) -> Tensor:
    """In float32, [rows, length, vocabulary]."""
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()


def llama(words: PreTrainedTokenizerFast) -> Module:
    """A tiny Llama of two layers with random weights."""
    return fresh_llama(words, architecture=TINY, seed=0)


def lab(
    config: Config, *, dtype: torch.dtype = torch.float32, made: Callable[[PreTrainedTokenizerFast], Module] = llama
) -> Lab:
    """The method of `config` on the model that is `made` for a tokenizer of WORDS."""
    words = word_tokenizer(WORDS)
    model = made(words).eval().to(dtype)
    base = {id(parameter): parameter.detach().clone() for parameter in model.parameters()}
    encoder = Encoder(words, max_length=config.train.max_length)
    tasks = {f"toy{index}": ToyTask(index) for index in (1, 2, 3)}
    stream = build_stream(StreamConfig(name="toy"), order="default", tasks=tasks, encoder=encoder)
    method, plain = make_method(config), logits(model, encoder.collate(stream.stages[0].train))
    parts = Parts(source=None, method=method, adapted=(), encoder=encoder, stream=stream, probes=())
    return Lab(run=Run(**vars(parts), config=config, model=method.wrap(model)), base=base, plain=plain)


def everything(model: Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def same(left: Mapping[str, object], right: Mapping[str, object]) -> bool:
    """Whether two states agree bitwise."""
    if left.keys() != right.keys():
        return False
    pairs = [(left[key], right[key]) for key in left]
    return all(
        torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other
        for one, other in pairs
    )


def watched(method: Method) -> list[dict[str, Tensor]]:
    """Fills with the trainable tensors as each optimizer step leaves them, before the method's own `after_step`."""
    steps: list[dict[str, Tensor]] = []
    follow = method.after_step

    def record(engine: Engine) -> None:
        steps.append({tensor.name: tensor.value.clone() for tensor in engine.tensors()})
        follow(engine)

    method.after_step = record
    return steps
