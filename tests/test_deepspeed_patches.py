"""What DeepSpeed 0.19.8 does without `clbench.train.deepspeed_patches`: a test that fails here says that a patch can go.

One rank in this process, CPU, gloo, and for what takes padding two ranks of tests/ranks.py.
"""

import importlib
from collections.abc import Iterator

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.utils import safe_get_full_grad, safe_get_full_optimizer_state, safe_set_full_grad
from torch import nn
from torch.distributed.elastic.utils.distributed import get_free_port

from clbench.train.launch import join, leave
from clbench.train.ranks import Ranks
from clbench.train.zero import deepspeed_settings
from tests.test_deepspeed import Pair, two

pytestmark = pytest.mark.slow
TORCHS = torch._C._nn.linear


@pytest.fixture(autouse=True)
def alone(monkeypatch) -> Iterator[Ranks]:
    """The only rank of its kind."""
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    for name, value in (names | {"MASTER_PORT": str(get_free_port())}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.nn.functional, "linear", TORCHS)
    yield join()
    leave()


def opened(model: nn.Module, *, zero_stage: int, offload: str = "none", clip: float = 0.0) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine as it is."""
    config = deepspeed_settings(zero_stage=zero_stage, clip=clip, bucket=100, offload=offload)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def backward(engine: deepspeed.DeepSpeedEngine) -> None:
    """The gradient of the sum of outputs for ones: 1 for every weight."""
    with engine.coalesce_grad_reduction():
        engine.backward(engine.module(torch.ones(1, 4)).sum())


def linear() -> nn.Linear:
    return nn.Linear(4, 3, bias=False)


def test_a_first_engine_on_a_cpu_still_compiles_what_only_inference_uses(monkeypatch):
    asked: list[int] = []
    leave()
    monkeypatch.setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: asked.append(1))
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    assert asked == [1]


def test_stage_3_still_replaces_torchs_linear_for_good():
    opened(nn.Sequential(linear()), zero_stage=3).destroy()
    assert torch.nn.functional.linear is zero3_linear_wrap


def test_stage_3_still_leaves_torchs_linear_where_weights_are_slices_already(monkeypatch):
    with deepspeed.zero.Init(
        config_dict_or_path=deepspeed_settings(zero_stage=3, clip=0.0, bucket=100, offload="none")
    ):
        model = nn.Sequential(linear())
    monkeypatch.setattr(torch.nn.functional, "linear", TORCHS)
    opened(model, zero_stage=3)
    assert torch.nn.functional.linear is TORCHS


@pytest.mark.parametrize(("function", "kept"), [(TORCHS, 1), (zero3_linear_wrap, 0)])
def test_torchs_linear_still_keeps_gathered_weights_for_the_backward_pass(monkeypatch, function, kept):
    model = nn.Sequential(linear())
    engine = opened(model, zero_stage=3)
    monkeypatch.setattr(torch.nn.functional, "linear", function)
    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        engine.module(torch.ones(1, 2, 4, requires_grad=True))
    # The parameter itself is empty by now; a view of it is not.
    assert sum(tensor.shape in ((3, 4), (4, 3)) for tensor in held) == kept


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_destroyed_engine_still_leaves_its_own_on_the_model(zero_stage):
    model = nn.Sequential(linear())
    before = {part: set(vars(part)) for part in (*model.modules(), *model.parameters())}
    parameter_offload.FWD_MODULE_STACK.clear()
    opened(model, zero_stage=zero_stage).destroy()
    left = {name for part, known in before.items() for name in vars(part).keys() - known}
    if zero_stage < 3:
        assert "get_full_hp_param" in left
    else:
        assert {"pre_bwd_fn", "post_bwd_fn", "ds_tensor"} <= left
        assert type(model[0]._parameters) is not dict and model in parameter_offload.FWD_MODULE_STACK


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_offloaded_gradients_still_come_back_after_they_were_cleared(zero_stage):
    engine = opened(linear(), zero_stage=zero_stage, offload="optimizer")
    for _ in range(3):
        engine.optimizer.zero_grad()
        backward(engine)
    assert torch.equal(safe_get_full_grad(engine.module.weight), torch.full((3, 4), 2.0))


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_offloaded_gradients_are_still_clipped_by_the_norm_that_they_had_before_an_edit(zero_stage):
    engine = opened(linear(), zero_stage=zero_stage, offload="optimizer", clip=1.0)
    backward(engine)
    safe_set_full_grad(engine.module.weight, torch.full((3, 4), 10.0))
    assert float(engine.optimizer.scaled_global_norm()) == pytest.approx(12**0.5)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_moments_can_still_be_read_only_after_a_first_step(zero_stage):
    engine = opened(linear(), zero_stage=zero_stage)
    with pytest.raises((KeyError, TypeError, ValueError)):
        safe_get_full_optimizer_state(engine.module.weight, "exp_avg")
    backward(engine)
    engine.step()
    assert safe_get_full_optimizer_state(engine.module.weight, "exp_avg").shape == (3, 4)


def test_stage_3_still_cannot_write_a_whole_tensor_whose_parts_are_uneven(tmp_path):
    pair = Pair(tmp_path)
    assert "exceeds dimension size" in pair.ask("uneven", *two(3))["error"]
    pair.end()
