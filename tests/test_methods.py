"""The contract of every method: each yaml in conf/method is composed, trained on a toy stream and held to it.

A new yaml is tested because it exists. Every check that could pass for want of an effect has a mutation that must make it fail.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from baselines import clora, ilora, l2, olora
from baselines.base import Base
from clbench import experiment
from clbench.build import make_method
from clbench.config import Config, composition, from_plain
from clbench.data.encoder import Encoder
from clbench.data.memory import Memory
from clbench.data.sampling import draw
from clbench.examine.canaries.own_model import said
from clbench.models.folding import folded
from clbench.models.loss import answer_loss
from clbench.models.pairs import lora_pairs
from clbench.models.pretrained import without_dropout
from clbench.models.tiny import fresh_llama, word_tokenizer
from clbench.models.weights import load_trainable_state, trainable, trainable_state
from clbench.protocols import Engine, Method, Stage, Stream, Task
from clbench.record.ledger import Checkpoint, Ledger
from clbench.record.tracking import Tracker
from clbench.train.local import LocalEngine
from clbench.train.loop import Plan, global_batch, plan_stage, train_stage
from clbench.types import Batch, Example, Source, UserMistake

NAMES = sorted(path.stem for path in (composition.CONF_DIR / "method").glob("*.yaml"))
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

torch.set_num_threads(1)


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
            rows.append(
                Example(
                    id=f"{self.name}/{number}", prompt=" ".join(WORDS[word] for word in prompt), answer=" ".join(answer)
                )
            )
        return rows

    def score(self, example: Example, answer: str) -> float:
        return float(answer == example.answer)


@cache
def composed(name: str, *overrides: str) -> Config:
    composition.register_schema()
    with initialize_config_dir(str(composition.CONF_DIR), version_base="1.3"):
        tree = compose("config", overrides=[f"method={name}", *TOY, *overrides])
    plain = OmegaConf.to_container(tree, resolve=True)
    return from_plain({key: plain[key] for key in Config.__dataclass_fields__})


def method_class(name: str) -> type[Method]:
    return get_class(composed(name).method["_target_"])


TRAINED = [name for name in NAMES if method_class(name) is not Base]
PROJECTING = ["agem"]
"""Methods that edit the gradient and add no penalty."""
PENALISED = [
    name
    for name in TRAINED
    if method_class(name).correct_gradients is not Method.correct_gradients and name not in PROJECTING
]
REPLAYING = [name for name in TRAINED if "memory" in method_class(name).__dataclass_fields__]


def tokenizer():
    return word_tokenizer(WORDS)


@dataclass(kw_only=True)
class Lab:
    """A method on a tiny model with a toy stream; `base` names the model's own parameters by identity."""

    run: experiment.Run
    base: set[int]
    untouched: dict[int, Tensor]
    moments: dict[str, Tensor] = field(default_factory=dict)
    within: Checkpoint | None = None

    @property
    def method(self) -> Method:
        return self.run.method

    @property
    def model(self) -> nn.Module:
        return self.run.model

    def stage(self, number: int) -> Stage:
        return self.run.stream.stages[number - 1]

    def train(self, number: int) -> None:
        """Stage `number`, by the very function that an experiment calls."""
        tracker = Tracker(self.run.config, self.run.stream.stages, silent=True)
        *_, self.moments = experiment.train(
            self.run, self.stage(number), tracker, moments=self.moments, within=self.within
        )
        self.within = None
        self.model.eval()

    def open(self, number: int) -> tuple[Plan, Engine]:
        """Stage `number` up to its first step."""
        self.method.begin_stage(self.stage(number), self.model)
        plan = plan_stage(self.method.training_set(self.stage(number)), self.run.config.train)
        return plan, experiment.open_engine(self.model, self.run.config, plan)

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
        batch = self.run.encoder.collate(self.stage(1).train)
        with torch.no_grad():
            return self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()


def gpt2(words: PreTrainedTokenizerFast) -> nn.Module:
    """A tiny GPT-2, whose linear layers keep their weights [in, out]; attention's last one is square."""
    size = {"n_embd": TINY["hidden_size"], "n_layer": TINY["num_hidden_layers"], "n_head": 4, "n_positions": 64}
    size |= {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    torch.manual_seed(0)
    return GPT2LMHeadModel(without_dropout(GPT2Config(vocab_size=len(words), initializer_range=0.05, **size)))


def llama(words: PreTrainedTokenizerFast) -> nn.Module:
    return fresh_llama(words, architecture=TINY, seed=0)


def lab(
    name: str,
    *overrides: str,
    dtype: torch.dtype = torch.float32,
    made: Callable[[PreTrainedTokenizerFast], nn.Module] = llama,
) -> Lab:
    config = composed(name, *overrides)
    words = tokenizer()
    model = made(words).eval().to(dtype)
    base = list(model.parameters())
    untouched = {id(parameter): parameter.detach().clone() for parameter in base}
    encoder = Encoder(words, max_length=config.train.max_length)
    tasks = [ToyTask(index) for index in (1, 2, 3)]
    rows = [tuple(task.examples("train")) for task in tasks]
    whole = tuple(example for examples in rows for example in examples)
    stages = tuple(
        Stage(index=i, name=task.name, task=task, train=train, test=train, collate=encoder.collate, whole_stream=whole)
        for i, (task, train) in enumerate(zip(tasks, rows, strict=True), start=1)
    )
    method = make_method(config)
    run = experiment.Run(
        config=config,
        method=method,
        model=method.wrap(model),
        stream=Stream(name="toy", order="default", stages=stages),
        probes=(),
        encoder=encoder,
    )
    return Lab(run=run, base={id(parameter) for parameter in base}, untouched=untouched)


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def same(left: dict[str, object], right: dict[str, object]) -> bool:
    """Whether two states agree bitwise."""
    if left.keys() != right.keys():
        return False
    return all(
        torch.equal(left[key], right[key]) if isinstance(left[key], Tensor) else left[key] == right[key] for key in left
    )


# --- 1 identity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_wrapping_changes_no_output(name):
    plain = fresh_llama(tokenizer(), architecture=TINY, seed=0).eval()
    toy = lab(name)
    batch = toy.run.encoder.collate(toy.stage(1).train)
    with torch.no_grad():
        before = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    for view in toy.method.views(toy.model).values():
        with view:
            torch.testing.assert_close(toy.logits(), before, rtol=0, atol=1e-5)


# --- 2 liveness ---------------------------------------------------------------------------------------------------------


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


def watched(method: Method) -> list[dict[str, Tensor]]:
    """Fills with the trainable tensors as each optimizer step leaves them, before the method's own `after_step`."""
    steps: list[dict[str, Tensor]] = []
    follow = method.after_step

    def record(engine: Engine) -> None:
        steps.append({tensor.name: tensor.value.clone() for tensor in engine.tensors()})
        follow(engine)

    method.after_step = record
    return steps


@pytest.mark.parametrize("name", TRAINED)
def test_all_that_trains_moves_and_all_else_stays(name):
    check_liveness(lab(name))


@pytest.mark.parametrize("name", NAMES)
def test_only_a_method_that_says_so_writes_into_frozen_weights(name):
    toy = lab(name)
    frozen = {key: parameter for key, parameter in toy.model.named_parameters() if not parameter.requires_grad}
    before = {key: parameter.detach().clone() for key, parameter in frozen.items()}
    toy.train(1)
    changed = any(not torch.equal(before[key], parameter) for key, parameter in frozen.items())
    assert changed == toy.method.merges


@pytest.mark.parametrize("name", TRAINED)
def test_liveness_notices_a_tensor_that_is_frozen(name):
    toy = lab(name)
    if id(next(iter(trainable(toy.model).values()))) in toy.base:
        toy.model.requires_grad_(False)  # full fine-tuning adds nothing: freezing is seen when all of it is frozen
    else:
        next(iter(trainable(toy.model).values())).requires_grad_(False)
    with pytest.raises(AssertionError, match="frozen|nothing trains"):
        check_liveness(toy)


@pytest.mark.parametrize("name", TRAINED)
def test_liveness_notices_a_tensor_that_never_moves(name, monkeypatch):
    toy = lab(name)
    victim = next(iter(trainable(toy.model).values())).detach()
    kept, step = victim.clone(), LocalEngine.step

    def step_and_undo(self: LocalEngine) -> None:
        step(self)
        victim.copy_(kept)

    monkeypatch.setattr(LocalEngine, "step", step_and_undo)
    with pytest.raises(AssertionError, match="unmoved"):
        check_liveness(toy)


# --- 2 penalties --------------------------------------------------------------------------------------------------------


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
        assert float((gradients[name] * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-6), name


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


@pytest.mark.parametrize("name", PENALISED)
def test_the_penalty_has_the_gradient_of_its_value(name):
    check_penalty(lab(name))


@pytest.mark.parametrize("name", PENALISED)
def test_a_detached_penalty_is_noticed(name, monkeypatch):
    attached = method_class(name).correct_gradients

    def detached(self: Method, engine: Engine) -> Tensor | float:
        before = {tensor.name: tensor.grad.clone() for tensor in engine.tensors()}
        value = attached(self, engine)
        for tensor in engine.tensors():
            tensor.grad = before[tensor.name]
        return value

    monkeypatch.setattr(method_class(name), "correct_gradients", detached)
    with pytest.raises(AssertionError, match="no gradient"):
        check_penalty(lab(name))


@pytest.mark.parametrize("name", PENALISED)
def test_the_penalty_changes_what_is_learned(name):
    neutral = neutral_overrides(name)
    if not neutral:
        pytest.fail(f"{name} has a penalty and no neutral strength in NEUTRAL")
    weights = []
    for overrides in ([], neutral):
        toy = lab(name, *overrides)
        toy.train(1)
        toy.train(2)
        weights.append(everything(toy.model))
    assert not same(*weights)


# --- 2 buffers and averages ---------------------------------------------------------------------------------------------


def check_memory(toy: Lab) -> None:
    """After two stages the memory holds rows of both, as many as configured, and the third stage replays them unaltered."""
    method, general = toy.method, toy.method.memory.examples[:]
    if not general:
        assert method.training_set(toy.stage(1)) == (Source(examples=toy.stage(1).train),)
    toy.train(1)
    toy.train(2)
    past = [*toy.stage(1).train, *toy.stage(2).train]
    held = method.memory.examples[len(general) :]
    per_task = math.ceil(method.fraction * TRAIN_ROWS)
    assert len(held) == (2 * per_task if method.capacity is None else min(method.capacity, len(past))), len(held)
    assert len({example.id for example in held}) == len(held)
    assert all(example in past for example in held)
    (_, replay) = method.training_set(toy.stage(3))
    assert sorted(example.id for example in replay.examples) == sorted(example.id for example in [*general, *held])
    plan = plan_stage(method.training_set(toy.stage(3)), toy.run.config.train)
    rows = [
        row
        for step in range(plan.total)
        for row in global_batch(plan, step, config=toy.run.config.train, seed=0, stage=3)
    ]
    sources = {source: {example.id for example, index, _ in rows if index == source} for source in (0, 1)}
    assert sources[1] and sources[1] <= {example.id for example in [*general, *held]}
    assert sources[0] <= {example.id for example in toy.stage(3).train}


@pytest.mark.parametrize("name", REPLAYING)
def test_the_memory_fills_and_is_replayed(name):
    check_memory(lab(name))


@pytest.mark.parametrize("name", REPLAYING)
def test_an_empty_memory_is_noticed(name, monkeypatch):
    monkeypatch.setattr(Memory, "take", lambda self, offered, **_: None)
    with pytest.raises(AssertionError):
        check_memory(lab(name))


@pytest.mark.parametrize("name", ["er_reservoir"])
def test_a_full_reservoir_keeps_its_size(name):
    check_memory(lab(name, "method.capacity=3"))


def check_average(toy: Lab) -> None:
    """The slow factors are the closed form of the moving average over the fast ones' path, and differ from both its ends."""
    start = {name: value.clone() for name, value in toy.method.slow.items()}
    path = watched(toy.method)
    toy.step(1)
    assert len(path) == STEPS
    decay = [
        min(toy.method.decay, 1 - 1 / (k + 1)) if toy.method.warm_up else toy.method.decay for k in range(1, STEPS + 1)
    ]
    for name, slow in toy.method.slow.items():
        expected = math.prod(decay) * start[name]
        for k in range(STEPS):
            expected = expected + math.prod(decay[k + 1 :]) * (1 - decay[k]) * path[k][name]
        torch.testing.assert_close(slow, expected)
        assert not torch.equal(slow, start[name]), "the slow factors never moved"
        assert not torch.equal(slow, path[-1][name]), "the slow factors are the fast ones"
        assert not slow.requires_grad


@pytest.mark.parametrize("overrides", [(), ("method.warm_up=false", "method.decay=0.9")])
def test_the_slow_adapter_is_the_moving_average(overrides):
    check_average(lab("ilora", *overrides))


def average_of_itself(self: ilora.Ilora, engine: Engine) -> None:
    for tensor in engine.tensors(self.slow):
        tensor.value = ilora.ema(tensor.value, tensor.value, self.decay)


@pytest.mark.parametrize("mutant", [lambda self, engine: None, average_of_itself])
def test_an_average_that_is_skipped_is_noticed(mutant, monkeypatch):
    monkeypatch.setattr(ilora.Ilora, "after_step", mutant)
    with pytest.raises(AssertionError):
        check_average(lab("ilora"))


# --- 3 neutral strength -------------------------------------------------------------------------------------------------

NEUTRAL = {
    "baselines.er.Er": ["method.ratio=0"],
    "baselines.ewc.Ewc": ["method.strength=0"],
    "baselines.clora.Clora": ["method.strength=0"],
    "baselines.l2.L2": ["method.strength=0"],
    "baselines.olora.OLora": ["method.strength=0"],
    "baselines.ilora.Ilora": ["method.fraction=0", "method.capacity=null", "method.consistency=0"],
    "baselines.merge_average.MergeAverage": [],
    "baselines.kl_base.KlBase": ["method.strength=0"],
    "baselines.lwf.Lwf": ["method.strength=0"],
    "baselines.self_replay.SelfReplay": ["method.strength=0"],
    "baselines.self_replay_text.SelfReplayText": ["method.strength=0"],
    "baselines.agem.Agem": ["method.fraction=0"],
    "baselines.er_general.ErGeneral": ["method.ratio=0"],
    "baselines.base_interpolation.BaseInterpolation": [],
    "baselines.lines.Lines": [],
}
"""What makes a method do nothing. O-LoRA then equals SEQ-merge, all others SEQ."""


SAME_RATE = "train.lr=5e-3"
"""The yamls state the rate that each method was tuned to; equality is at equal rates."""
SAME_MEMORY = "method.fraction=0.1"


def neutral_overrides(name: str) -> list[str]:
    return NEUTRAL.get(composed(name).method["_target_"], [])


@pytest.mark.parametrize("name", [name for name in NAMES if composed(name).method["_target_"] in NEUTRAL])
def test_at_neutral_strength_a_method_is_plain_fine_tuning(name):
    reference = "seq_merge" if "olora" in composed(name).method["_target_"] else "seq"
    weights = []
    for toy in (lab(name, *neutral_overrides(name), SAME_RATE), lab(reference, SAME_RATE)):
        toy.train(1)
        toy.train(2)
        weights.append(everything(toy.model))
    assert same(*weights)


def test_weight_decay_alone_sets_lora_wd_apart_from_seq():
    weights = []
    for toy in (lab("lora_wd"), lab("lora_wd", "train.weight_decay=0"), lab("seq")):
        toy.train(1)
        weights.append(trainable_state(toy.model))
    assert not same(weights[0], weights[2])
    assert same(weights[1], weights[2])


# --- 5 fold and unfold --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_examining_folded_gives_the_same_outputs_restores_every_bit_and_leaves_a_model_that_trains_on(name):
    toy = lab(name)
    toy.train(1)
    toy.train(2)
    before = everything(toy.model)
    for view in ("first", "last"):
        with list(toy.method.views(toy.model).values())[0 if view == "first" else -1], torch.inference_mode():
            plain = toy.logits()
            with folded(toy.model):
                torch.testing.assert_close(toy.logits(), plain, rtol=1e-5, atol=1e-5)
        assert same(everything(toy.model), before)
    toy.train(3)


# --- 6 resume and invariance --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_first_view_after_stage_1_says_what_was_trained_unless_the_method_averages_or_merges_otherwise(name):
    toy = lab(name)
    tracker = Tracker(toy.run.config, toy.run.stream.stages, silent=True)
    _, trained, _ = experiment.train(toy.run, toy.stage(1), tracker, moments={}, within=None)
    assert toy.method.keeps == (name not in {"ilora", "secura_release", "base_interpolation", "lines"})
    assert len(trained.said) == (3 if toy.method.keeps else 0)  # an example a task
    view, *_ = toy.method.views(toy.model).values()
    with view:
        again = said(toy.model, toy.run.encoder, toy.run.stream)
    assert not trained.said or again == pytest.approx(trained.said, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_stopping_between_stages_changes_nothing(name, tmp_path):
    whole = lab(name)
    whole.train(1)
    ledger = Ledger(tmp_path, manifest={"run": "toy"})
    ledger.save(Checkpoint(stage=1, weights=trainable_state(whole.model), state=whole.method.state_dict(), moments={}))
    outputs = whole.logits()
    whole.train(2)
    again = lab(name)
    kept = ledger.load()
    load_trainable_state(again.model, kept.weights)
    again.method.load_state_dict(kept.state)
    assert torch.equal(again.logits(), outputs)
    again.train(2)
    assert same(everything(again.model), everything(whole.model))
    assert same(again.method.state_dict(), whole.method.state_dict())
    for left, right in zip(
        again.method.views(again.model).values(), whole.method.views(whole.model).values(), strict=True
    ):
        with left, right:
            assert torch.equal(again.logits(), whole.logits())


def gradients(toy: Lab, engine: Engine, batches: list[Batch]) -> dict[str, Tensor]:
    toy.model.train()
    for batch in batches:
        engine.backward(toy.method.loss(toy.model, batch))
    toy.method.correct_gradients(engine)
    found = {tensor.name: tensor.grad.clone() for tensor in engine.tensors()}
    engine.clear()
    return found


def widened(batch: Batch, columns: int) -> Batch:
    """`batch` with so many more columns of padding, whose ids are noise."""
    rows = len(batch.input_ids)

    def wider(tensor: Tensor, filler: Tensor) -> Tensor:
        return torch.cat([tensor, filler], dim=1)

    noise = torch.randint(len(WORDS), (rows, columns), generator=torch.Generator().manual_seed(1))
    return replace(
        batch,
        input_ids=wider(batch.input_ids, noise),
        attention_mask=wider(batch.attention_mask, torch.zeros_like(noise)),
        labels=wider(batch.labels, torch.full_like(noise, -100)),
    )


@pytest.mark.parametrize("name", TRAINED)
def test_padding_and_micro_batches_change_no_gradient(name):
    toy = lab(name)
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


# --- 7 Fisher information -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ewc", "ewc_online"])
def test_the_fisher_is_the_mean_of_squared_gradients_of_single_examples(name):
    toy = lab(name, f"method.fisher_examples={TRAIN_ROWS}")
    engine = toy.step(1)
    fisher = toy.method.fisher(toy.stage(1), engine)
    expected = {key: torch.zeros_like(value) for key, value in fisher.items()}
    for example in toy.stage(1).train:
        encoded = toy.run.encoder.example(example)
        ids = torch.tensor([encoded.ids])
        log_probs = toy.model(input_ids=ids).logits[0].log_softmax(-1)
        total = sum(log_probs[place - 1, encoded.ids[place]] for place in range(encoded.answer_start, len(encoded.ids)))
        for key, gradient in zip(
            expected, torch.autograd.grad(total, list(trainable(toy.model).values())), strict=True
        ):
            expected[key] += gradient.square() / TRAIN_ROWS
    mean = sum(value.sum() for value in expected.values()) / sum(value.numel() for value in expected.values())
    assert toy.method.raw_means[-1] == pytest.approx(float(mean), rel=1e-5)
    for key, value in expected.items():
        torch.testing.assert_close(fisher[key], value / mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "overrides", [("train.micro_batch_size=1",), ("method.strength=1e4",), ("train.batch_size=7",)]
)
def test_the_fisher_depends_neither_on_batches_nor_on_a_penalty(overrides):
    toy = lab("ewc")
    fisher = toy.method.fisher(toy.stage(1), toy.step(1))
    other = lab("ewc", *overrides)
    other.train(1)
    engine = other.step(2)
    load_trainable_state(other.model, trainable_state(toy.model))
    assert other.method.importance, "a penalty is in place"
    assert same(other.method.fisher(other.stage(1), engine), fisher)


# --- 8 bfloat16 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_a_bfloat16_base_trains_with_float32_state(name):
    toy = lab(name, dtype=torch.bfloat16)
    assert {value.dtype for value in trainable(toy.model).values()} == {torch.float32}
    check_liveness(toy)
    toy.train(2)
    state = [value for value in toy.method.state_dict().values() if isinstance(value, Tensor)]
    for value in [*trainable_state(toy.model).values(), *state]:
        assert torch.isfinite(value).all()
    assert toy.logits().isfinite().all()


# --- CLoRA --------------------------------------------------------------------------------------------------------------


def test_clora_bases_are_orthonormal_seeded_and_never_move():
    toy = lab("clora")
    bases = {name: basis.clone() for name, basis in toy.method.bases.items()}
    for basis in bases.values():
        assert basis.shape[1] == basis.shape[0] // 4
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]))
    toy.train(1)
    assert same(toy.method.bases, bases)
    assert same(lab("clora").method.bases, bases)
    assert not same(lab("clora", "seed=1").method.bases, bases)


def test_clora_penalty_is_zero_on_the_null_space_and_plain_l2_at_full_width():
    rng = torch.Generator().manual_seed(0)
    basis = clora.random_basis(9, k=4, seed=0, name="x").double()
    factor = torch.randn(3, 9, generator=rng, dtype=torch.float64)
    apart = factor - factor @ basis @ basis.T
    assert float(clora.penalty(apart, basis)) == pytest.approx(0, abs=1e-12)
    assert float(clora.penalty(factor, basis)) > 0
    whole = clora.random_basis(9, k=20, seed=0, name="x").double()
    assert float(clora.penalty(factor, whole)) == pytest.approx(float(factor.square().sum()) / 2, rel=1e-5)


def test_clora_penalty_ignores_alpha():
    values = []
    for alpha in (16, 32):
        toy = lab("clora", f"method.lora.alpha={alpha}")
        values.append(
            float(toy.method.correct_gradients(LocalEngine(toy.model, optimizer=None, schedule=None, clip=0.0)))
        )
    assert values[0] == values[1] > 0


@pytest.mark.parametrize("end", ["major", "minor"])
def test_clora_svd_bases_carry_the_largest_or_the_smallest_part_of_the_weight(end):
    weight = torch.diag(torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0]))
    p_v, p_u = clora.svd_bases(weight, k_in=2, k_out=2, major=end == "major")
    kept = torch.diag(p_v @ p_v.T)
    torch.testing.assert_close(kept, torch.tensor([0.0, 1, 0, 1, 0] if end == "major" else [1.0, 0, 0, 0, 1]))
    torch.testing.assert_close(torch.diag(p_u @ p_u.T), kept)


def test_clora_refuses_an_unknown_basis():
    with pytest.raises(UserMistake, match="svd_major"):
        clora.Clora(lora=None, seed=0, strength=1.0, fraction=0.25, k=None, basis="best")


# --- I-LoRA -------------------------------------------------------------------------------------------------------------


def test_ilora_consistency_has_the_gradient_of_its_value():
    toy = lab("ilora", "method.consistency=1", SAME_RATE)
    toy.train(1)
    toy.step(2)
    toy.model.double()
    plan, _ = toy.open(3)
    rows = global_batch(plan, 0, config=toy.run.config.train, seed=0, stage=3)
    (batch,) = toy.run.encoder.micro_batches(rows, rows=len(rows))

    def pull() -> Tensor:
        return toy.method.loss(toy.model, batch) - answer_loss(toy.model, batch)

    steepest = torch.autograd.grad(pull(), list(trainable(toy.model).values()))
    for (name, parameter), gradient in zip(trainable(toy.model).items(), steepest, strict=True):
        # Llama's norms compute in float32 whatever the weights are, so the step is wide and the direction the steepest.
        direction = gradient / gradient.norm()
        slope = central_difference(lambda: float(pull().detach()), parameter, direction, width=1e-3)
        assert float(gradient.norm()) == pytest.approx(slope, rel=1e-2), name


def test_ilora_consistency_is_zero_when_slow_is_fast_and_ignores_padding():
    toy = lab("ilora")
    toy.train(1)
    toy.method.slow = {name: value.clone() for name, value in trainable(toy.model).items()}
    plan, _ = toy.open(2)
    rows = global_batch(plan, 0, config=toy.run.config.train, seed=0, stage=2)
    (batch,) = toy.run.encoder.micro_batches(rows, rows=len(rows))
    assert torch.equal(toy.method.loss(toy.model, batch), answer_loss(toy.model, batch))
    hidden = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])
    noisy = torch.where(mask[None, :, :, None] == 1, hidden, 1e6)
    assert float(ilora.consistency(noisy, hidden, mask)) == 0


def test_ilora_without_consistency_is_er():
    weights = []
    for toy in (lab("ilora", "method.consistency=0", SAME_RATE, SAME_MEMORY), lab("er", SAME_RATE, SAME_MEMORY)):
        toy.train(1)
        toy.train(2)
        weights.append(trainable_state(toy.model))
    assert same(*weights)


@pytest.mark.parametrize(("decay", "end"), [(1.0, "start"), (0.0, "fast")])
def test_ilora_at_the_ends_of_decay(decay, end):
    toy = lab("ilora", "method.warm_up=false", f"method.decay={decay}")
    start = {name: value.clone() for name, value in toy.method.slow.items()}
    toy.train(1)
    assert same(toy.method.slow, start if end == "start" else trainable_state(toy.model))


def test_ilora_is_examined_slow_first():
    toy = lab("ilora")
    toy.train(1)
    views = toy.method.views(toy.model)
    assert list(views) == ["slow", "fast"]
    fast = toy.logits()
    with views["slow"]:
        assert same(trainable_state(toy.model), toy.method.slow)
        assert not torch.equal(toy.logits(), fast)
    with views["fast"]:
        assert torch.equal(toy.logits(), fast)


# --- ER -----------------------------------------------------------------------------------------------------------------


def test_trace_replay_takes_one_epoch_over_the_memory_after_the_task():
    toy = lab("er_trace", "method.fraction=0.35")
    toy.train(1)
    toy.train(2)
    plan, _ = toy.open(3)
    memory = 2 * math.ceil(0.35 * TRAIN_ROWS)
    assert plan.total == STEPS + math.ceil(memory / ROWS)
    after = [
        row
        for step in range(STEPS, plan.total)
        for row in global_batch(plan, step, config=toy.run.config.train, seed=0, stage=3)
    ]
    assert sorted(example.id for example, _, _ in after) == sorted(example.id for example in toy.method.memory.examples)
    during = [
        row for step in range(STEPS) for row in global_batch(plan, step, config=toy.run.config.train, seed=0, stage=3)
    ]
    assert {source for _, source, _ in during} == {0}


def test_a_reservoir_keeps_every_example_equally_often():
    counts = torch.zeros(20)
    offered = [Example(id=str(index), prompt="p", answer="a") for index in range(20)]
    for seed in range(400):
        memory = Memory()
        memory.reservoir(offered[:10], capacity=5, seed=seed, stage=1)
        memory.reservoir(offered[10:], capacity=5, seed=seed, stage=2)
        for example in memory.examples:
            counts[int(example.id)] += 1
    # Each is kept with probability 1/4: 100 of 400, standard deviation 8.7.
    assert (counts - 100).abs().max() < 4 * 8.7


def test_replay_leaves_the_order_of_the_current_task_alone():
    current = [Example(id=f"c{index}", prompt="p", answer="a") for index in range(7)]
    past = [Example(id=f"m{index}", prompt="p", answer="a") for index in range(3)]
    alone = draw((Source(examples=current),), batch_size=4, step=3, seed=0, stage=2)
    mixed = draw((Source(examples=current), Source(examples=past)), batch_size=4, step=3, seed=0, stage=2)
    assert [row[0].id for row in alone] == [row[0].id for row in mixed[:4]]
    assert len(mixed) == 8


# --- L2, O-LoRA, merging ------------------------------------------------------------------------------------------------


def test_l2_is_half_the_squared_norm_of_the_update():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 7, generator=rng, dtype=torch.float64), torch.randn(5, 3, generator=rng, dtype=torch.float64)
    expected = 0.5 * (1.5 * b @ a).square().sum()
    assert float(l2.penalty(l2.gram(a), l2.gram(b.T), scale=1.5)) == pytest.approx(float(expected))


def test_olora_penalty_is_zero_for_orthogonal_rows():
    assert float(olora.penalty(torch.eye(6)[:2], torch.eye(6)[2:])) == 0
    assert float(olora.penalty(2 * torch.eye(6)[:2], torch.eye(6)[1:])) == 2


def test_olora_keeps_its_rows_closer_to_orthogonal_than_without_penalty():
    overlap = []
    for strength in (0.5, 0.0):
        toy = lab("olora", f"method.strength={strength}")
        toy.train(1)
        toy.step(2)
        live = trainable(toy.model)
        overlap.append(
            sum(float(olora.penalty(live[pair.A].detach(), toy.method.retired[pair.A])) for pair in toy.method.pairs)
        )
    assert overlap[0] < overlap[1]


@pytest.mark.parametrize("name", ["seq_merge", "olora"])
def test_merging_keeps_the_outputs_and_starts_a_fresh_adapter(name):
    toy = lab(name)
    first = trainable_state(toy.model)
    engine = toy.step(1)
    toy.model.eval()
    trained, outputs = trainable_state(toy.model), toy.logits()
    toy.method.end_stage(toy.stage(1), engine)
    engine.close()
    toy.method.consolidate(toy.model)
    torch.testing.assert_close(toy.logits(), outputs, rtol=1e-5, atol=1e-5)
    assert same(toy.method.retired, trained)
    for pair in toy.method.pairs:
        live = trainable(toy.model)
        assert live[pair.B].abs().max() == 0
        assert not torch.equal(live[pair.A], first[pair.A])
        bound = 1 / math.sqrt(live[pair.A].shape[1])
        assert 0.8 * bound < live[pair.A].abs().max() <= bound


def viewed(toy: Lab) -> Tensor:
    """The logits of the first view, folded as in an examination."""
    view, *_ = toy.method.views(toy.model).values()
    with view, folded(toy.model):
        return toy.logits()


@pytest.mark.parametrize("name", ["seq_merge", "olora", "merge_average"])
def test_a_first_stage_that_is_merged_is_that_of_plain_fine_tuning_where_weights_are_kept_in_out(name):
    same = ("method.lora.targets=all-linear", "train.lr=1e-3")
    merging, plain = (lab(method, *same, made=gpt2) for method in (name, "seq"))
    assert list(trainable(merging.model)) == list(trainable(plain.model))
    untouched = plain.logits()
    merging.train(1)
    plain.train(1)
    expected = viewed(plain)
    assert float((expected - untouched).abs().max()) > 1e-3
    torch.testing.assert_close(viewed(merging), expected, atol=1e-5, rtol=1e-5)
    merging.train(2)
    assert float((viewed(merging) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["secura", "secura_m2", "curlora", "clora_svd_major", "clora_svd_minor"])
def test_methods_that_read_weights_train_two_stages_where_these_are_kept_in_out(name):
    targets = "method.lora.targets" if name.startswith("clora") else "method.targets"
    toy = lab(name, f"{targets}=all-linear", made=gpt2)
    for number in (1, 2):
        before = viewed(toy)
        toy.train(number)
        torch.testing.assert_close(viewed(toy), toy.logits(), atol=1e-5, rtol=1e-5)
        assert float((viewed(toy) - before).abs().max()) > 1e-4


def test_merged_weights_are_the_base_plus_the_sum_of_all_adapters():
    toy = lab("seq_merge")
    toy.train(1)
    toy.train(2)
    for pair in toy.method.pairs:
        before = toy.untouched[id(pair.layer.get_base_layer().weight)]
        torch.testing.assert_close(pair.weight, before + pair.update(toy.method.retired), rtol=1e-5, atol=1e-6)


def test_the_average_is_that_of_the_updates_after_each_stage():
    toy = lab("merge_average")
    updates: list[dict[str, Tensor]] = []
    for number in (1, 2, 3):
        toy.train(number)
        updates.append({pair.A: pair.update(pair.live()) for pair in lora_pairs(toy.model)})
    pairs = lora_pairs(toy.model)
    before = {pair.A: pair.weight.clone() for pair in pairs}
    (view,) = toy.method.views(toy.model).values()
    with view:
        for pair in pairs:
            mean = sum(update[pair.A] for update in updates) / 3
            torch.testing.assert_close(
                pair.weight + pair.update(pair.live()), before[pair.A] + mean, rtol=1e-5, atol=1e-6
            )


# --- bounds -------------------------------------------------------------------------------------------------------------


def test_single_starts_every_task_where_the_first_started():
    toy = lab("single")
    start = trainable_state(toy.model)
    toy.train(1)
    assert not same(trainable_state(toy.model), start)
    toy.open(2)
    assert same(trainable_state(toy.model), start)
    alone = lab("single")
    alone.train(2)
    toy.train(2)
    assert same(trainable_state(alone.model), trainable_state(toy.model))


def test_joint_trains_on_every_task_in_every_stage():
    toy = lab("joint")
    plan, _ = toy.open(1)
    seen = {
        row[0].id.split("/")[0]
        for step in range(plan.total)
        for row in global_batch(plan, step, config=toy.run.config.train, seed=0, stage=1)
    }
    assert seen == {"toy1", "toy2", "toy3"}
    assert plan.total == STEPS


def test_full_fine_tuning_trains_every_weight():
    toy = lab("seq_full")
    assert len(trainable(toy.model)) == len(toy.base)


@pytest.mark.parametrize("name", ["l2", "ilora"])
def test_a_method_on_lora_factors_refuses_dora(name):
    with pytest.raises(UserMistake, match="dora"):
        lab(name, "+method.lora.dora=true")
