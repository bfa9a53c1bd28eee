"""CUR layers, CURLoRA and SECURA: what METHODS lists as CUR-1..9 and SEC-1..10, each worked out by hand or by brute force."""

import math
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch.nn import Linear, Module
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from baselines.curlora import CurLora, choose
from baselines.secura import Secura, magnorm_output_release, magnorm_weight_comment, magnorm_weight_id
from clbench.data.sampling import generator
from clbench.models import cur
from clbench.models.folding import export, folded
from clbench.models.lora import Lora
from clbench.models.weights import load_trainable_state, trainable, trainable_state
from clbench.train.local import LocalEngine
from clbench.types import UserMistake

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 32, "initializer_range": 0.2}
IDS = torch.arange(1, 25).reshape(2, 12)
PROFILES = ("curlora", "secura", "secura_m2", "secura_release", "cabr")


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=32)).eval()


def method(
    profile: str, *, targets: tuple[str, ...] = ("q_proj", "v_proj"), seed: int = 0, bias: bool = True
) -> CurLora | Secura:
    """The method as its yaml has it, small."""
    if profile == "curlora":
        return CurLora(targets=list(targets), rank=4, alpha=1.0, select="code_eps", seed=seed)
    release = profile == "secura_release"
    return Secura(
        targets=list(targets),
        rank=150,
        inner=200,
        magnorm={"cabr": "none", "secura_release": "output_release"}.get(profile, "weight_id"),
        quantile=0.999,
        kappa=6.0,
        merge={"cabr": "none", "secura_m2": "m2"}.get(profile, "m1"),
        fusion_step=1 if release else None,
        train_bias=bias,
    )


def train(
    entrant: CurLora | Secura, model: Module, *, steps: int, lr: float = 1e-2, decay: float = 0.0, end: bool = True
) -> None:
    """One stage: `steps` steps of AdamW towards fixed random next tokens, then the method's consolidation."""
    entrant.begin_stage(None, model)
    model.train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=lr, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    engine = LocalEngine(model, optimizer=optimizer, schedule=schedule, clip=0.0)
    for _ in range(steps):
        engine.backward(F.cross_entropy(model(input_ids=IDS).logits.flatten(0, 1), IDS.flip(1).flatten()))
        engine.step()
        entrant.after_step(engine)
    engine.close()
    model.eval()
    if end:
        entrant.consolidate(model)


@torch.no_grad()
def logits(model: Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


@torch.no_grad()
def disturb(model: Module, size: float = 0.1) -> None:
    """Every trainable tensor becomes random, so that every layer has an update."""
    rng = torch.Generator().manual_seed(5)
    for parameter in trainable(model).values():
        parameter.add_(size * torch.randn(parameter.shape, generator=rng))


def random_layer(profile: str, *, out: int = 20, inputs: int = 24) -> cur.CurLinear:
    torch.manual_seed(1)
    holder = torch.nn.ModuleDict({"q_proj": Linear(inputs, out, bias=True, dtype=torch.float64)})
    method(profile, targets=("q_proj",)).wrap(holder)
    disturb(holder)
    return holder["q_proj"]


# What a fresh layer is


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("profile", PROFILES)
def test_a_fresh_adapter_changes_no_logit_by_a_single_bit(profile, dtype):
    model = llama().to(dtype)
    before = logits(model)
    assert torch.equal(logits(method(profile).wrap(model)), before)


@pytest.mark.parametrize("profile", PROFILES)
def test_only_the_core_and_beta_train_in_float32_even_on_a_bfloat16_model(profile):
    model = method(profile).wrap(llama().to(torch.bfloat16))
    assert {name.rpartition(".")[2] for name in trainable(model)} <= {"U", "A", "B", "beta"}
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    count = sum(parameter.numel() for parameter in trainable(model).values())
    # Weights are q [32, 32] and v [16, 32] in 2 layers: rank 8 and 4, inner ceil(4 / 3 rank) = 11 and 6.
    assert count == (2 * 2 * 4 * 4 if profile == "curlora" else 2 * (2 * 8 * 11 + 32 + 2 * 4 * 6 + 16))


def test_a_rank_beyond_every_layer_is_a_mistake_and_one_beyond_some_is_not():
    # q_proj is [32, 32], v_proj [16, 32].
    wide = CurLora(targets=["q_proj", "v_proj"], rank=32, alpha=1.0, select="code_eps", seed=0)
    wide.wrap(llama())
    assert sorted({len(layer.columns) for layer in wide.layers.values()}) == [16, 32]
    with pytest.raises(UserMistake, match="method.rank=33 .* 32 at most"):
        replace(wide, rank=33).wrap(llama())


def test_released_sizes_shrink_to_a_quarter_of_the_smaller_side():
    assert cur.clamped(150, 200, shape=(4096, 1024)) == (150, 200)
    assert cur.clamped(150, 200, shape=(128, 128)) == (32, 43)
    assert cur.clamped(150, 200, shape=(2, 9)) == (1, 2)


@pytest.mark.parametrize("profile", PROFILES)
def test_c_and_r_are_columns_and_rows_of_the_first_weight_and_survive_training(profile):
    model = llama()
    first = {
        name: module.weight.detach().clone() for name, module in model.named_modules() if isinstance(module, Linear)
    }
    entrant = method(profile)
    model = entrant.wrap(model)
    for _ in range(2):
        train(entrant, model, steps=3)
    for name, layer in entrant.layers.items():
        assert torch.equal(layer.C, first[name][:, layer.columns])
        assert torch.equal(layer.R, first[name][layer.rows, :])
        assert not layer.C.requires_grad and not layer.R.requires_grad


def test_secura_takes_the_smallest_norms_in_ascending_order():
    weight = torch.tensor([[3.0, 0.0, 1.0, -2.0], [4.0, 0.5, 1.0, 0.0]])  # column norms 5, .5, 1.41, 2
    assert cur.smallest_columns(weight, 3).tolist() == [1, 2, 3]
    layer = method("secura").fitted(Linear(24, 20))
    by_hand = sorted(range(24), key=lambda j: math.dist(layer.weight[:, j].tolist(), [0.0] * 20))
    assert layer.columns.tolist() == by_hand[:5]
    assert torch.equal(layer.core.A, layer.weight[:5, :7])


# Which columns CURLoRA takes


def test_column_probabilities_are_inverse_to_the_share_of_the_squared_norm():
    weight = torch.tensor([[3.0, 0.0], [0.0, 1.0]])  # shares .9 and .1
    assert cur.column_probabilities(weight, offset=0.0).tolist() == pytest.approx([0.1, 0.9])
    assert cur.column_probabilities(weight, offset=0.3).tolist() == pytest.approx([0.25, 0.75])


def test_both_inversions_agree_where_all_columns_weigh_the_same():
    weight = torch.eye(5)
    for offset in (0.0, 1e-3):
        assert cur.column_probabilities(weight, offset=offset).tolist() == pytest.approx([0.2] * 5)


def test_an_empty_column_has_a_finite_probability():
    probabilities = cur.column_probabilities(torch.tensor([[1.0, 0.0]]), offset=0.0)
    assert probabilities.isfinite().all() and probabilities[1] > 0.99


def test_columns_are_drawn_as_often_as_their_probability_says():
    weight = torch.diag(torch.tensor([1.0, 1.5, 2.0, 3.0]))
    expected = 4000 * cur.column_probabilities(weight, offset=1e-3)
    rng = generator(0, "draws")
    drawn = torch.cat([cur.sample_columns(weight, 1, offset=1e-3, rng=rng) for _ in range(4000)])
    chi_square = ((torch.bincount(drawn, minlength=4) - expected).square() / expected).sum()
    assert chi_square < 16.27  # 3 degrees of freedom, p = .001


def test_no_column_is_drawn_twice():
    assert sorted(cur.sample_columns(torch.randn(3, 9), 9, offset=0.0, rng=generator(0, "all")).tolist()) == list(
        range(9)
    )


@pytest.mark.parametrize("select", ["code_eps", "paper"])
def test_the_draw_depends_on_seed_and_layer_alone(select):
    weight = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    draw = {(seed, name): choose(weight, 8, select=select, seed=seed, name=name) for seed in (0, 1) for name in "ab"}
    torch.manual_seed(99)
    again = choose(weight, 8, select=select, seed=0, name="a")
    assert all(torch.equal(x, y) for x, y in zip(again, draw[0, "a"], strict=True))
    assert len({tuple(columns.tolist()) for columns, _ in draw.values()}) == 4


def test_top_k_selection_draws_nothing():
    weight = torch.randn(30, 40)
    assert all(
        torch.equal(x, y)
        for x, y in zip(
            choose(weight, 8, select="topk", seed=0, name="a"),
            choose(weight, 8, select="topk", seed=1, name="b"),
            strict=True,
        )
    )


# The update


@pytest.mark.parametrize("profile", ["curlora", "cabr"])
def test_the_update_has_low_rank_and_lies_in_the_spans_of_c_and_r(profile):
    layer = random_layer(profile)
    delta = layer.effective_weight(layer.core()) - layer.weight
    rank = len(layer.columns)
    assert torch.linalg.matrix_rank(delta) == rank
    assert torch.linalg.matrix_rank(torch.cat([layer.C, delta], dim=1)) == rank
    assert torch.linalg.matrix_rank(torch.cat([layer.R, delta], dim=0)) == rank
    assert delta.norm() <= layer.C.norm() * layer.core().norm() * layer.R.norm()


@pytest.mark.parametrize("profile", ["curlora", "cabr"])
def test_the_factored_forward_and_its_gradients_equal_those_of_the_whole_update(profile):
    layer, x = random_layer(profile), torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    layer.scale = 2.5
    whole = layer.weight + layer.scale * layer.C @ layer.core() @ layer.R
    bias = layer.base.bias if layer.beta is None else layer.base.bias + layer.beta
    mine, brute = layer(x), x @ whole.t() + bias
    torch.testing.assert_close(mine, brute)
    weights = [x, *(p for p in layer.parameters() if p.requires_grad)]
    got, expected = (torch.autograd.grad((y * y).sum(), weights) for y in (mine, brute))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_gradient_of_u_is_the_weights_gradient_between_c_and_r():
    layer, x = random_layer("curlora"), torch.randn(3, 24, dtype=torch.float64)
    upstream = torch.randn(3, 20, dtype=torch.float64)
    (layer(x) * upstream).sum().backward()
    torch.testing.assert_close(layer.core.U.grad, layer.C.t() @ (upstream.t() @ x) @ layer.R.t())


def test_the_scale_multiplies_the_update():
    layer = random_layer("curlora")
    once = layer.effective_weight(layer.core()) - layer.weight
    layer.scale = 2.5
    torch.testing.assert_close(layer.effective_weight(layer.core()) - layer.weight, 2.5 * once)


# S-MagNorm


@pytest.mark.parametrize("quantile", [0.0, 0.37, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("count", [1, 2, 1000, 1001])
def test_the_quantile_is_the_linear_one(quantile, count):
    values = torch.rand(count, dtype=torch.float64)
    torch.testing.assert_close(cur.upper_quantile(values, quantile), torch.quantile(values, quantile))


def test_smagnorm_halves_the_smallest_change_and_passes_the_largest():
    weight, delta = torch.ones(1, 5), torch.tensor([[0.0, 0.25, -0.5, 0.75, 1.0]])
    divided_by = magnorm_weight_id(weight, delta, quantile=1.0, kappa=6.0)
    # Half way up the sigmoid is half way between the ends; the quarters are symmetric about it.
    assert divided_by[0, [0, 2, 4]].tolist() == pytest.approx([2.0, 1.5, 1.0])
    assert float(divided_by[0, 1] + divided_by[0, 3]) == pytest.approx(3.0)
    low, quarter = 1 / (1 + math.exp(3)), 1 / (1 + math.exp(1.5))
    assert float(divided_by[0, 1]) == pytest.approx(2 - (quarter - low) / (1 - 2 * low))


def test_restraints_stay_within_their_bounds():
    torch.manual_seed(0)
    weight, delta = torch.randn(40, 50, dtype=torch.float64), 0.1 * torch.randn(40, 50, dtype=torch.float64)
    divided_by = magnorm_weight_id(weight, delta, quantile=0.999, kappa=6.0)
    assert 1 <= divided_by.min() < 1.01 and 1.99 < divided_by.max() <= 2
    final, fused = ((2 * weight + delta) / divided_by).abs(), (2 * weight + delta).abs()
    assert (final >= fused / 2).all() and (final <= fused).all()
    comment = magnorm_weight_comment(weight, delta, kappa=6.0)
    assert 1.0474 <= comment.min() < 1.06 and 1.9 < comment.max() <= 1.9526
    release = magnorm_output_release(weight, delta, kappa=6.0)
    assert 1 <= release.min() and release.max() <= 1.5


def test_no_change_is_no_change_under_every_restraint():
    weight, zero = torch.randn(4, 5), torch.zeros(4, 5)
    assert (magnorm_weight_id(weight, zero, quantile=0.9, kappa=6.0) == 2).all()
    assert (magnorm_weight_comment(weight, zero, kappa=6.0) == 2).all()
    assert (magnorm_output_release(weight, zero, kappa=6.0) == 2).all()


def test_a_single_change_leaves_other_weights_alone_but_lifts_the_releases_other_outputs_by_a_third():
    base, delta = torch.full((2, 3), 3.0), torch.zeros(2, 3)
    delta[0, 0] = 0.1
    assert cur.restrained(base, delta, lambda *pair: magnorm_weight_id(*pair, quantile=1.0, kappa=6.0))[1, 1] == 3
    lifted = cur.restrained(base, delta, lambda *pair: magnorm_output_release(*pair, kappa=6.0))
    assert float(lifted[1, 1]) == pytest.approx(4.0)


def test_the_restraint_is_a_constant_to_autograd():
    weight, delta = torch.randn(6, 7), torch.randn(6, 7, requires_grad=True)

    def divisor(base, change):
        return magnorm_weight_id(base, change, quantile=0.9, kappa=6.0)

    cur.restrained(weight, delta, divisor).sum().backward()
    torch.testing.assert_close(delta.grad, 1 / divisor(weight, delta.detach()))


@pytest.mark.parametrize("profile", ["secura", "secura_m2"])
def test_a_restrained_layer_and_its_gradients_equal_the_formula_written_out(profile):
    layer, x = random_layer(profile), torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    layer.core.history += 0.1
    delta = layer.C @ (layer.core.history + layer.core.A @ layer.core.B) @ layer.R
    divided_by = magnorm_weight_id(layer.weight, delta.detach(), quantile=0.999, kappa=6.0)
    brute = x @ ((2 * layer.weight + delta) / divided_by).t() + layer.base.bias + layer.beta
    torch.testing.assert_close(layer(x), brute)
    weights = [x, layer.core.A, layer.core.B, layer.beta]
    for one, other in zip(
        torch.autograd.grad((layer(x) ** 2).sum(), weights), torch.autograd.grad((brute**2).sum(), weights), strict=True
    ):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 0


def test_a_small_update_of_a_bfloat16_weight_is_not_rounded_away():
    torch.manual_seed(0)
    layer = method("secura").fitted(Linear(64, 64, bias=False).to(torch.bfloat16))
    with torch.no_grad():
        layer.core.B.fill_(1e-5)
        change = layer.effective_weight(layer.core()) - layer.weight.float()
        rounded = (layer.weight.float() + change).bfloat16() - layer.weight
        layer.base.forward = torch.zeros_like  # so that outputs show the change alone
        mine = layer(torch.eye(64, dtype=torch.bfloat16)).t()
    assert (rounded == 0).float().mean() > 0.9
    torch.testing.assert_close(mine.float(), change, rtol=2**-8, atol=1e-12)


# Training and merging


@pytest.mark.parametrize("profile", PROFILES)
def test_everything_that_should_train_moves_and_nothing_else_does(profile):
    model, entrant = llama(), method(profile)
    model = entrant.wrap(model)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    train(entrant, model, steps=5, decay=0.01 if profile == "secura_release" else 0.0, end=False)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    expected = set(trainable(model))
    if profile == "secura_release":  # merged after every step: B is 0 again, and the weights have moved
        expected -= {name for name in expected if name.endswith(".B")}
        expected |= {f"{name}.base.weight" for name in entrant.layers}
    assert moved == expected


@pytest.mark.parametrize("profile", ["secura", "secura_m2"])
def test_merging_changes_no_output(profile):
    model, entrant = llama(), method(profile)
    model, untouched = entrant.wrap(model), logits(llama())
    for _ in range(2):
        train(entrant, model, steps=5, end=False)
        before = logits(model)
        entrant.consolidate(model)
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
        assert all(layer.core.B.abs().max() == 0 for layer in entrant.layers.values())
        assert (before - untouched).abs().max() > 1e-2


def test_merging_without_the_restraint_would_show():
    model, entrant = llama(), method("secura")
    model = entrant.wrap(model)
    train(entrant, model, steps=5, end=False)
    before = logits(model)
    for layer in entrant.layers.values():
        layer.divisor = None
    entrant.consolidate(model)
    assert (logits(model) - before).abs().max() > 1e-3


def test_the_release_jumps_when_it_merges():
    model, entrant = llama(), method("secura_release")
    entrant.fusion_step = None
    model = entrant.wrap(model)
    train(entrant, model, steps=3, end=False)
    before = logits(model)
    entrant.consolidate(model)
    assert (logits(model) - before).abs().max() > 1e-3


def test_m2_never_touches_the_weight_and_m1_does():
    for profile, touched in (("secura", True), ("secura_m2", False)):
        model, entrant = llama(), method(profile)
        model, first = entrant.wrap(model), llama()
        train(entrant, model, steps=3)
        train(entrant, model, steps=3)
        for name, layer in entrant.layers.items():
            assert torch.equal(layer.base.weight, first.get_submodule(name).weight) != touched
            assert (layer.core.history.abs().max() > 0) != touched


def test_m2_remembers_the_sum_of_its_products():
    model, entrant = llama(), method("secura_m2")
    model = entrant.wrap(model)
    layer = next(iter(entrant.layers.values()))
    total = torch.zeros_like(layer.core.history)
    for _ in range(3):
        train(entrant, model, steps=2, end=False)
        total += (layer.core.A @ layer.core.B).detach()
        entrant.consolidate(model)
    torch.testing.assert_close(layer.core.history, total)


@pytest.mark.parametrize(("decay", "constant"), [(0.0, True), (0.01, False)])
def test_merged_after_every_step_a_moves_by_weight_decay_alone(decay, constant):
    model, entrant = llama(), method("secura_release")
    model = entrant.wrap(model)
    start = {name: layer.core.A.detach().clone() for name, layer in entrant.layers.items()}
    train(entrant, model, steps=5, lr=1e-2, decay=decay)
    for name, layer in entrant.layers.items():
        assert torch.equal(layer.core.A, start[name]) == constant
        torch.testing.assert_close(layer.core.A, start[name] * (1 - 1e-2 * decay) ** 5)


def test_a_release_step_adds_c_a_b_r_to_the_weight_and_keeps_the_moments():
    layer = random_layer("secura_release")
    model = torch.nn.ModuleDict({"q_proj": layer})
    entrant = method("secura_release")
    entrant.layers = {"q_proj": layer}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    engine = LocalEngine(model, optimizer=optimizer, schedule=schedule, clip=0.0)
    engine.backward(layer(torch.ones(2, 24, dtype=torch.float64)).square().sum())
    engine.step()
    expected = layer.weight + layer.C @ layer.core.A.detach() @ layer.core.B.detach() @ layer.R
    entrant.after_step(engine)
    torch.testing.assert_close(layer.weight, expected)
    assert layer.core.B.abs().max() == 0
    assert optimizer.state[layer.core.B]["exp_avg"].abs().max() > 0


def test_a_fusion_step_of_two_merges_every_second_step_and_the_rest_at_the_end():
    model, entrant = llama(), method("secura")
    entrant.fusion_step = 2
    model = entrant.wrap(model)
    layer = next(iter(entrant.layers.values()))
    train(entrant, model, steps=3, end=False)
    first = layer.weight.clone()
    assert layer.core.B.abs().max() > 0 and not torch.equal(
        first, llama().get_submodule(next(iter(entrant.layers))).weight
    )
    entrant.consolidate(model)
    assert layer.core.B.abs().max() == 0 and not torch.equal(layer.weight, first)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_run_stopped_between_two_stages_continues_bit_for_bit(profile):
    model, entrant = llama(), method(profile)
    model = entrant.wrap(model)
    train(entrant, model, steps=3)
    weights, state = trainable_state(model), entrant.state_dict()
    train(entrant, model, steps=3)
    again = method(profile)
    resumed = again.wrap(llama())
    load_trainable_state(resumed, weights)
    again.load_state_dict(state)
    train(again, resumed, steps=3)
    assert torch.equal(logits(resumed), logits(model))
    assert not torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("profile", PROFILES)
def test_a_checkpoint_of_another_base_model_is_refused(profile):
    entrant, other = method(profile), method(profile)
    entrant.wrap(llama())
    other.wrap(llama(seed=1))
    with pytest.raises(UserMistake, match="restore the model's weights"):
        other.load_state_dict(entrant.state_dict())


def test_a_checkpoint_of_another_seed_is_refused():
    entrant, other = method("curlora", seed=0), method("curlora", seed=1)
    entrant.wrap(llama())
    other.wrap(llama())
    with pytest.raises(UserMistake, match="seed"):
        other.load_state_dict(entrant.state_dict())


# Where adapters can go


@pytest.mark.parametrize("profile", ["curlora", "secura"])
def test_gpt2s_transposed_layers_are_adapted_in_the_right_orientation(profile):
    model, entrant = gpt2(), method(profile, targets=("attn.c_proj",))  # a square weight, where a guess would go wrong
    before = logits(model)
    weight = model.transformer.h[0].attn.c_proj.weight.detach().clone().t()
    model = entrant.wrap(model)
    assert torch.equal(logits(model), before)
    layer = entrant.layers["transformer.h.0.attn.c_proj"]
    assert torch.equal(layer.C, weight[:, layer.columns]) and torch.equal(layer.R, weight[layer.rows])
    disturb(model)
    x = torch.randn(3, 32)
    bias = layer.base.bias if layer.beta is None else layer.base.bias + layer.beta
    torch.testing.assert_close(layer(x), x @ layer.effective_weight(layer.core()).t() + bias, rtol=1e-4, atol=1e-5)


def test_layers_that_cannot_be_adapted_are_refused_with_those_that_can():
    with pytest.raises(
        UserMistake, match="'embed_tokens' is a Embedding; choose layers of type Linear or Conv1D: .*q_proj"
    ):
        method("curlora", targets=("embed_tokens",)).wrap(llama())
    with pytest.raises(UserMistake, match="'c_attn' is in no layer's name.*down_proj, gate_proj"):
        method("secura", targets=("q_proj", "c_attn")).wrap(llama())


def test_an_inner_width_below_the_rank_is_refused():
    with pytest.raises(UserMistake, match="inner"):
        replace(method("secura"), inner=150)


# Folding and export


@pytest.mark.parametrize("profile", PROFILES)
def test_folding_keeps_the_outputs_and_puts_every_weight_back_bit_for_bit(profile):
    model = method(profile).wrap(llama())
    disturb(model)
    before, outputs = {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits(model)
    with folded(model):
        torch.testing.assert_close(logits(model), outputs, rtol=1e-5, atol=1e-5)
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert bool(changed) == (profile != "secura_release")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), outputs)


def test_a_folded_layer_costs_one_multiplication(monkeypatch):
    model = method("secura").wrap(llama())
    disturb(model)
    with folded(model):
        monkeypatch.setattr(cur, "restrained", None)
        monkeypatch.setattr(cur, "cur_delta", None)
        logits(model)


@pytest.mark.parametrize("profile", ["curlora", "secura", "secura_m2", "cabr"])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "gpt2"])
def test_an_exported_model_gives_the_same_logits_from_transformers_alone(profile, family, tmp_path):
    torch.manual_seed(0)
    model = {
        "llama": llama,
        "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval(),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval(),
        "gpt2": gpt2,
    }[family]()
    entrant = method(profile, targets=("c_attn",) if family == "gpt2" else ("q_proj", "v_proj"))
    model = entrant.wrap(model)
    disturb(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outputs, config = logits(model), model.config.to_dict()
    export(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    torch.testing.assert_close(logits(loaded), outputs, rtol=1e-5, atol=1e-5)


def test_what_no_ordinary_checkpoint_can_hold_is_not_exported(tmp_path):
    model = method("secura_release").wrap(llama())
    with pytest.raises(UserMistake, match="method.magnorm"):
        export(model, tmp_path)
    mistral = method("secura").wrap(MistralForCausalLM(MistralConfig(**SIZES)))
    with pytest.raises(UserMistake, match="method.train_bias=false"):
        export(mistral, tmp_path)
    mistral = method("secura", bias=False).wrap(MistralForCausalLM(MistralConfig(**SIZES)).eval())
    disturb(mistral)
    export(mistral, tmp_path)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(mistral), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dora", [False, True])
def test_a_peft_model_exports_merged_and_as_an_adapter_that_peft_opens(dora, tmp_path):
    model = Lora(rank=4, alpha=8, targets=["q_proj", "down_proj"], dora=dora).add(llama(), seed=0)
    disturb(model)
    outputs = logits(model.eval())
    assert (outputs - logits(llama())).abs().max() > 1e-2
    export(model, tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), outputs, rtol=1e-5, atol=1e-5)
    reopened = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    assert torch.equal(logits(reopened), outputs)
    assert torch.equal(logits(model), outputs)


def test_a_model_without_adapters_exports_as_it_is(tmp_path):
    export(llama(), tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(llama()))
