"""A stream of tasks, trained and wholly examined after every stage: ours against the loop that published repositories run.

That loop loads the base model and the last adapter from disk for every stage, trains with transformers' Trainer on PEFT, saves the adapter, and
loads both again to score every test item with lm-eval's HFLM.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import AutoModelForCausalLM

from baselines.seq import Seq
from clbench.data.encoder import Encoder
from clbench.examine.matrix import choose
from clbench.examine.student import Student
from clbench.models.folding import folded
from clbench.models.weights import trainable
from clbench.protocols import Stage
from clbench.train import optimizer as optim
from clbench.train.local import LocalEngine
from clbench.train.loop import plan_stage, train_stage
from clbench.types import Example, Source
from tests.benchmarks.models import Subject, llama, words
from tests.benchmarks.race import Figure, figure, race
from tests.benchmarks.training import BATCH, CONFIG, LORA, Rows, padded, theirs

OPTIONS = 4
Matrix = list[list[float]]
"""Accuracy after each stage (the untouched model first) on each task."""


def drawn_tasks(vocabulary: int, *, tasks: int, train: int, test: int) -> list[tuple[list[Example], list[Example]]]:
    """Training and test examples of each task: random prompts, one of four answers of one to three words."""
    rng = np.random.default_rng(0)

    def text(low: int, high: int) -> str:
        return " ".join(f"w{word}" for word in rng.integers(3, vocabulary, rng.integers(low, high + 1)))

    found = []
    for task in range(tasks):
        choices = tuple(text(1, 3) for _ in range(OPTIONS))
        examples = [
            Example(id=f"{task}/{row}", prompt=text(40, 160), answer=choices[rng.integers(OPTIONS)], choices=choices)
            for row in range(train + test)
        ]
        found.append((examples[:train], examples[train:]))
    return found


def ours(folder: Path, encoder: Encoder, rows: list[tuple[list[Example], list[Example]]]) -> Matrix:
    """The matrix, by the stage loop's own parts: one model for the whole stream."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "start", is_trainable=True
    )
    student = Student(model.eval(), encoder)
    matrix = [accuracies(student, rows)]
    for number, (train, _) in enumerate(rows, start=1):
        # Trainer takes rows as they come; a stage of ours would shuffle them.
        stage = Stage(
            index=number, name="", task=None, train=train, test=(), collate=encoder.collate, whole_stream=train
        )
        plan = plan_stage([Source(examples=tuple(train))], CONFIG)
        optimizer = optim.optimizer(trainable(model), CONFIG, {})
        engine = LocalEngine(
            model, optimizer=optimizer, schedule=optim.schedule(optimizer, CONFIG, steps=plan.total), clip=CONFIG.clip
        )
        train_stage(
            stage,
            plan,
            method=Seq(lora=LORA, seed=0),
            engine=engine,
            encoder=encoder,
            config=CONFIG,
            seed=0,
            report=lambda *values: None,
        )
        engine.close()
        matrix.append(accuracies(student, rows))
    return matrix


def accuracies(student: Student, rows: list[tuple[list[Example], list[Example]]]) -> list[float]:
    """On each task, adapters folded."""
    with folded(student.model):
        chosen = [choose(student, test)[0] for _, test in rows]
    return [
        float(np.mean([answer == example.answer for answer, example in zip(answers, test, strict=True)]))
        for answers, (_, test) in zip(chosen, rows, strict=True)
    ]


def published(
    folder: Path, encoder: Encoder, order: list[list[Example]], rows: list, *, micro: int, batch: int
) -> Matrix:
    """The matrix, by the published loop, `micro` rows a forward in training and `batch` in scoring.

    `order`: each stage's examples in the order in which ours draws them.
    """
    matrix = [scored(folder, "start", encoder, rows, batch=batch)]
    last = "start"
    for number, train in enumerate(order, start=1):
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder / "base"), folder / last, is_trainable=True
        )
        theirs(model, Rows(encoder, train), collator=padded(encoder.tokenizer), batch=micro, steps=len(train) // BATCH)
        last = f"stage-{number}"
        model.save_pretrained(str(folder / last))
        matrix.append(scored(folder, last, encoder, rows, batch=batch))
    return matrix


def scored(folder: Path, adapter: str, encoder: Encoder, rows: list, *, batch: int) -> list[float]:
    """Accuracy on each task of the model loaded from disk."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / adapter).eval()
    peer = HFLM(pretrained=model, tokenizer=encoder.tokenizer, batch_size=batch, max_length=512, device="cpu")
    found = []
    for _, test in rows:
        requests = [
            (("", ""), list(encoder.prompt(example.prompt)), list(encoder.answer(choice)))
            for example in test
            for choice in example.choices
        ]
        values = [value for value, _ in peer._loglikelihood_tokens(requests, disable_tqdm=True)]
        right = [
            example.choices[int(np.argmax(values[OPTIONS * item : OPTIONS * (item + 1)]))] == example.answer
            for item, example in enumerate(test)
        ]
        found.append(float(np.mean(right)))
    return found


def drawn(rows: list[tuple[list[Example], list[Example]]]) -> list[list[Example]]:
    """Each stage's examples in the order in which ours draws them, for the peer to take as they come."""
    from clbench.train.loop import global_batch

    order = []
    for number, (train, _) in enumerate(rows, start=1):
        plan = plan_stage([Source(examples=tuple(train))], CONFIG)
        batches = [global_batch(plan, step, config=CONFIG, seed=0, stage=number) for step in range(plan.total)]
        order.append([example for batch in batches for example, _, _ in batch])
    return order


def equal(found: Matrix, expected: Matrix) -> float:
    """The largest difference of an accuracy: none."""
    gap = float(np.abs(np.array(found) - np.array(expected)).max())
    assert gap == 0.0, (found, expected)
    return gap


def run() -> Iterator[Figure]:
    """One figure."""
    yield raced(llama(32_000), tasks=4, train=48, test=24, micro=BATCH, batch=8, wanted=">= 6")


def raced(subject: Subject, *, tasks: int, train: int, test: int, micro: int, batch: int, wanted: str) -> Figure:
    """The figure of so many tasks with so many training and test examples each; `micro` and `batch` are the peer's (`published`)."""
    encoder = Encoder(words(subject.vocabulary), max_length=512)
    rows = drawn_tasks(subject.vocabulary, tasks=tasks, train=train, test=test)
    order = drawn(rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = subject.make()
        model.save_pretrained(folder / "base")
        LORA.add(model, seed=0).save_pretrained(str(folder / "start"))
        del model
        peer = partial(published, folder, encoder, order, rows, micro=micro, batch=batch)
        found = race(
            partial(ours, folder, encoder, rows), {"Trainer + PEFT + HFLM, reloading": peer}, same=equal, repetitions=2
        )
    return figure("stream", f"{tasks} tasks, all cells, {subject.name}", raced=found, wanted=wanted, unit="CPU seconds")
