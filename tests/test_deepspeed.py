"""Many processes give the numbers of one: the DeepSpeed engine beside the local one, two ranks, CPU, gloo, float32."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from clbench import launch
from clbench.cli import compose
from clbench.types import RankFailed, UserMistake
from tests import ranks
from tests.test_run import elsewhere, run, scores

ROOT = Path(__file__).resolve().parent.parent
STAGES = (0, 1, 2, 3)
TOLERANCE = 1e-6

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict]:
    """Everything that two ranks found, in one pair of processes: most of their time goes into starting."""
    path = tmp_path_factory.mktemp("ranks") / "outcomes.pt"
    wanted = [f"{case}:{stage}" for stage in STAGES for case in ("facts", "life", *ranks.CASES)]
    two_ranks([sys.executable, str(ROOT / "tests" / "ranks.py"), str(path), *wanted])
    return torch.load(path, weights_only=False)


def two_ranks(command: list[str]) -> None:
    port = str(launch.free_port())
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
def local(case: str) -> dict:
    return ranks.facts() if case == "facts" else ranks.outcome(case)


def distance(left: dict, right: dict) -> float:
    """The largest difference of two dictionaries of tensors and JSON values, which must agree but for rounding."""
    assert left.keys() == right.keys()
    tensors = [key for key in left if isinstance(left[key], Tensor)]
    assert all(near(left[key], right[key]) for key in left.keys() - set(tensors))
    return max((float((left[key].float() - right[key].float()).abs().max()) for key in tensors), default=0.0)


def near(left: object, right: object) -> bool:
    return left == (pytest.approx(right, rel=1e-5) if isinstance(right, float | list) else right)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", ranks.CASES)
def test_two_processes_train_the_weights_of_one(outcomes, case, stage):
    found, expected = outcomes[f"{case}:{stage}"], local(case)
    assert distance(found["weights"], expected["weights"]) < TOLERANCE
    assert distance(found["logits"], expected["logits"]) < 10 * TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", ranks.CASES)
def test_a_method_keeps_the_state_of_one_process_whole(outcomes, case, stage):
    found, expected = outcomes[f"{case}:{stage}"], local(case)
    assert found["drawn"] == expected["drawn"]
    assert distance(scaled(found["state"]), scaled(expected["state"])) < TOLERANCE


def scaled(state: dict) -> dict:
    """The Fisher information in units of its largest entry; centres weighted by it, as one of no importance is a quotient of roundings."""
    importance = {key.partition("/")[2]: state[key] for key in state if key.startswith("importance/")}
    largest = max((float(value.max()) for value in importance.values()), default=1.0)
    importance = {name: value / largest for name, value in importance.items()}
    weighted = {f"centre/{name}": state[f"centre/{name}"] * value for name, value in importance.items()}
    return state | weighted | {f"importance/{name}": value for name, value in importance.items()}


ANSWERS = (
    "gradient",
    "gradient by matrices",
    "gradient again",
    "gradient after shards",
    "gradient after matrices",
    "value after shards",
    "value after matrices",
    "value after step",
    "closed",
)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_every_stage_answers_as_one_process_does(outcomes, answer, stage):
    found, expected = outcomes[f"facts:{stage}"], local("facts")
    assert max(float(value.abs().max()) for value in expected[answer].values()) > 1e-3
    assert distance(found[answer], expected[answer]) < TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_written_to_weights_is_in_the_next_forward(outcomes, stage):
    found, expected = outcomes[f"facts:{stage}"], local("facts")
    for answer in ("loss after shards", "loss after matrices"):
        assert found[answer] == pytest.approx(expected[answer], abs=TOLERANCE)
    assert abs(expected["loss after shards"] - expected["loss after matrices"]) > 1e-2


@pytest.mark.parametrize("stage", STAGES)
def test_every_entry_has_one_owner(outcomes, stage):
    assert outcomes[f"facts:{stage}"]["entries"] == local("facts")["entries"]


@pytest.mark.parametrize("stage", STAGES)
def test_only_stage_3_empties_parameters_outside_forwards(outcomes, stage):
    whole = local("facts")["outside a forward"]
    assert outcomes[f"facts:{stage}"]["outside a forward"] == (0 if stage == 3 else whole)


@pytest.mark.parametrize("stage", STAGES)
def test_a_closed_engine_leaves_nothing_on_the_model(outcomes, stage):
    assert outcomes[f"facts:{stage}"]["left behind"] == []
    assert outcomes[f"facts:{stage}"]["linear"]


@pytest.mark.parametrize("stage", STAGES)
def test_sixteen_engines_take_no_more_memory_than_two(outcomes, stage):
    resident = outcomes[f"life:{stage}"]["resident"]
    assert resident[-1] <= 1.05 * resident[1]


# --- whole runs -----------------------------------------------------------------------------------------------------------


def two(stage: int = 2) -> list[str]:
    return ["engine=deepspeed", "engine.processes=2", f"engine.zero_stage={stage}"]


def test_a_run_of_two_processes_has_the_scores_of_one(overrides, tmp_path):
    alone = run(elsewhere(overrides, tmp_path, "alone"), "method=ewc")
    config = compose([*elsewhere(overrides, tmp_path, "two"), "method=ewc", *two()])
    together = launch.launch(config, command="")
    assert together.name == alone.name
    assert (together / "status").read_text() == "complete\n"
    for left, right in zip(scores(together), scores(alone), strict=True):
        assert left.pop("value") == pytest.approx(right.pop("value"), rel=1e-5, abs=1e-6)
        left.pop("stderr"), right.pop("stderr")
        assert left == right


def test_a_run_resumes_with_other_processes_and_another_stage(overrides, tmp_path, monkeypatch):
    from clbench.ledger import Ledger

    whole = run(elsewhere(overrides, tmp_path, "whole"), "method=ewc")
    parted = elsewhere(overrides, tmp_path, "parted")

    class Killed(BaseException):
        pass

    def killed(self, rows):
        rows = list(rows)
        if rows[0].stage == 2:
            raise Killed
        append(self, rows)

    append = Ledger.append
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", killed)
        with pytest.raises(Killed):
            run(parted, "method=ewc")
    path = launch.launch(compose([*parted, "method=ewc", *two(3), "resume=must"]), command="")
    for left, right in zip(scores(path), scores(whole), strict=True):
        assert left["value"] == pytest.approx(right["value"], rel=1e-5, abs=1e-6)


def test_a_killed_rank_ends_the_run_and_resume_continues_it(overrides, tmp_path):
    places = [*overrides, *two(), "train.steps=60"]
    command = [sys.executable, "-m", "clbench", *places]
    parent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    ledgers = tmp_path / "results" / "runs"
    wait_for(lambda: any('"stage": 1,' in path.read_text() for path in ledgers.glob("*/scores.jsonl")), parent)
    children = psutil.Process(parent.pid).children(recursive=True)
    victim = next(child for child in children if child.environ().get("RANK") == "1")
    killed = time.monotonic()
    victim.kill()
    error = parent.communicate(timeout=30)[1]
    assert time.monotonic() - killed < 30
    assert parent.returncode == 1
    assert error.count("rank 1 was killed by signal 9 (SIGKILL)") == 1 and "Traceback" not in error
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    (path,) = ledgers.glob("*/status")
    assert path.read_text() == "interrupted\n"
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300).returncode == 0
    assert path.read_text() == "complete\n"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_its_parent(overrides, tmp_path, how):
    command = [sys.executable, "-m", "clbench", *overrides, *two(), "train.steps=1000"]
    parent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    ledgers = tmp_path / "results" / "runs"
    wait_for(lambda: any('"stage": 0,' in path.read_text() for path in ledgers.glob("*/scores.jsonl")), parent)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len([child for child in children if "RANK" in child.environ()]) == 2
    parent.send_signal(how)
    assert parent.wait(30) != 0
    assert not psutil.wait_procs(children, timeout=10)[1]
    if how == signal.SIGTERM:
        (path,) = ledgers.glob("*/status")
        assert path.read_text() == "interrupted\n"


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_the_error_of_the_first_rank_is_told_once(overrides, tmp_path):
    broken = [*overrides, *two(), "train.lr=1e30", "train.clip=0", "train.schedule=constant", "train.warmup=0"]
    with pytest.raises(RankFailed, match="loss is (nan|inf)") as told:
        launch.launch(compose(broken), command="")
    assert str(told.value).count("Traceback") == 1


def test_a_users_mistake_in_a_rank_is_one_line(overrides):
    with pytest.raises(UserMistake, match="resume=must"):
        launch.launch(compose([*overrides, *two(), "resume=must"]), command="")


@pytest.mark.parametrize("key", ["gradient_clipping=1", "bf16.enabled=true", "zero_optimization.stage=3"])
def test_a_key_that_clbench_sets_is_refused(overrides, key):
    with pytest.raises(UserMistake, match="is set by clbench"):
        compose([*overrides, *two(), f"+engine.deepspeed.{key}"])


def test_the_wrong_number_of_processes_is_refused(overrides):
    command = [sys.executable, "-m", "clbench", *overrides, *two()]
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 2 and "engine.processes=2, but 3 processes" in answer.stderr


def test_joining_ranks_started_by_another_launcher(overrides, tmp_path):
    two_ranks([sys.executable, "-m", "clbench", *overrides, *two(1)])
    (path,) = (tmp_path / "results" / "runs").glob("*/status")
    assert path.read_text() == "complete\n"
    assert len(json.loads((path.parent / "manifest.json").read_text())["tasks"]) == 3
