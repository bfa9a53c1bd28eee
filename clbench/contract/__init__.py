"""`python -m clbench.contract method=NAME`: what every method has to keep, tried on a toy stream; one of your own as those of conf/method.

A check raises AssertionError, with what it saw, and spoils the lab that it is given.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn.functional import pad

from clbench.config import Config
from clbench.contract.lab import WORDS, Lab, everything, lab, same, watched
from clbench.examine.canaries.own_model import said
from clbench.models.folding import folded
from clbench.models.weights import load_trainable_state, trainable, trainable_state
from clbench.protocols import Engine, Method
from clbench.record.ledger import Checkpoint, Ledger
from clbench.train.local import LocalEngine
from clbench.train.loop import global_batch
from clbench.types import IGNORED, Batch


def checks(config: Config) -> Iterator[tuple[str, Callable[[], None]]]:
    """What every method has to keep that is like the one of `config`, by what it says."""
    make = partial(lab, config)
    toy = make()
    yield "wrapping changes no output", lambda: check_wrapping(make())
    if trainable(toy.model):
        yield "all that was added trains and moves, all else stays", lambda: check_liveness(make())
        yield "padding and micro-batches change no gradient", lambda: check_batches(make())
        yield "a bfloat16 base trains with float32 state", lambda: check_bfloat16(make(dtype=torch.bfloat16))
    yield "only with merges=True are frozen weights written", lambda: check_frozen(make())
    if type(toy.method).correct_gradients is not Method.correct_gradients and reports_penalty(toy):
        yield "the penalty has the gradient of its value", lambda: check_penalty(make())
    yield "what is folded for an examination gives the same outputs", lambda: check_folding(make())
    yield "unless keeps=False, the first view says after stage 1 what was trained", lambda: check_kept(make())
    yield "stopping between stages changes nothing", lambda: check_resume(make(), make())


def check_wrapping(toy: Lab) -> None:
    """The outputs of every view are the untouched model's to 1e-5."""
    for view in toy.method.views(toy.model).values():
        with view:
            torch.testing.assert_close(toy.logits(), toy.plain, rtol=0, atol=1e-5)


def check_liveness(toy: Lab) -> None:
    """All that the method added trains and is moved by the optimizer; all else stays bitwise, merging apart."""
    before, trains = everything(toy.model), set(trainable(toy.model))
    parameters = dict(toy.model.named_parameters())
    added = {name for name, parameter in parameters.items() if id(parameter) not in toy.base}
    assert trains, "nothing trains"
    assert added <= trains, f"added but frozen: {sorted(added - trains)}"
    steps = watched(toy.method)
    toy.step(1)
    still = sorted(name for name in trains if all(torch.equal(before[name], step[name]) for step in steps))
    assert not still, f"trainable but unmoved: {still}"
    if not toy.method.merges:
        after = everything(toy.model)
        drifted = sorted(name for name in before.keys() - trains if not torch.equal(before[name], after[name]))
        assert not drifted, f"frozen but moved: {drifted}"


def check_frozen(toy: Lab) -> None:
    """Weights that do not train are written in a stage by methods that say so, and by those alone."""
    frozen = {key: parameter for key, parameter in toy.model.named_parameters() if not parameter.requires_grad}
    before = {key: parameter.detach().clone() for key, parameter in frozen.items()}
    toy.train(1)
    changed = sorted(key for key, parameter in frozen.items() if not torch.equal(before[key], parameter))
    assert bool(changed) == toy.method.merges, f"merges is {toy.method.merges}, written were {changed or 'none'}"


def reports_penalty(toy: Lab) -> bool:
    """Whether `correct_gradients` says of a second stage that there is a penalty; a method that projects gradients has none."""
    toy.train(1)
    return bool(toy.method.correct_gradients(toy.step(2)))


def check_penalty(toy: Lab) -> None:
    """In float64, in the second stage: the gradient that the method adds is that of the value that it reports."""
    toy.train(1)
    toy.step(2)
    toy.model.double()
    engine = LocalEngine(toy.model, optimizer=None, schedule=None, clip=0.0)
    toy.method.correct_gradients(engine)
    gradients = {tensor.name: tensor.grad.clone() for tensor in engine.tensors()}
    assert sum(gradient.abs().sum() for gradient in gradients.values()) > 0, "the penalty has no gradient"
    rng = torch.Generator().manual_seed(0)
    for name, parameter in trainable(toy.model).items():
        direction = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        slope = central_difference(
            lambda: float(toy.method.correct_gradients(engine)), parameter, direction, width=1e-6
        )
        along = float((gradients[name] * direction).sum())
        assert math.isclose(along, slope, rel_tol=1e-4, abs_tol=1e-6), f"{name}: {along}, the value's slope is {slope}"


@torch.no_grad()
def central_difference(value: Callable[[], float], parameter: Tensor, direction: Tensor, *, width: float) -> float:
    """Slope of `value` along `direction` in `parameter`."""
    before = parameter.clone()
    ends = []
    for sign in (1, -1):
        parameter.copy_(before + sign * width * direction)
        ends.append(value())
    parameter.copy_(before)
    return (ends[0] - ends[1]) / (2 * width)


def check_folding(toy: Lab) -> None:
    """The outputs of the first and the last view stay the same to 1e-5 with adapters folded, every bit is restored, and the model trains on."""
    toy.train(1)
    toy.train(2)
    before = everything(toy.model)
    for place in (0, -1):
        with list(toy.method.views(toy.model).values())[place], torch.inference_mode():
            plain = toy.logits()
            with folded(toy.model):
                torch.testing.assert_close(toy.logits(), plain, rtol=1e-5, atol=1e-5)
        assert same(everything(toy.model), before), "a view is not undone"
    toy.train(3)


def check_kept(toy: Lab) -> None:
    """The first view says after stage 1 what was trained, in nats to 1e-5, of an example of each task; unless the method says it does not."""
    trained = toy.train(1)
    view, *_ = toy.method.views(toy.model).values()
    with view:
        again = said(toy.model, toy.run.encoder, toy.run.stream)
    pairs = zip(again, trained.said, strict=toy.method.keeps)
    assert all(abs(one - other) <= 1e-5 for one, other in pairs), f"{again}, trained was {trained.said}"


def check_resume(whole: Lab, again: Lab) -> None:
    """A run that a checkpoint after stage 1 continues is bitwise the one that went on, in every view."""
    whole.train(1)
    with TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder), manifest={"run": "toy"})
        state = {"weights": trainable_state(whole.model), "state": whole.method.state_dict()}
        ledger.save(Checkpoint(stage=1, moments={}, **state))
        kept = ledger.load()
    outputs = whole.logits()
    whole.train(2)
    load_trainable_state(again.model, kept.weights)
    again.method.load_state_dict(kept.state)
    assert torch.equal(again.logits(), outputs), "other outputs after loading"
    again.train(2)
    assert same(everything(again.model), everything(whole.model)), "other weights after the next stage"
    assert same(again.method.state_dict(), whole.method.state_dict()), "another state after the next stage"
    for left, right in zip(
        again.method.views(again.model).values(), whole.method.views(whole.model).values(), strict=True
    ):
        with left, right:
            assert torch.equal(again.logits(), whole.logits()), "other outputs of a view after the next stage"


def check_batches(toy: Lab) -> None:
    """The gradients of the second stage's first and last batch are the same however that is cut, ordered, padded or shared by two ranks."""
    toy.train(1)
    plan, engine = toy.open(2)
    encoder = toy.run.encoder
    for step in {0, plan.total - 1}:
        rows = global_batch(plan, step, config=toy.run.config.train, seed=0, stage=2)
        whole = encoder.micro_batches(rows, rows=len(rows))
        expected = gradients(toy, engine, whole)
        assert any(gradient.abs().sum() > 0 for gradient in expected.values())
        ranks = [batch for rank in range(2) for batch in encoder.micro_batches(rows, rows=2, rank=rank, world_size=2)]
        for batches in (
            encoder.micro_batches(rows, rows=1),
            encoder.micro_batches(rows, rows=3),
            encoder.micro_batches(rows[::-1], rows=len(rows)),
            [widened(batch, 5) for batch in whole],
            ranks,
        ):
            torch.testing.assert_close(gradients(toy, engine, batches), expected, rtol=1e-5, atol=1e-6)


def gradients(toy: Lab, engine: Engine, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Of a step over micro-batches, corrected."""
    toy.model.train()
    for batch in batches:
        engine.backward(toy.method.loss(toy.model, batch))
    toy.method.correct_gradients(engine)
    found = {tensor.name: tensor.grad.clone() for tensor in engine.tensors()}
    engine.clear()
    return found


def widened(batch: Batch, columns: int) -> Batch:
    """`batch` with so many more columns of padding, whose ids are noise."""
    noise = torch.randint(len(WORDS), (len(batch.input_ids), columns), generator=torch.Generator().manual_seed(1))
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, noise], dim=1),
        attention_mask=pad(batch.attention_mask, (0, columns)),
        labels=pad(batch.labels, (0, columns), value=IGNORED),
    )


def check_bfloat16(toy: Lab) -> None:
    """`toy` has a bfloat16 base: what trains is float32, lives, and all stays finite."""
    types = {value.dtype for value in trainable(toy.model).values()}
    assert types == {torch.float32}, f"trainable are {types}"
    check_liveness(toy)
    toy.train(2)
    state = [value for value in toy.method.state_dict().values() if isinstance(value, Tensor)]
    for value in [*trainable_state(toy.model).values(), *state, toy.logits()]:
        assert torch.isfinite(value).all(), "a number is not finite"
