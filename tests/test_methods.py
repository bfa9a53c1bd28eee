"""The contract of every method (`clbench.contract`): each yaml in conf/method is composed, trained on a toy stream and held to it.

A new yaml is tested because it exists. Every check that could pass for want of an effect has a mutation that must make it fail.
"""

import math
from collections.abc import Callable
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
from clbench import contract
from clbench.config import Config, composition, from_plain
from clbench.contract.lab import ROWS, STEPS, TINY, TOY, TRAIN_ROWS, WORDS, Lab, everything, llama, same, watched
from clbench.contract.lab import lab as laboratory
from clbench.data.memory import Memory
from clbench.data.sampling import draw
from clbench.models.folding import folded
from clbench.models.loss import answer_loss
from clbench.models.pairs import lora_pairs
from clbench.models.pretrained import without_dropout
from clbench.models.tiny import word_tokenizer
from clbench.models.weights import load_trainable_state, trainable, trainable_state
from clbench.protocols import Engine, Method
from clbench.train.local import LocalEngine
from clbench.train.loop import global_batch, plan_stage
from clbench.types import Example, Source, UserMistake
from tests.conftest import small

NAMES = sorted(path.stem for path in (composition.CONF_DIR / "method").glob("*.yaml"))
torch.set_num_threads(1)


@cache
def composed(name: str, *overrides: str) -> Config:
    composition.register_schema()
    with initialize_config_dir(str(composition.CONF_DIR), version_base="1.3"):
        tree = compose("config", overrides=[*small(name), *TOY, *overrides])
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


def gpt2(words: PreTrainedTokenizerFast) -> nn.Module:
    """A tiny GPT-2, whose linear layers keep their weights [in, out]; attention's last one is square."""
    size = {"n_embd": TINY["hidden_size"], "n_layer": TINY["num_hidden_layers"], "n_head": 4, "n_positions": 64}
    size |= {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    torch.manual_seed(0)
    return GPT2LMHeadModel(without_dropout(GPT2Config(vocab_size=len(words), initializer_range=0.05, **size)))


def lab(
    name: str,
    *overrides: str,
    dtype: torch.dtype = torch.float32,
    made: Callable[[PreTrainedTokenizerFast], nn.Module] = llama,
) -> Lab:
    return laboratory(composed(name, *overrides), dtype=dtype, made=made)


# --- 1 identity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_wrapping_changes_no_output(name):
    contract.check_wrapping(lab(name))


# --- 2 liveness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_all_that_trains_moves_and_all_else_stays(name):
    contract.check_liveness(lab(name))


@pytest.mark.parametrize("name", NAMES)
def test_only_a_method_that_says_so_writes_into_frozen_weights(name):
    contract.check_frozen(lab(name))


@pytest.mark.parametrize("name", TRAINED)
def test_liveness_notices_a_tensor_that_is_frozen(name):
    toy = lab(name)
    if id(next(iter(trainable(toy.model).values()))) in toy.base:
        toy.model.requires_grad_(False)  # full fine-tuning adds nothing: freezing is seen when all of it is frozen
    else:
        next(iter(trainable(toy.model).values())).requires_grad_(False)
    with pytest.raises(AssertionError, match="frozen|nothing trains"):
        contract.check_liveness(toy)


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
        contract.check_liveness(toy)


# --- 2 penalties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PENALISED)
def test_the_penalty_has_the_gradient_of_its_value(name):
    contract.check_penalty(lab(name))


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
        contract.check_penalty(lab(name))


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
    method, general = toy.method, toy.method.replayed()[:]
    if not general:
        assert method.training_set(toy.stage(1)) == (Source(examples=toy.stage(1).train),)
    toy.train(1)
    toy.train(2)
    past = [*toy.stage(1).train, *toy.stage(2).train]
    held = method.memory.examples
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


@pytest.mark.parametrize("name", ["er_reservoir", "er_general"])
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
    weights, rate = [], "train.lr=1e-3"
    for toy in (lab("lora_wd", rate), lab("lora_wd", rate, "train.weight_decay=0"), lab("seq", rate)):
        toy.train(1)
        weights.append(trainable_state(toy.model))
    assert not same(weights[0], weights[2])
    assert same(weights[1], weights[2])


# --- 5 fold and unfold --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_examining_folded_gives_the_same_outputs_restores_every_bit_and_leaves_a_model_that_trains_on(name):
    contract.check_folding(lab(name))


# --- 6 resume and invariance --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_first_view_after_stage_1_says_what_was_trained_unless_the_method_averages_or_merges_otherwise(name):
    toy = lab(name)
    assert toy.method.keeps == (name not in {"ilora", "secura_release", "base_interpolation", "lines"})
    contract.check_kept(toy)


@pytest.mark.parametrize("name", NAMES)
def test_stopping_between_stages_changes_nothing(name):
    contract.check_resume(lab(name), lab(name))


@pytest.mark.parametrize("name", TRAINED)
def test_padding_and_micro_batches_change_no_gradient(name):
    contract.check_batches(lab(name))


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
    contract.check_bfloat16(lab(name, dtype=torch.bfloat16))


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
        slope = contract.central_difference(lambda: float(pull().detach()), parameter, direction, width=1e-3)
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
        before = toy.base[id(pair.layer.get_base_layer().weight)]
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
