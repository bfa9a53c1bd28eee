"""The project's own functions against numbers that an independent implementation worked out.

The file is tests/golden/methods.json, or the one that CLBENCH_GOLDEN names: other seeds and shapes must pass as well.
"""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from baselines import clora, curlora, ewc, ilora, secura
from clbench.data.encoder import Encoder
from clbench.examine.text import likelihood
from clbench.models import cur
from clbench.models.tiny import word_tokenizer
from clbench.protocols import Stage
from clbench.report import metrics
from clbench.train.local import LocalEngine
from clbench.types import Example

HERE = Path(__file__).parent / "golden" / "methods.json"
DOUBLE = {"rel": 1e-6, "abs": 1e-12, "nan_ok": True}


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(value: torch.Tensor, expected: Any) -> bool:
    torch.testing.assert_close(value.double(), tensor(expected), rtol=1e-6, atol=1e-9)
    return True


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(Path(os.environ.get("CLBENCH_GOLDEN", HERE)).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("average_accuracy", metrics.average_accuracy),
        ("learning_accuracy", metrics.learning_accuracy),
        ("bwt", metrics.bwt),
        ("forgetting", metrics.forgetting),
        ("fwt", metrics.fwt),
    ],
)
def test_matrix_metrics_equal_the_golden_numbers(golden, name, function):
    block = golden["metrics"]["matrix"]
    expected = block["expect"][name]
    found = function(np.array(block["R"], dtype=np.float64))
    assert found == pytest.approx(np.nan if expected is None else expected, **DOUBLE)


def test_every_expected_matrix_number_is_checked(golden):
    expected = set(golden["metrics"]["matrix"]["expect"])
    assert expected == {"average_accuracy", "learning_accuracy", "bwt", "forgetting", "fwt"}


def test_retention_equals_the_golden_numbers(golden):
    block, expect = golden["metrics"]["retention"], golden["metrics"]["retention"]["expect"]
    names = [str(index) for index in range(len(block["before"]))]
    chance = {name: 1 / choices for name, choices in zip(names, block["n_choices"], strict=True)}
    record = metrics.retention(
        dict(zip(names, block["before"], strict=True)),
        after=dict(zip(names, block["after"], strict=True)),
        floor=chance,
        chance=chance,
    )
    assert record.retention == pytest.approx(expect["retention"], **DOUBLE)
    for field, key in (
        ("retention", "per_probe"),
        *((key, key) for key in ("delta", "lost", "gained", "stderr_paired")),
    ):
        got = [getattr(probe, field) for probe in record.probes]
        assert got == pytest.approx([np.nan if value is None else value for value in expect[key]], **DOUBLE), key


def test_perplexity_equals_the_golden_numbers(golden):
    block = golden["metrics"]["perplexity"]
    expect, before, after = block["expect"], block["nll_nats_before"], block["nll_nats_after"]
    ratio = metrics.perplexity_ratio(before, after, count=block["n_words"])
    assert ratio == pytest.approx(expect["word_ppl_ratio"], **DOUBLE)
    text = ["x" * block["n_bytes"]]
    bits_before, bits_after = (likelihood([nats], text, tokens=1)["bits_per_byte"].value for nats in (before, after))
    assert bits_before == pytest.approx(expect["bits_per_byte_before"], **DOUBLE)
    assert bits_after - bits_before == pytest.approx(expect["bits_per_byte_drift"], **DOUBLE)


def test_fisher_of_a_softmax_regression_is_the_mean_of_squared_example_gradients(golden):
    block = golden["ewc"]["softmax_regression"]
    inputs, targets = tensor(block["X"]), torch.tensor(block["y"])
    model = torch.nn.Linear(inputs.shape[1], len(block["W"]), bias=False, dtype=torch.float64)
    model.weight.data.copy_(tensor(block["W"]))
    engine = LocalEngine(model, optimizer=None, schedule=None, clip=0.0)
    losses = [partial(lambda x, y: F.cross_entropy(model(x), y), x, y) for x, y in zip(inputs, targets, strict=True)]
    fisher = ewc.squared_gradients(engine, losses)["weight"]
    assert close(fisher, block["expect"]["empirical_fisher_diag"])


def test_ewc_penalties_of_several_tasks_are_one_quadratic(golden):
    block, expect = golden["ewc"]["penalty"], golden["ewc"]["penalty"]["expect"]
    fishers, anchors, theta = tensor(block["fisher"]), tensor(block["anchors"]), tensor(block["theta"])
    importance, centre, excess = fishers[0], anchors[0], 0.0
    for fisher, anchor in zip(fishers[1:], anchors[1:], strict=True):
        importance, centre, more = ewc.combine(importance, centre, fisher, anchor)
        excess += float(more)
    assert close(importance, expect["fisher_sum"])
    assert close(centre, expect["centre"])
    assert close(ewc.penalty_gradient(theta, importance, centre, block["strength"]), expect["grad"])
    value = float(ewc.penalty_value(theta, importance, centre, block["strength"])) + 0.5 * block["strength"] * excess
    assert value == pytest.approx(expect["value_separate"], rel=1e-6)


def linear(weight: Any) -> torch.nn.Linear:
    layer = torch.nn.Linear(len(weight[0]), len(weight), bias=False, dtype=torch.float64)
    layer.weight.data.copy_(tensor(weight))
    return layer


@pytest.mark.parametrize("select", ["paper", "code_eps"])
def test_curlora_draws_with_the_golden_probabilities(golden, select):
    weight, expect = tensor(golden["curlora"]["W"]), golden["curlora"]["expect"]
    offset = curlora.OFFSETS[select]
    assert close(cur.column_probabilities(weight, offset=offset), expect[f"column_probabilities_{select}"])
    assert close(cur.column_probabilities(weight.t(), offset=offset), expect[f"row_probabilities_{select}"])


def test_a_curlora_layer_has_the_golden_update_outputs_and_gradient(golden):
    block, expect = golden["curlora"], golden["curlora"]["expect"]
    base = linear(block["W"])
    layer = cur.CurLinear(
        base,
        columns=torch.tensor(block["cols"]),
        rows=torch.tensor(block["rows"]),
        core=cur.SquareCore(rank=block["rank"], like=base.weight),
        scale=block["alpha"],
    )
    layer.core.U.data.copy_(tensor(block["U"]))
    outputs = layer(tensor(block["x"]))
    (outputs * tensor(block["upstream"])).sum().backward()
    assert close(outputs, expect["y"])
    assert close(layer.effective_weight(layer.core()) - layer.weight, expect["delta_weight"])
    assert close(layer.core.U.grad, expect["grad_U"])
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == expect["trainable"]


def secura_layer(block: dict[str, Any], magnorm: str) -> cur.CurLinear:
    method = secura.Secura(
        targets=[],
        rank=block["rank"],
        inner=block["inner"],
        magnorm=magnorm,
        quantile=block["quantile"],
        kappa=block["kappa"],
        merge="m1",
        fusion_step=None,
        train_bias=False,
    )
    return method.layer(linear(block["W"]), rank=block["rank"], inner=block["inner"])


def test_a_secura_layer_is_made_as_the_golden_one(golden):
    block, expect = golden["secura"], golden["secura"]["expect"]
    layer = secura_layer(block, "weight_id")
    assert layer.columns.tolist() == expect["cols"]
    assert layer.rows.tolist() == expect["rows"]
    assert close(layer.core.A, expect["A_init"])
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == expect["trainable"]


@pytest.mark.parametrize("magnorm", ["weight_id", "weight_comment", "output_release", "none"])
def test_a_secura_layer_has_the_golden_restraint_and_outputs(golden, magnorm):
    block, expect = golden["secura"], golden["secura"]["expect"]
    layer, x = secura_layer(block, magnorm), tensor(block["x"])
    layer.core.A.data.copy_(tensor(block["A"]))
    layer.core.B.data.copy_(tensor(block["B"]))
    delta = cur.cur_delta(layer.C, layer.core(), layer.R)
    outputs, effective = layer(x), layer.effective_weight(layer.core())
    if magnorm == "none":
        assert close(effective - layer.weight, expect["delta_weight"])
    elif magnorm == "output_release":
        assert close(outputs, expect["y_output_release"])
    else:
        assert close(layer.divisor(layer.weight, delta), expect[f"S_{magnorm}"])
        assert close(effective, expect[f"effective_{magnorm}"])
        assert close(x @ effective.t(), outputs.tolist())
    if magnorm == "weight_id":
        assert close(outputs, expect["y_id"])


def test_cloras_penalty_and_its_gradient_equal_the_golden_numbers(golden):
    block = golden["clora"]
    a, b, p_v, p_u = (tensor(block[key]) for key in ("A", "B", "P_v", "P_u"))
    strength, expect = block["strength"], block["expect"]
    assert close(clora.penalty(a, p_v) + clora.penalty(b.T, p_u), expect["penalty"])
    assert close(strength * clora.penalty_gradient(a, p_v), expect["grad_A"])
    assert close(strength * clora.penalty_gradient(b.T, p_u).T, expect["grad_B"])


def test_iloras_moving_average_equals_the_golden_one(golden):
    block = golden["ilora"]["ema"]
    fast = tensor(block["fast"])
    slow = fast[0]
    for step in fast[1:]:
        slow = ilora.ema(slow, step, block["decay"])
    assert close(slow, block["expect"]["slow"])


def test_iloras_consistency_equals_the_golden_one(golden):
    block = golden["ilora"]["consistency"]
    hidden_fast, hidden_slow = tensor(block["hidden_fast"]), tensor(block["hidden_slow"])
    mse = ilora.consistency(list(hidden_fast), list(hidden_slow), torch.tensor(block["attention_mask"]))
    assert close(mse, block["expect"]["mse"])


def test_iloras_loss_weighs_current_task_and_memory_alike(golden):
    block = golden["ilora"]["loss"]
    method = ilora.Ilora(
        lora=None,
        seed=0,
        decay=0.9,
        warm_up=True,
        consistency=block["weight"],
        all_layers=True,
        one_sided=False,
        fraction=0.5,
        capacity=None,
        ratio=1.0,
    )
    example = Example(id="x", prompt="a", answer="a a")
    method.memory.examples.append(example)
    encoder = Encoder(word_tokenizer(["a"]), max_length=8)
    stage = Stage(index=2, name="x", task=None, train=(example,), test=(), collate=encoder.collate, whole_stream=())
    sources = method.training_set(stage)
    (batch,) = encoder.micro_batches([(example, index, source.weight) for index, source in enumerate(sources)], rows=2)
    answer_tokens = 3  # two words and EOS
    cross_entropy = (tensor([block["current"], block["memory"]]) * batch.weights * answer_tokens).sum()
    assert close(ilora.total_loss(cross_entropy, block["consistency"], block["weight"]), block["expect"]["total"])
