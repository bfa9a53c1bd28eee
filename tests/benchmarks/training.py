"""Training one stage with LoRA: ours against transformers' Trainer on PEFT, the same examples in the same global batches."""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import Module
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from baselines.seq import Seq
from clbench.config import TrainConfig
from clbench.data.encoder import Encoder
from clbench.models.lora import Lora
from clbench.models.weights import trainable
from clbench.train import optimizer as optim
from clbench.train.local import LocalEngine
from clbench.train.loop import train_step
from clbench.types import Example
from tests.benchmarks.models import Subject, llama, words
from tests.benchmarks.race import Figure, fastest, figure, race

EXAMPLES, BATCH = 128, 8
LORA = Lora(rank=8, alpha=16, targets=["q_proj", "v_proj"])
CONFIG = TrainConfig(epochs=1.0, batch_size=BATCH, lr=1e-3, schedule="constant", warmup=0.0, clip=1.0)
CASES = {"answer-only": ((20, 200), (1, 10)), "all tokens": ((0, 0), (20, 200))}
"""Words of a prompt and of an answer (from, to)."""
SIZES = {"padded": (8, 4, 2, 1), "flattened": (8, 4, 2)}
"""Rows of a forward of Trainer, by how they are put together. Raced are the first, which is the usual one, and the fastest."""


def examples(prompt: tuple[int, int], answer: tuple[int, int], vocabulary: int, *, count: int) -> list[Example]:
    """Random ones; where the prompt is empty every token but BOS counts in the loss."""
    rng = torch.Generator().manual_seed(0)

    def draw(bounds: tuple[int, int]) -> str:
        length = int(torch.randint(bounds[0], bounds[1] + 1, (), generator=rng))
        return " ".join(f"w{token}" for token in torch.randint(3, vocabulary, (length,), generator=rng).tolist())

    return [Example(id=str(number), prompt=draw(prompt), answer=draw(answer)) for number in range(count)]


def ours(model: Module, encoder: Encoder, rows: list[Example]) -> list[float]:
    """The loss of every step; the model is trained in place."""
    model.train()
    optimizer = optim.optimizer(trainable(model), CONFIG, {})
    schedule = optim.schedule(optimizer, CONFIG, steps=len(rows) // BATCH)
    engine = LocalEngine(model, optimizer=optimizer, schedule=schedule, clip=CONFIG.clip)
    losses = []
    for start in range(0, len(rows), BATCH):
        batch = [(row, 0, 1.0) for row in rows[start : start + BATCH]]
        loss, _ = train_step(batch, method=Seq(lora=LORA, seed=0), engine=engine, encoder=encoder, config=CONFIG)
        losses.append(loss)
    return [float(loss) for loss in losses]


class Rows(Dataset):
    """Encoded examples as Trainer wants them."""

    def __init__(self, encoder: Encoder, rows: list[Example]) -> None:
        self.rows = []
        for row in rows:
            encoded = encoder.example(row)
            start = encoded.answer_start
            labels = [-100] * start + list(encoded.ids[start:])
            self.rows.append({"input_ids": list(encoded.ids), "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


class InOrder(Trainer):
    """Trainer that takes the rows as they come, as ours does here."""

    def _get_train_sampler(self, *arguments: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Losses(TrainerCallback):
    """Keeps what Trainer logs, each step's loss."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(
        self, args: object, state: object, control: object, logs: dict[str, float] | None = None, **rest: object
    ) -> None:
        if logs and "loss" in logs:
            self.values.append(float(logs["loss"]))


def theirs(model: Module, rows: Rows, *, collator: Callable[..., Any], batch: int, steps: int) -> list[float]:
    """The loss of every step as Trainer reports it; `batch` rows a forward, the rest accumulated."""
    with tempfile.TemporaryDirectory() as folder:
        losses = Losses()
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=BATCH // batch,
            max_steps=steps,
            learning_rate=CONFIG.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=CONFIG.clip,
            logging_steps=1,
            log_level="error",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = InOrder(model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[losses])
        trainer.train()
    return losses.values


def padded(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Rows filled up to the longest of a forward."""
    return DataCollatorForSeq2Seq(tokenizer, padding="longest", label_pad_token_id=-100)


def equal(found: list[float], expected: list[float]) -> float:
    """The largest difference of the loss curves, at most 1e-5 of the loss and what Trainer's log rounds off."""
    gap = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    assert gap <= 1e-5, gap
    return gap


def run() -> Iterator[Figure]:
    """A figure for each objective and peer."""
    for case, wanted in (("answer-only", ">= 2.5 (fastest)"), ("all tokens", "-")):
        yield from raced(llama(32_000), case, wanted=wanted, repetitions=3)


def raced(
    subject: Subject,
    case: str,
    *,
    wanted: str,
    repetitions: int,
    count: int = EXAMPLES,
    sizes: Mapping[str, tuple[int, ...]] = SIZES,
    tried: int | None = None,
) -> Iterator[Figure]:
    """A figure for each peer, on `count` examples of a case; settings of Trainer are tried on the first `tried` of them, None: on all."""
    tokenizer = words(subject.vocabulary)
    encoder = Encoder(tokenizer, max_length=512)
    rows = examples(*CASES[case], subject.vocabulary, count=count)
    base = LORA.add(subject.make(), seed=0)
    collators = {"padded": padded(tokenizer), "flattened": DataCollatorWithFlattening()}

    def peers(rows: list[Example]) -> dict[str, Callable[[], list[float]]]:
        dataset = Rows(encoder, rows)
        return {
            f"Trainer + PEFT, micro-batch {size}, {kind}": partial(_fresh, base, dataset, collators[kind], size)
            for kind, several in sizes.items()
            for size in several
        }

    every, best = peers(rows), fastest(peers(rows[:tried]))
    taken, found, difference = race(
        lambda: ours(copy.deepcopy(base), encoder, rows),
        {peer: every[peer] for peer in dict.fromkeys((next(iter(every)), best))},
        same=equal,
        repetitions=repetitions,
    )
    for peer, seconds in found.items():
        against = (taken, {peer: seconds}, difference)
        yield figure("training", f"{case}, {subject.name}", raced=against, wanted=wanted, unit="CPU seconds")


def _fresh(base: Module, rows: Rows, collator: Callable[..., Any], size: int) -> list[float]:
    return theirs(copy.deepcopy(base), rows, collator=collator, batch=size, steps=len(rows) // BATCH)
