"""What the ranks of tests/test_deepspeed_features.py run: the toy labs of tests/ranks.py, one file of results.

The same functions run under the local engine in the test's own process, so that results are compared like with like.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from clbench import experiment  # noqa: E402
from clbench.experiment import underway  # noqa: E402
from clbench.record.ledger import Checkpoint, Ledger  # noqa: E402
from clbench.train.launch import join, leave  # noqa: E402
from clbench.train.ranks import Ranks  # noqa: E402
from tests import ranks  # noqa: E402
from tests import test_methods as methods  # noqa: E402

SAME = {"run": "toy", "data": {}, "probe_data": {}, "model_fingerprint": ""}
KEEP = ("train.checkpoint_steps=2", "train.carry_optimizer=true")
KILLED_AFTER = 2
ARITHMETIC = (
    "train.lr=1e-3",
    "train.clip=0.05",
    "train.weight_decay=0.1",
    "train.micro_batch_size=1",
    "train.warmup=0.4",
)
"""Clipping that bites, weight decay, several micro-batches a rank, a rate that changes: each is a way for engines to differ."""


class Killed(BaseException):
    """Stands in for a kill: nothing in the code under test may catch it."""


def carried(*overrides: str) -> dict[str, object]:
    """Three stages that share an optimizer; in the second one a layer is frozen, so that step counts differ in the third."""
    toy = lab("seq", "train.carry_optimizer=true", *overrides)
    layer = [parameter for name, parameter in toy.model.named_parameters() if "lora" in name and ".0." in name]
    for number in (1, 2, 3):
        for parameter in layer:
            parameter.requires_grad_(number != 2)
        toy.train(number)
        if number == 1:
            once = dict(toy.moments)
    return {"weights": methods.everything(toy.model), "once": once, "moments": toy.moments}


def stage(case: str, folder: Path, *overrides: str, joined: Ranks, killed: bool) -> dict[str, object]:
    """Stage 1 of `case`, up to its checkpoint at step 2 or from wherever `folder` says it is."""
    toy = lab(case, *KEEP, *overrides)
    toy.run = replace(toy.run, ranks=joined, ledger=Ledger(folder, manifest=SAME) if joined.is_first else None)
    save = underway.save_within

    def save_and_die(*args, step: int, **rest) -> None:
        save(*args, step=step, **rest)
        if killed and step == KILLED_AFTER:
            raise Killed

    if joined.share(toy.run.ledger is not None and toy.run.ledger.finished == 0):
        toy.moments, toy.within = experiment.go_on(toy.run)
    elif toy.run.ledger:
        state = {"weights": methods.trainable_state(toy.model), "state": toy.method.state_dict()}
        toy.run.ledger.save(Checkpoint(stage=0, moments={}, **state))
    reached = toy.within.step if toy.within else 0
    underway.save_within = save_and_die
    try:
        toy.train(1)
    except Killed:
        return {}
    finally:
        underway.save_within = save
        if toy.run.ledger:
            toy.run.ledger._lock.close()
    return {
        "weights": methods.everything(toy.model),
        "state": toy.method.state_dict(),
        "moments": toy.moments,
        "reached": reached,
    }


def lab(case: str, *overrides: str, dtype: torch.dtype = torch.float32) -> methods.Lab:
    method, *rest = {**ranks.CASES, "seq_full": ("method=seq_full",)}[case]
    return methods.lab(method.removeprefix("method="), *ARITHMETIC, *rest, *overrides, dtype=dtype)


def trained(case: str, *overrides: str, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """What remains of two stages of `case`, its base model in `dtype`."""
    toy = lab(case, *overrides, dtype=dtype)
    for number in (1, 2):
        toy.train(number)
    return {"weights": methods.everything(toy.model), "logits": {"model": toy.logits()}}


def main(path: Path, *wanted: str) -> None:
    """Runs each `job:zero_stage[:case:more]` of `wanted`; rank 0 writes the outcomes."""
    torch.set_num_threads(1)
    joined = join()
    outcomes = {}
    for item in wanted:
        job, zero_stage, *rest = item.split(":")
        engine = ("engine=deepspeed", f"engine.processes={joined.size}", f"engine.zero_stage={zero_stage}")
        if job == "carried":
            found = carried(*engine)
        elif job == "facts":
            found = ranks.facts(*engine, *rest)
        elif job in ("float32", "bfloat16"):
            found = trained(rest[0], *engine, *rest[1:], dtype=getattr(torch, job))
        else:
            case, folder = rest
            found = stage(case, Path(folder), *engine, joined=joined, killed=job == "kill")
        if "weights" in found:
            assert methods.same(joined.share(found["weights"]), found["weights"]), f"ranks differ: {item}"
        outcomes[item if job not in ("kill", "go on") else f"{job}:{zero_stage}:{rest[0]}"] = found
        if joined.is_first:
            torch.save(outcomes, path)
    joined.wait()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
