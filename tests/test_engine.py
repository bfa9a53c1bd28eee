"""The engine of one process: what the optimizer carries from stage to stage, and checkpoints within a stage."""

import copy
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from clbench import experiment
from clbench.config import TrainConfig, run_hash
from clbench.config.composition import compose
from clbench.examine.student import Student
from clbench.examine.text import read_windows
from clbench.models.loss import causal_lm
from clbench.models.weights import trainable
from clbench.record import ledger
from clbench.record.ledger import Checkpoint, Ledger
from clbench.train import loop as train
from clbench.train import optimizer as optim
from clbench.train.local import LocalEngine
from clbench.train.ranks import Ranks, dealt
from clbench.types import UserMistake
from tests import test_methods as methods
from tests.test_run import elsewhere, run, scores

SAME = {"run": "toy", "data": {}, "probe_data": {}, "model_fingerprint": ""}
CONSTANT = TrainConfig(steps=1, lr=0.1, schedule="constant", warmup=0.0, weight_decay=0.1, clip=0.5)


class Killed(BaseException):
    """Stands in for a kill: nothing in the code under test may catch it."""


# --- the optimizer's state from stage to stage --------------------------------------------------------------------------


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def engine(
    model: nn.Module, *, moments: dict | None = None, steps: int = 4, config: TrainConfig = CONSTANT
) -> LocalEngine:
    named = trainable(model)
    optimizer = optim.optimizer(named, config, moments or {})
    schedule = optim.schedule(optimizer, config, steps=steps)
    return LocalEngine(model, optimizer=optimizer, schedule=schedule, clip=config.clip, moments=moments)


def steps(opened: LocalEngine, numbers: range) -> None:
    for number in numbers:
        opened.backward(opened.model(torch.full((1, 3), 1.0 + number)).square().sum())
        opened.step()


def test_carried_moments_make_two_stages_one():
    whole, parted, fresh = linear(), linear(), linear()
    steps(engine(whole), range(4))
    first = engine(parted)
    steps(first, range(2))
    moments = first.moments()
    assert float(moments["step/weight"]) == 2 and moments["exp_avg/bias"].shape == (2,)
    steps(engine(parted, moments=moments), range(2, 4))
    assert all(torch.equal(left, right) for left, right in zip(whole.parameters(), parted.parameters(), strict=True))
    steps(engine(fresh), range(2))
    steps(engine(fresh), range(2, 4))
    assert (fresh.weight - whole.weight).abs().max() > 1e-3


def test_a_step_with_a_carried_count_is_adams():
    model = linear()
    config = TrainConfig(steps=1, lr=0.1, schedule="constant", warmup=0.0, clip=0.0)
    moments = {"step/bias": torch.tensor(3.0), "exp_avg/bias": torch.ones(2), "exp_avg_sq/bias": torch.full((2,), 4.0)}
    opened = engine(model, moments=moments, config=config)
    before = model.bias.detach().clone()
    model.weight.grad, model.bias.grad = torch.zeros(2, 3), torch.full((2,), 2.0)
    opened.step()
    # Fourth step: m = .9 * 1 + .1 * 2 = 1.1, v = .999 * 4 + .001 * 4 = 4; corrected m / (1 - .9^4), v / (1 - .999^4).
    expected = 0.1 * (1.1 / (1 - 0.9**4)) / (4 / (1 - 0.999**4)) ** 0.5
    torch.testing.assert_close(before - model.bias.detach(), torch.full((2,), expected))


def test_a_tensor_that_is_new_or_has_another_shape_starts_afresh_and_this_is_said(caplog):
    moments = {
        f"{key}/{name}": torch.ones(3) for key in ("step", "exp_avg", "exp_avg_sq") for name in ("a", "b", "gone")
    }
    named = {"a": nn.Parameter(torch.ones(3)), "b": nn.Parameter(torch.ones(4)), "c": nn.Parameter(torch.ones(3))}
    with caplog.at_level(logging.WARNING):
        kept = optim.fitting(moments, named)
    assert kept.keys() == {"step/a", "exp_avg/a", "exp_avg_sq/a"}
    assert "b and 1 more" in caplog.text and "start afresh" in caplog.text
    caplog.clear()
    assert optim.fitting({}, named) == {} and not caplog.text


def test_tensors_of_different_step_counts_are_different_groups():
    named = {name: nn.Parameter(torch.ones(2)) for name in "abc"}
    groups = optim.optimizer(named, CONSTANT, {"step/a": torch.tensor(5.0), "step/c": torch.tensor(5.0)}).param_groups
    assert [len(group["params"]) for group in groups] == [2, 1]
    assert len(optim.optimizer(named, CONSTANT, {}).param_groups) == 1


def test_carrying_is_part_of_a_runs_identity_and_keeping_checkpoints_is_not(overrides):
    plain, carried, kept = (
        run_hash(asdict(compose([*overrides, *more])))
        for more in ((), ("train.carry_optimizer=true",), ("train.checkpoint_steps=2",))
    )
    assert plain == kept != carried


def test_a_run_that_carries_goes_on_after_a_stage_to_the_same_bytes(overrides, tmp_path, monkeypatch):
    carry = ("method=seq", "train.carry_optimizer=true")
    whole = run(elsewhere(overrides, tmp_path, "whole"), *carry)
    append, killed = Ledger.append, elsewhere(overrides, tmp_path, "killed")

    def killed_append(self, rows):
        rows = list(rows)
        if rows[0].stage == 2:
            raise Killed
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", killed_append)
        with pytest.raises(Killed):
            run(killed, *carry)
    assert scores(run(killed, *carry)) == scores(whole)
    fresh = scores(run(elsewhere(overrides, tmp_path, "fresh"), "method=seq"))
    assert scores(whole)[: len(fresh) // 2] == fresh[: len(fresh) // 2] and scores(whole) != fresh


# --- checkpoints within a stage -----------------------------------------------------------------------------------------


def lab(name: str, folder: Path, *overrides: str) -> methods.Lab:
    toy = methods.lab(name, "train.checkpoint_steps=2", "train.carry_optimizer=true", *overrides)
    toy.run = replace(toy.run, ledger=Ledger(folder, manifest=SAME))
    return toy


def finish(toy: methods.Lab, number: int) -> None:
    """Stage `number` and its record."""
    toy.train(number)
    whole = {"weights": methods.trainable_state(toy.model), "state": toy.method.state_dict()}
    toy.run.ledger.save(Checkpoint(stage=number, moments=toy.moments, **whole))


def die_after(step: int, monkeypatch) -> None:
    """From now on a stage dies right after the checkpoint at `step`."""
    save = Ledger.save

    def killed(self, checkpoint):
        save(self, checkpoint)
        if checkpoint.step == step:
            raise Killed

    monkeypatch.setattr(Ledger, "save", killed)


def everything(toy: methods.Lab) -> dict[str, object]:
    state = {f"state/{key}": value for key, value in toy.method.state_dict().items()}
    return methods.everything(toy.model) | state | toy.moments


def dropout(name: str) -> tuple[str, ...]:
    return ("method.lora.dropout=0.3",) if "lora" in methods.composed(name).method else ()


@pytest.mark.parametrize("name", methods.TRAINED)
def test_a_stage_killed_within_goes_on_to_the_same_bytes(name, tmp_path, monkeypatch):
    overrides = dropout(name)
    whole = lab(name, tmp_path / "whole", *overrides)
    for number in (1, 2):
        finish(whole, number)
    killed = lab(name, tmp_path / "killed", *overrides)
    finish(killed, 1)
    with monkeypatch.context() as patch:
        die_after(4, patch)
        with pytest.raises(Killed):
            killed.train(2)
    killed.run.ledger._lock.close()
    again = lab(name, tmp_path / "killed", *overrides)
    again.moments, again.within = experiment.go_on(again.run)
    assert again.within.step == 4 and again.within.stage == 2
    finish(again, 2)
    assert methods.same(everything(again), everything(whole))


def test_merges_within_a_stage_survive_a_kill_between_them(tmp_path, monkeypatch):
    merging = ("method.fusion_step=3",)
    whole = lab("secura", tmp_path / "whole", *merging)
    finish(whole, 1)
    killed = lab("secura", tmp_path / "killed", *merging)
    killed.run.ledger.save(
        Checkpoint(stage=0, weights=methods.trainable_state(killed.model), state=killed.method.state_dict(), moments={})
    )
    with monkeypatch.context() as patch:
        die_after(4, patch)
        with pytest.raises(Killed):
            killed.train(1)
    killed.run.ledger._lock.close()
    again = lab("secura", tmp_path / "killed", *merging)
    again.moments, again.within = experiment.go_on(again.run)
    finish(again, 1)
    assert methods.same(everything(again), everything(whole))


def test_a_kill_within_a_stage_costs_at_most_the_steps_since_the_checkpoint(overrides, tmp_path, monkeypatch):
    keep = ("method=er", "train.steps=5", "train.checkpoint_steps=2", "train.schedule=linear", "train.warmup=0.4")
    whole = run(elsewhere(overrides, tmp_path, "whole"), *keep)
    killed = elsewhere(overrides, tmp_path, "killed")
    taken: list[int] = []
    take = train.train_step

    def counted(*args, **rest):
        taken.append(1)
        if len(taken) == 5 + 4:
            raise Killed
        return take(*args, **rest)

    monkeypatch.setattr(train, "train_step", counted)
    with pytest.raises(Killed):
        run(killed, *keep)
    taken.clear()
    path = run(killed, *keep, "resume=must")
    assert len(taken) == 3 + 5
    for name in ("stages.csv", "retention.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    costs = [
        [(row["steps"], row["tokens_trained"], row["tokens_replayed"]) for row in costs_of(at)] for at in (path, whole)
    ]
    assert costs[0] == costs[1]
    assert [item.name for item in (path / "checkpoint").iterdir()] == [ledger.STAGE]


def costs_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "cost.jsonl").read_text().splitlines()]


def test_a_checkpoint_within_a_stage_holds_no_base_weights(tmp_path, monkeypatch):
    toy = lab("ewc", tmp_path)
    finish(toy, 1)
    with monkeypatch.context() as patch:
        die_after(2, patch)
        with pytest.raises(Killed):
            toy.train(2)
    names = set(trainable(toy.model))
    with safe_open(tmp_path / "checkpoint" / ledger.WITHIN, framework="pt") as file:
        kept = {key.partition("/")[0] for key in file.keys()}
        assert {key.removeprefix("weights/") for key in file.keys() if key.startswith("weights/")} == names
        state = [key for key in file.keys() if key.startswith("state/")]
    assert kept == {"weights", "moments", "state"}
    assert {key.rpartition("/")[2] for key in state} == names


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    record = Ledger(tmp_path, manifest=SAME)
    weights = {"w": torch.ones(2)}
    record.save(Checkpoint(stage=1, weights=weights, state={}, moments={}))
    record.save(Checkpoint(stage=2, step=2, weights=weights, state={}, moments={}, seconds=1.5))
    with monkeypatch.context() as patch:
        patch.setattr(ledger.os, "fsync", lambda file: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            record.save(Checkpoint(stage=2, step=4, weights={"w": torch.zeros(2)}, state={}, moments={}))
    record._lock.close()
    again = Ledger(tmp_path, manifest=SAME)
    kept = again.load_within()
    assert (kept.stage, kept.step, kept.seconds) == (2, 2, 1.5) and torch.equal(kept.weights["w"], torch.ones(2))


def test_what_was_kept_within_a_stage_goes_when_the_stage_is_finished(tmp_path):
    record = Ledger(tmp_path, manifest=SAME)
    empty = {"weights": {}, "state": {}, "moments": {}}
    record.save(Checkpoint(stage=1, **empty))
    record.save(Checkpoint(stage=2, step=2, **empty))
    record.save(Checkpoint(stage=2, **empty))
    assert record.load_within() is None
    # A kill between the two leaves what the next opening drops.
    record.save(Checkpoint(stage=2, step=4, **empty))
    record._lock.close()
    assert Ledger(tmp_path, manifest=SAME).load_within() is None


# --- requests shared among ranks ----------------------------------------------------------------------------------------


class Threads:
    """Two ranks of one process: each runs in a thread of its own, and `gather` is their meeting point."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=20)
        self.given: list = [None, None]

    def both(self, work) -> list:
        with ThreadPoolExecutor(2) as pool:
            meetings = [Meeting(rank=rank, size=2, threads=self) for rank in range(2)]
            return [future.result() for future in [pool.submit(work, meeting) for meeting in meetings]]


@dataclass(frozen=True, kw_only=True)
class Meeting(Ranks):
    threads: Threads

    def gather(self, value):
        self.threads.given[self.rank] = value
        self.threads.barrier.wait()
        given = list(self.threads.given)
        self.threads.barrier.wait()
        return given


def asked(toy: methods.Lab, student: Student) -> dict[str, object]:
    """Every verb of a student, on requests of uneven length, some of which share a context; and text in windows."""
    examples = [example for stage in toy.run.stream.stages for example in stage.train]
    contexts = [toy.run.encoder.prompt(example.prompt) for example in examples]
    choices = [toy.run.encoder.answer(word) for word in ("w1", "w2 w3", "w4", "w5 w6 w7")]
    return {
        "likelihoods": student.log_likelihoods([(context, choice) for context in contexts for choice in choices]),
        "answers": student.generate(contexts, max_new_tokens=4),
        "distributions": torch.cat([rows for *_, rows in student.read([(ids, choices[0], [0]) for ids in contexts])]),
        "text": read_windows(student, [context[1:] for context in contexts], window=3)[0],
        "one": student.log_likelihoods([(contexts[0], choices[0])]),
        "none": student.log_likelihoods([]),
        "tokens": student.tokens_scored,
    }


def test_ranks_that_share_requests_get_the_answers_of_one():
    toy = methods.lab("base")
    alone = asked(toy, Student(toy.model, toy.run.encoder))
    ranks = Threads().both(lambda ranks: asked(toy, Student(copy.deepcopy(toy.model), toy.run.encoder, ranks=ranks)))
    for found in ranks:
        assert found["answers"] == alone["answers"] and found["none"] == []
        torch.testing.assert_close(found["distributions"], alone["distributions"], rtol=0, atol=1e-5)
        assert found["text"] == pytest.approx(alone["text"], abs=1e-5)
        for key in ("likelihoods", "one"):
            values, greedy = zip(*found[key], strict=True)
            assert values == pytest.approx([value for value, _ in alone[key]], abs=1e-5)
            assert greedy == tuple(is_greedy for _, is_greedy in alone[key])
    tokens = [found["tokens"] for found in ranks]
    assert min(tokens) > 0.3 * sum(tokens) and sum(tokens) == pytest.approx(alone["tokens"], rel=0.1)


def test_every_rank_gets_all_results_in_order_and_works_on_its_part():
    words, worked = ["aa", "b", "c", "aa", "dd", "b"], []

    def upper(mine: list[str]) -> list[str]:
        worked.append(mine)
        return [word.upper() for word in mine]

    assert Ranks().shared(upper, words, by=words) == [word.upper() for word in words]
    for found in Threads().both(lambda one: one.shared(upper, words, by=words)):
        assert found == ["AA", "B", "C", "AA", "DD", "B"]
    assert worked[0] == words and sorted(worked[1:]) == [["aa", "b", "aa", "b"], ["c", "dd"]]
    assert Threads().both(lambda one: one.shared(upper, [], by=[])) == [[], []] and len(worked) == 3


def test_requests_of_one_context_stay_together():
    parts = dealt([(1, 2), (3,), (1, 2), (4, 5, 6), (3,)], size=2)
    assert parts == [[1, 3, 4], [0, 2]]
    assert dealt([], size=2) == [[], []] and dealt([(1,)], size=3) == [[0], [], []]


# --- layers computed again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["seq", "seq_full", "ilora", "curlora", "secura"])
def test_computing_layers_again_in_the_backward_pass_changes_no_byte(name):
    trained = []
    calls = []
    for again in ("false", "true"):
        more = ("method.consistency=1",) if name == "ilora" else ()
        toy = methods.lab(name, f"engine.activation_checkpointing={again}", *dropout(name), *more)
        layer = causal_lm(toy.model).get_decoder().layers[0].self_attn
        counted = []
        layer.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        for number in (1, 2):
            toy.train(number)
        trained.append(methods.everything(toy.model))
        calls.append(len(counted))
    assert methods.same(*trained)
    # A forward of the slow adapter keeps nothing for a backward pass, so it is not made twice.
    assert calls[1] > 1.3 * calls[0]
    assert not any("checkpoint" in key for key in trained[0])


@pytest.mark.parametrize(
    "wrong",
    [
        ["engine.offload=disk"],
        ["engine=local", "engine.offload=optimizer"],
        ["engine=deepspeed", "engine.zero_stage=0", "engine.offload=optimizer"],
        ["engine=deepspeed", "engine.zero_stage=2", "engine.offload=all"],
    ],
)
def test_an_offload_that_no_engine_has_is_refused(overrides, wrong):
    if wrong[0].startswith("engine.offload"):
        wrong = ["engine=deepspeed", *wrong]
    with pytest.raises(UserMistake, match="engine.offload"):
        compose([*overrides, *wrong])


def test_where_things_lie_is_no_part_of_a_runs_identity(overrides):
    more = ["engine=deepspeed", "engine.offload=optimizer", "engine.activation_checkpointing=true"]
    assert run_hash(asdict(compose([*overrides, *more]))) == run_hash(asdict(compose(overrides)))
