"""Methods that hold outputs to the base, views of a shrunk update, OSF, SLAO, A-GEM: each against numbers worked out by hand or in float64."""

import math
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hydra.errors import InstantiationException
from peft.tuners.osf import OSFLayer
from torch import Tensor

from baselines import agem, base_interpolation, lines, slao
from clbench.contract import central_difference
from clbench.data.sampling import generator
from clbench.models import outputs
from clbench.models.folding import folded
from clbench.models.loss import answer_loss, rows_of
from clbench.models.weights import trainable, trainable_state
from clbench.train.loop import global_batch
from clbench.types import Batch, Example, UserMistake
from tests.test_methods import SAME_RATE, TINY, Lab, everything, gpt2, lab, llama, same, tokenizer


def batch_of(toy: Lab, number: int, step: int = 0) -> Batch:
    """The rows of a step of stage `number` as one batch."""
    plan, _ = toy.open(number)
    rows = global_batch(plan, step, config=toy.run.config.train, seed=0, stage=number)
    (batch,) = toy.run.encoder.micro_batches(rows, rows=len(rows))
    return batch


def gradient(toy: Lab, loss: Tensor) -> dict[str, Tensor]:
    tensors = trainable(toy.model)
    return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))


# --- the divergence -------------------------------------------------------------------------------------------------------


class Table(torch.nn.Module):
    """A head alone: what it is given are logits."""

    base_model_prefix = "layers"

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Identity()

    def forward(self, *, inputs_embeds: Tensor, **_: object) -> object:
        return type("Output", (), {"logits": inputs_embeds})


def check_divergence(monkeypatch: pytest.MonkeyPatch, temperature: float, size: int) -> None:
    monkeypatch.setattr(outputs, "causal_lm", lambda model: model)
    monkeypatch.setattr(outputs, "settings", lambda model: {"vocab_size": 3})
    monkeypatch.setattr(outputs, "SLICE", 3 * size)
    rng = torch.Generator().manual_seed(0)
    now = torch.randn(5, 3, generator=rng, requires_grad=True)
    before, weights = torch.randn(5, 3, generator=rng), torch.tensor([0.1, 0.0, 0.3, 0.2, 0.4])
    found = outputs.divergence(Table(), now, before, weights, reference=torch.no_grad, temperature=temperature)
    slope, expected = torch.autograd.grad(found, now)[0], 0.0
    for logits, reference, weight, row in zip(now.tolist(), before.tolist(), weights.tolist(), slope, strict=True):
        p, q = (distribution([value / temperature for value in values]) for values in (reference, logits))
        expected += weight * temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        # d KL / d z = (q - p) / T
        by_hand = [weight * temperature * (b - a) for a, b in zip(p, q, strict=True)]
        assert row.tolist() == pytest.approx(by_hand, abs=1e-6)
    assert float(found.detach()) == pytest.approx(expected, abs=1e-6)


def distribution(logits: list[float]) -> list[float]:
    whole = sum(math.exp(value) for value in logits)
    return [math.exp(value) / whole for value in logits]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("size", [1, 2, 9])
def test_the_divergence_is_that_of_the_model_from_the_reference_a_slice_at_a_time(monkeypatch, temperature, size):
    check_divergence(monkeypatch, temperature, size)


def test_the_other_direction_of_the_divergence_is_noticed(monkeypatch):
    kl = outputs.F.kl_div
    monkeypatch.setattr(outputs.F, "kl_div", lambda of, against, **how: kl(against, of, **how))
    with pytest.raises(AssertionError):
        check_divergence(monkeypatch, 1.0, 9)


# The program's own peak, in KiB: rusage's would begin at that of the tests, from whose process the program is started.
PEAK = """
import re, sys, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from clbench.models.outputs import divergence, states, untouched
from clbench.models.loss import causal_lm, pack
from clbench.types import Batch
V, T = 131072, 1024
model = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
ids = torch.randint(V, (1, T))
batch = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.full_like(ids, -100), weights=torch.ones(1), sources=torch.zeros(1), source_tokens=(T,))
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
if sys.argv[1] == "slices":
    with untouched(model):
        reference = states(model, pack(batch))
    now = states(model, pack(batch))
    divergence(model, now, reference, torch.full((T,), 1 / T), reference=lambda: untouched(model)).backward()
else:
    with untouched(model):
        reference = causal_lm(model)(input_ids=ids).logits.log_softmax(-1)
    now = causal_lm(model)(input_ids=ids).logits.log_softmax(-1)
    torch.nn.functional.kl_div(now, reference, reduction="sum", log_target=True).backward()
print((peak() - before) // 1024)
"""


@pytest.mark.slow
def test_at_128k_tokens_of_vocabulary_no_prompt_is_projected_as_a_whole():
    used = {
        how: int(subprocess.run([sys.executable, "-c", PEAK, how], capture_output=True, text=True, check=True).stdout)
        for how in ("slices", "whole")
    }
    print(f"peak memory of the divergence on 1,024 tokens, MiB: {used}")
    assert used["slices"] < 700 < 2000 < used["whole"], used  # one tensor of [1024, 131072] is 512 MiB


# --- kl_base and lwf --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kl_base", "lwf", "self_replay"])
def test_at_the_first_step_there_is_no_divergence(name):
    toy = lab(name, "method.strength=7")
    batch = batch_of(toy, 1)
    rows = torch.nonzero(batch.sources == 0)[:, 0]
    alone = rows_of(batch, rows)
    share = float((alone.weights * (alone.labels[:, 1:] != -100).sum(1)).sum())
    loss, plain = toy.method.loss(toy.model, batch), answer_loss(toy.model, alone) / share
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    found, expected = gradient(toy, loss), gradient(toy, plain)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("kl_base", "method.tokens=answers"),
        ("kl_base", "method.tokens=all"),
        ("lwf", "method.temperature=2"),
        ("self_replay", "method.form=kl"),
        ("self_replay", "method.form=ce"),
    ],
)
def test_the_gradient_is_that_of_the_loss_in_float64(name, key, monkeypatch):
    toy = lab(name, key, "method.strength=3", "method.lora.targets=all-linear", SAME_RATE, made=gpt2)
    toy.train(1)
    batch, rng = batch_of(toy, 2), torch.Generator().manual_seed(0)
    toy.model.double()
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # logits are float32 otherwise
    with torch.no_grad():
        for tensor in trainable(toy.model).values():  # away from where the stage began, from which lwf measures
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=rng, dtype=torch.float64))
    loss = toy.method.loss(toy.model, batch)
    found, plain = gradient(toy, loss), gradient(toy, answer_loss(toy.model, batch))
    assert loss.dtype == torch.float64
    for where, parameter in trainable(toy.model).items():
        direction = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        slope = central_difference(
            lambda: float(toy.method.loss(toy.model, batch).detach()), parameter, direction, width=1e-5
        )
        along, unheld = (float((slopes[where] * direction).sum()) for slopes in (found, plain))
        assert along == pytest.approx(slope, rel=1e-6, abs=1e-8) and abs(along - unheld) > 1e-4, where


def test_kl_base_adds_the_mean_divergence_of_answer_tokens_or_of_all():
    toy = lab("kl_base", "method.strength=2", SAME_RATE)
    toy.train(1)
    batch = batch_of(toy, 2)
    plain, kls, counts = float(answer_loss(toy.model, batch)), {"answers": 0.0, "all": 0.0}, {"answers": 0, "all": 0}
    for ids, mask, labels in zip(batch.input_ids, batch.attention_mask.bool(), batch.labels, strict=True):
        ids, labels = ids[mask][None], labels[mask]
        with torch.no_grad():
            now = toy.model(input_ids=ids).logits[0].double().log_softmax(-1)
            with toy.model.disable_adapter():
                base = toy.model(input_ids=ids).logits[0].double().log_softmax(-1)
        kl = (base.exp() * (base - now)).sum(-1)
        answers = torch.cat([labels[1:] != -100, torch.tensor([False])])
        for name, wanted in (("answers", answers), ("all", torch.ones_like(answers))):
            kls[name] += float(kl[wanted].sum())
            counts[name] += int(wanted.sum())
    for name, total in kls.items():
        toy.method.tokens = name
        found = float(toy.method.loss(toy.model, batch).detach())
        assert total > 1e-3 and found == pytest.approx(plain + 2 * total / counts[name], rel=1e-4), name


def test_lwf_at_temperature_1_is_kl_base_in_the_first_stage_and_not_in_the_second():
    weights = {}
    for name, more in (("lwf", ["method.temperature=1"]), ("kl_base", [])):
        toy = lab(name, "method.strength=1", SAME_RATE, *more)
        for number in (1, 2):
            toy.train(number)
            weights[name, number] = trainable_state(toy.model)
    apart = [
        max(
            float((weights["lwf", number][key] - value).abs().max())
            for key, value in weights["kl_base", number].items()
        )
        for number in (1, 2)
    ]
    assert apart[0] < 1e-5 < 1e-4 < apart[1], apart


def test_lwf_adds_the_softened_divergence_from_the_model_of_the_stage_before_times_the_square_of_the_temperature():
    toy = lab("lwf", "method.strength=3", "method.temperature=2", SAME_RATE)
    toy.train(1)

    def answers(batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits at each answer token's place, and the tokens."""
        rows = []
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask.bool(), batch.labels, strict=True):
            places = torch.nonzero(labels[mask][1:] != -100)[:, 0]
            with torch.no_grad():
                logits = toy.model(input_ids=ids[mask][None]).logits[0].double()
            rows.append((logits[places], labels[mask][places + 1]))
        return torch.cat([logits for logits, _ in rows]), torch.cat([tokens for _, tokens in rows])

    batch = batch_of(toy, 2)
    before, _ = answers(batch)
    with torch.no_grad():
        for tensor in trainable(toy.model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
    now, tokens = answers(batch)
    ce = -now.log_softmax(-1).gather(1, tokens[:, None]).mean()
    soft, softer = (before / 2).log_softmax(-1), (now / 2).log_softmax(-1)
    kl = (soft.exp() * (soft - softer)).sum(-1).mean()
    found = float(toy.method.loss(toy.model, batch).detach())
    assert kl > 1e-3 and found == pytest.approx(float(ce + 3 * 4 * kl), rel=1e-5)


# --- self_replay ------------------------------------------------------------------------------------------------------------


def test_the_model_writes_what_its_own_probabilities_say():
    model = llama(tokenizer()).eval()
    ids = outputs.written(model, rows=2000, length=2, draws=generator(0, "test"))
    assert ids.shape == (2000, 3) and set(ids[:, 0].tolist()) == {model.config.bos_token_id}
    with torch.no_grad():
        first = model(input_ids=ids[:1, :1]).logits[0, -1].softmax(-1)
        token = int(first.argmax())
        second = model(input_ids=torch.tensor([[int(ids[0, 0]), token]])).logits[0, -1].softmax(-1)
    followers = ids[ids[:, 1] == token, 2]
    for drawn, expected in ((ids[:, 1], first), (followers, second)):
        share = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
        assert ((share - expected).abs() < 4.5 * (expected * (1 - expected) / len(drawn)).sqrt() + 1e-3).all()


def test_replayed_rows_depend_on_the_seed_alone_and_survive_resuming():
    toy, again, other = lab("self_replay"), lab("self_replay", "train.lr=1e-4"), lab("self_replay", "seed=1")
    assert toy.method.replay == again.method.replay != other.method.replay
    other.method.load_state_dict(toy.method.state_dict())
    assert other.method.replay == toy.method.replay


@pytest.mark.parametrize("form", ["kl", "ce"])
def test_self_replay_adds_strength_times_the_mean_over_replayed_tokens(form):
    toy = lab("self_replay", f"method.form={form}", "method.strength=2", "method.rows=20", SAME_RATE)
    toy.train(1)
    batch = batch_of(toy, 2)
    ce, replay, tokens = 0.0, 0.0, [0, 0]
    for ids, mask, labels, source in zip(
        batch.input_ids, batch.attention_mask.bool(), batch.labels, batch.sources.tolist(), strict=True
    ):
        ids, labels = ids[mask][None], labels[mask]
        with torch.no_grad():
            now = toy.model(input_ids=ids).logits[0].double().log_softmax(-1)
            with toy.model.disable_adapter():
                base = toy.model(input_ids=ids).logits[0].double().log_softmax(-1)
        places = torch.nonzero(labels[1:] != -100)[:, 0]
        tokens[source] += len(places)
        own = -now[places, labels[places + 1]].sum()
        kl = (base.exp() * (base - now)).sum(-1)[places].sum()
        ce += float(own) if source == 0 else 0.0
        replay += float(kl if form == "kl" else own) if source else 0.0
    assert tokens[1] == (batch.sources == 1).sum() * toy.method.length
    found = float(toy.method.loss(toy.model, batch).detach())
    assert found == pytest.approx(ce / tokens[0] + 2 * replay / tokens[1], rel=1e-4)


def test_text_is_replayed_from_its_beginning_and_must_be_given():
    toy = lab("self_replay_text", "method.rows=5", "method.length=2")
    assert len(toy.method.replay) == 5 and all(len(row.answer.split()) == 2 for row in toy.method.replay)


# --- views of a shrunk update -----------------------------------------------------------------------------------------------


def test_all_of_the_update_is_seq_and_nothing_of_it_the_base():
    toy = lab("base_interpolation", "method.alphas=[1,0,0.5]", SAME_RATE)
    plain = lab("seq", SAME_RATE)
    base = plain.logits()
    for one in (toy, plain):
        one.train(1)
        one.train(2)
    assert same(trainable_state(toy.model), trainable_state(plain.model))
    expected = {"1": plain.logits(), "0": base}
    with folded(plain.model):
        whole = plain.logits()
    views = toy.method.views(toy.model)
    assert list(views) == ["1", "0", "0.5"]
    for name, view in views.items():
        with view:
            if name in expected:
                assert torch.equal(toy.logits(), expected[name])
            with folded(toy.model):
                assert torch.equal(toy.logits(), whole if name == "1" else base) == (name != "0.5")


def test_lines_scales_the_first_block_by_alpha_the_last_by_both_and_those_between_by_their_depth():
    with patch.dict(TINY, num_hidden_layers=5):
        toy = lab("lines", "method.scalings=[[0.25,0.5],[0,0]]", SAME_RATE)
    base = toy.logits()
    toy.train(1)
    updates = [pair.update(pair.live()) for pair in toy.method.pairs]
    scaled, nothing = toy.method.views(toy.model).values()
    with scaled:
        for pair, update in zip(toy.method.pairs, updates, strict=True):
            share = (0.25, 0.375, 0.5, 0.625, 0.75)[lines.block_of(pair.A)]
            torch.testing.assert_close(pair.update(pair.live()), share * update)
    with nothing:
        assert torch.equal(toy.logits(), base)
    assert toy.method.still() == ["0+0"] and lines.block_of("model.lm_head.weight") == 0


def test_shrinking_leaves_a_and_scales_b():
    toy = lab("base_interpolation")
    toy.train(1)
    pair = toy.method.pairs[0]
    factors = base_interpolation.shrunk([pair], [0.5])
    assert torch.equal(factors[pair.A], pair.live()[pair.A]) and torch.equal(factors[pair.B], 0.5 * pair.live()[pair.B])


# --- SLAO, A-GEM, OSF ---------------------------------------------------------------------------------------------------------


def test_slao_starts_with_orthonormal_rows_of_the_same_span():
    a = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = slao.orthonormal_rows(a)
    torch.testing.assert_close(rows @ rows.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(a @ rows.T @ rows, a)
    torch.testing.assert_close(slao.orthonormal_rows(2 * torch.eye(5)[:2]), torch.eye(5)[:2])


def test_slao_is_examined_with_the_last_a_and_the_average_of_b():
    toy = lab("slao", SAME_RATE)
    ends = []
    for number in (1, 2, 3):
        toy.train(number)
        ends.append({pair.B: pair.live()[pair.B].clone() for pair in toy.method.pairs})
    (view,) = toy.method.views(toy.model).values()
    a = {pair.A: pair.live()[pair.A].clone() for pair in toy.method.pairs}
    with view:
        for pair in toy.method.pairs:
            first, second, third = (end[pair.B] for end in ends)
            two = first + (second - first) / math.sqrt(2)
            torch.testing.assert_close(pair.live()[pair.B], two + (third - two) / math.sqrt(3))
            assert torch.equal(pair.live()[pair.A], a[pair.A])
    toy.method.begin_stage(toy.stage(3), toy.model)
    for pair in toy.method.pairs:
        assert torch.equal(pair.live()[pair.B], ends[-1][pair.B]), "training goes on from the last B"
        live = pair.live()[pair.A]
        torch.testing.assert_close(live @ live.T, torch.eye(len(live)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("g", "g_ref", "share"),
    [((1.0, 0.0), (-1.0, 1.0), -0.5), ((1.0, 0.0), (2.0, 1.0), 0.0), ((1.0, 1.0), (0.0, 0.0), 0.0)],
)
def test_agem_takes_what_opposes_the_memory_over_all_tensors_as_one_vector(g, g_ref, share):
    parts = [[torch.tensor([value]) for value in vector] for vector in (g, g_ref)]
    assert float(agem.share_along(*parts)) == share
    after = [a - share * b for a, b in zip(g, g_ref, strict=True)]
    if share:
        assert sum(a * b for a, b in zip(after, g_ref, strict=True)) == 0


def check_agem(toy: Lab, batch: Batch) -> tuple[float, float]:
    """<g, g_ref> before the projection, and after it, of a step whose gradient is checked against one that is worked out apart."""
    parts = []
    for source in (0, 1):
        rows = rows_of(batch, torch.nonzero(batch.sources == source)[:, 0])
        parts.append(gradient(toy, 2 * answer_loss(toy.model, rows)))
    g, g_ref = (torch.cat([value.flatten() for value in part.values()]).double() for part in parts)
    expected = g - min(0.0, float(g @ g_ref)) / float(g_ref @ g_ref) * g_ref
    _, engine = toy.open(2)
    engine.backward(toy.method.loss(toy.model, batch))
    toy.method.correct_gradients(engine)
    found = torch.cat([tensor.grad.flatten() for tensor in engine.tensors()]).double()
    engine.clear()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    return float(g @ g_ref), float(found @ g_ref)


def test_agem_projects_a_step_that_opposes_the_memory_and_no_other():
    toy = lab("agem", "method.fraction=1", "train.steps=10", "train.lr=1e-2")
    toy.train(1)
    learned = toy.stage(1).train[:4]

    def both(current: list[Example]) -> Batch:
        rows = [(row, source, 1.0) for source, part in enumerate((current, learned)) for row in part]
        (batch,) = toy.run.encoder.micro_batches(rows, rows=len(rows))
        return batch

    before, after = check_agem(toy, both(learned))
    assert before > 0.1 and after == pytest.approx(before, abs=1e-5)
    # What was learned is asked again, and now has another answer.
    before, after = check_agem(toy, both([replace(row, answer="w3") for row in learned]))
    assert before < -0.1 and after == pytest.approx(0, abs=1e-5)


def test_agem_refuses_settings_of_er_that_mean_nothing_to_it():
    for key in ("+method.weight=2", "+method.after=true"):
        with pytest.raises(InstantiationException, match="trains on no memory"):
            lab("agem", key)


def test_osf_keeps_gradients_out_of_the_frozen_directions_and_merges_what_it_trained():
    toy = lab("osf", "method.preserved=0.5", "train.lr=1e-2")
    starts = check_frozen(toy, 1)
    layers = {name: toy.model.get_submodule(name) for name in starts}
    outputs_before = toy.logits()
    toy.train(1)
    after = toy.logits()
    assert float((after - outputs_before).abs().max()) > 1e-3
    for name, layer in layers.items():
        merged = layer.get_base_layer().weight
        assert not torch.equal(merged, starts[name])
        assert float(layer.get_delta_weight("default").abs().max()) == 0, "the next task starts from an update of 0"
    fresh = lab("osf", "method.preserved=0.5", "train.lr=1e-2")
    fresh.method.load_state_dict(toy.method.state_dict())
    torch.testing.assert_close(fresh.logits(), after)
    check_frozen(toy, 2)  # the directions of the weights as they are now


def check_frozen(toy: Lab, number: int) -> dict[str, Tensor]:
    """The weight of each layer as it is before stage `number`, of which no gradient falls into the directions that are kept."""
    layers = {name: layer for name, layer in toy.model.named_modules() if isinstance(layer, OSFLayer)}
    weights = {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers.items()}
    toy.method.loss(toy.model, batch_of(toy, number)).backward()
    for name, layer in layers.items():
        u, _, vt = torch.linalg.svd(weights[name], full_matrices=False)
        k = min(weights[name].shape) // 2
        factors = layer.osf_svd_params["default"]
        assert float((u[:, :k].T @ factors["U_low"].grad).abs().max()) < 1e-5
        assert float((factors["V_low"].grad @ vt[:k].T).abs().max()) < 1e-5
    toy.model.zero_grad()
    return weights


@pytest.mark.parametrize("targets", ["all-linear", "[c_fc]"])
def test_osf_refuses_layers_that_peft_cannot_decompose(targets):
    with pytest.raises(UserMistake, match="method.targets|Conv1D"):
        lab("osf", f"method.targets={targets}", made=gpt2)


def test_general_text_is_replayed_from_the_first_stage_on():
    toy = lab("er_general", "method.texts.texts=6")
    (_, replay) = toy.method.training_set(toy.stage(1))
    assert [row.id for row in replay.examples] == [f"general/{number}" for number in range(6)]
    before = everything(toy.model)
    toy.train(1)
    (_, replay) = toy.method.training_set(toy.stage(2))
    assert len(replay.examples) == 8  # and a fifth of ten rows
    assert not same(everything(toy.model), before)
