"""What many processes can do besides giving the numbers of one: two ranks, CPU, gloo."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from clbench.cli import take_part
from clbench.config.composition import compose
from clbench.train.launch import launch
from clbench.train.ranks import Ranks
from tests import feature_ranks
from tests.test_deepspeed import ANSWERS, STAGES, TOLERANCE, distance, scaled
from tests.test_run import elsewhere, run, scores

RESUMED = ("ilora", "secura", "lwf", "self_replay")
OFFLOADED = ("1:engine.offload=optimizer", "3:engine.offload=optimizer", "3:engine.offload=all")
PLACED = (
    "1:ewc:engine.offload=optimizer",
    "2:clora:engine.offload=optimizer",
    "3:ewc:engine.offload=optimizer",
    "3:clora:engine.offload=all",
    "2:ilora:engine.activation_checkpointing=true",
    "3:ilora:engine.activation_checkpointing=true",
)
HALF = ("0:seq", "1:seq", "2:secura", "2:seq_full", "3:seq", "3:secura")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("features")


def runs(case: str, zero_stage: int, where: str, folder: Path) -> Path:
    path = folder / f"{where}-{case}-{zero_stage}"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="module")
def outcomes(folder) -> dict[str, dict]:
    """Everything that two ranks found, in one pair of processes: most of their time goes into starting."""
    for case in RESUMED:
        for zero_stage in STAGES:
            feature_ranks.stage(case, runs(case, zero_stage, "local", folder), joined=Ranks(), killed=True)
    wanted = [f"carried:{zero_stage}" for zero_stage in STAGES]
    for case in RESUMED:
        for zero_stage in STAGES:
            wanted.append(f"kill:{zero_stage}:{case}:{runs(case, zero_stage, 'ranks', folder)}")
            wanted.append(f"go on:{zero_stage}:{case}:{runs(case, zero_stage, 'local', folder)}")
    wanted += [f"facts:{where}" for where in OFFLOADED]
    wanted += [f"float32:{place}" for place in PLACED]
    wanted += [f"bfloat16:{place}" for place in HALF]
    two_ranks([sys.executable, feature_ranks.__file__, str(folder / "outcomes.pt"), *wanted])
    return torch.load(folder / "outcomes.pt", weights_only=False)


def two_ranks(command: list[str]) -> None:
    port = str(get_free_port())
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)[-4000:]


@cache
def whole(case: str, folder: Path) -> dict:
    path = folder / f"whole-{case}"
    path.mkdir()
    return feature_ranks.stage(case, path, joined=Ranks(), killed=False)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_carried_moments_are_those_of_one_process(outcomes, zero_stage):
    found, expected = outcomes[f"carried:{zero_stage}"], local_carried()
    assert distance(found["weights"], expected["weights"]) < TOLERANCE
    for key in ("once", "moments"):
        assert distance(found[key], expected[key]) < TOLERANCE
    counts = {float(value) for key, value in found["moments"].items() if key.startswith("step/")}
    assert counts == {15.0, 5.0}


@cache
def local_carried() -> dict:
    return feature_ranks.carried()


@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("case", RESUMED)
def test_a_stage_killed_on_one_process_goes_on_on_two(outcomes, folder, case, zero_stage):
    check_same(outcomes[f"go on:{zero_stage}:{case}"], whole(case, folder))


@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("case", RESUMED)
def test_a_stage_killed_on_two_processes_goes_on_on_one(outcomes, folder, case, zero_stage):
    path = runs(case, zero_stage, "ranks", folder)
    check_same(feature_ranks.stage(case, path, joined=Ranks(), killed=False), whole(case, folder))


def check_same(found: dict, expected: dict) -> None:
    assert found["reached"] == feature_ranks.KILLED_AFTER
    for key in ("weights", "moments"):
        assert distance(found[key], expected[key]) < TOLERANCE
    assert distance(scaled(found["state"]), scaled(expected["state"])) < TOLERANCE


def test_ranks_share_the_probes_of_every_view_and_score_as_one_does(overrides, tmp_path):
    """The largest difference of a score is printed; -s shows it."""
    more = ("method=ilora", "method.fraction=0.5", "probe=world")
    alone = run(elsewhere(overrides, tmp_path, "alone"), *more)
    places = [*elsewhere(overrides, tmp_path, "two"), *more]
    together = launch(take_part, compose([*places, "engine=deepspeed", "engine.zero_stage=3"]), command="")
    apart = []
    for left, right in zip(scores(together), scores(alone), strict=True):
        apart.append(abs(left["value"] - right["value"]) / max(1.0, abs(right["value"])))
        assert {**left, "value": 0, "stderr": 0} == {**right, "value": 0, "stderr": 0}
    print(f"largest relative difference of {len(apart)} scores: {max(apart):.1e}")
    assert max(apart) < 1e-5
    for path in sorted((alone / "items").iterdir()):
        with np.load(path) as expected, np.load(together / "items" / path.name) as found:
            assert expected.files == found.files
            for key in expected.files:
                np.testing.assert_allclose(found[key], expected[key], rtol=1e-5, atol=1e-5)
    left, right = (
        [json.loads(line)["tokens_scored"] for line in (path / "cost.jsonl").read_text().splitlines()]
        for path in (together, alone)
    )
    assert left == pytest.approx(right, rel=0.02)


# --- where things lie, and in which precision ---------------------------------------------------------------------------


@pytest.mark.parametrize("where", OFFLOADED)
def test_an_offloaded_engine_answers_as_one_process_does(outcomes, where):
    found = outcomes[f"facts:{where}"]
    for answer in ANSWERS:
        assert distance(found[answer], local_facts()[answer]) < TOLERANCE, answer
    assert found["left behind"] == [] and found["linear"]


@cache
def local_facts() -> dict:
    return feature_ranks.ranks.facts()


@pytest.mark.parametrize("place", PLACED)
def test_offloading_and_computing_layers_again_change_no_weight(outcomes, place):
    expected = local_trained(place.split(":")[1])
    assert distance(outcomes[f"float32:{place}"]["weights"], expected["weights"]) < TOLERANCE


@cache
def local_trained(case: str, dtype: torch.dtype = torch.float32) -> dict:
    return feature_ranks.trained(case, dtype=dtype)


@pytest.mark.parametrize("place", HALF)
def test_a_bfloat16_base_trains_float32_adapters_as_on_one_process(outcomes, place):
    """Stage 3 multiplies in its own function, so roundings to bfloat16 differ there. The difference is printed; -s shows it."""
    zero_stage, case = place.split(":")
    found, expected = outcomes[f"bfloat16:{place}"], local_trained(case, torch.bfloat16)
    before = feature_ranks.methods.everything(feature_ranks.lab(case, dtype=torch.bfloat16).model)
    trains = [name for name, value in expected["weights"].items() if not torch.equal(value, before[name])]
    moved, apart = (
        sum(float((expected["weights"][name].float() - other[name].float()).norm() ** 2) for name in trains) ** 0.5
        for other in (before, found["weights"])
    )
    print(f"{case}, ZeRO {zero_stage}: moved {moved:.3g}, apart {apart:.3g}")
    assert apart < (0.02 if zero_stage == "3" else 1e-5) * moved
    for name, value in expected["weights"].items():
        assert found["weights"][name].dtype == value.dtype
        assert name in trains or torch.equal(found["weights"][name], value)
