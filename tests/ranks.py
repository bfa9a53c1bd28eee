"""What the ranks of tests/test_deepspeed.py run: the toy labs of tests/test_methods.py under the DeepSpeed engine, one file of results.

The same functions run under the local engine in the test's own process, so that results are compared like with like.
"""

import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu", TQDM_DISABLE="1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil  # noqa: E402
import torch  # noqa: E402

from clbench.loss import answer_loss  # noqa: E402
from clbench.protocols import Engine  # noqa: E402
from tests import test_methods as methods  # noqa: E402

ARITHMETIC = (
    "train.lr=1e-3",
    "train.clip=0.05",
    "train.weight_decay=0.1",
    "train.micro_batch_size=1",
    "train.warmup=0.4",
)
"""Clipping that bites, weight decay, several micro-batches a rank, a rate that changes: each is a way for engines to differ."""
CASES = {
    "seq": ("method=seq",),
    "seq_unclipped": ("method=seq", "train.clip=0"),
    "seq_odd_batch": ("method=seq", "train.batch_size=5"),
    "seq_one_row": ("method=seq", "train.batch_size=1"),
    "er": ("method=er", "method.fraction=0.5"),
    "ewc": ("method=ewc", "method.strength=50", "method.fisher_examples=5"),
    "ilora": ("method=ilora", "method.fraction=0.5", "method.consistency=1"),
    "clora": ("method=clora",),
    "curlora": ("method=curlora",),
    "secura": ("method=secura",),
    "seq_merge": ("method=seq_merge",),
    "olora": ("method=olora",),
    "l2": ("method=l2",),
}


def lab(case: str, *overrides: str) -> methods.Lab:
    method, *rest = CASES[case]
    return methods.lab(method.removeprefix("method="), *ARITHMETIC, *rest, *overrides)


def outcome(case: str, *overrides: str) -> dict[str, object]:
    """What remains of two stages: weights, the method's state, outputs of every view, the examples that were drawn."""
    toy = lab(case, *overrides)
    drawn = []
    for number in (1, 2):
        toy.train(number)
        plan = methods.plan_stage(toy.method.training_set(toy.stage(number + 1)), toy.run.config.train)
        for step in range(plan.total):
            rows = methods.global_batch(plan, step, config=toy.run.config.train, seed=0, stage=number + 1)
            drawn += [row[0].id for row in rows]
    logits = {}
    for view, weights in toy.method.views(toy.model).items():
        with weights, methods.folded(toy.model):
            logits[view] = toy.logits()
    state = toy.method.state_dict()
    return {"weights": methods.everything(toy.model), "state": state, "logits": logits, "drawn": drawn}


def facts(*overrides: str) -> dict[str, object]:
    """What an engine answers between its opening and its closing; equal for all engines."""
    toy = lab("seq", *overrides)
    before = {part: set(vars(part)) for part in (*toy.model.modules(), *toy.model.parameters())}
    plan, engine = toy.open(1)
    rows = methods.global_batch(plan, 0, config=toy.run.config.train, seed=0, stage=1)
    batches = toy.run.encoder.micro_batches(rows, rows=1, rank=engine.rank, world_size=engine.world_size)
    answers: dict[str, object] = {}

    def backward() -> None:
        for batch in batches:
            engine.backward(answer_loss(toy.model, batch))

    def loss() -> float:
        with torch.no_grad():
            return float(engine.total(sum(answer_loss(toy.model, batch) for batch in batches)))

    start = whole_value(engine, toy)
    backward()
    answers["gradient"] = gradient(engine)
    answers["gradient by matrices"] = {shard.name: shard.grad.clone() for shard in engine.matrices(names(toy))}
    engine.clear()
    backward()
    answers["gradient again"] = gradient(engine)
    answers["entries"] = float(engine.total(float(sum(shard.value.numel() for shard in engine.shards()))))
    for shard in engine.shards():
        shard.grad += 2.0 * shard.part(start[shard.name])
    answers["gradient after shards"] = gradient(engine)
    for shard in engine.matrices(names(toy)):
        shard.grad += 3.0 * shard.value
    answers["gradient after matrices"] = gradient(engine)
    engine.clear()
    for shard in engine.shards():
        shard.value = shard.value + 0.25
    answers["loss after shards"], answers["value after shards"] = loss(), whole_value(engine, toy)
    for shard in engine.matrices(names(toy)):
        shard.value = shard.value * 0.5
    answers["loss after matrices"], answers["value after matrices"] = loss(), whole_value(engine, toy)
    backward()
    engine.step()
    answers["value after step"] = whole_value(engine, toy)
    answers["outside a forward"] = sum(parameter.numel() for parameter in toy.model.parameters())
    engine.close()
    answers["linear"] = torch.nn.functional.linear is torch._C._nn.linear
    answers["closed"] = methods.everything(toy.model)
    answers["left behind"] = sorted({name for part, known in before.items() for name in vars(part).keys() - known})
    return answers


def life(*overrides: str) -> dict[str, object]:
    """Resident memory of this process, in bytes, after each of 16 engines."""
    toy = lab("seq", *overrides)
    resident = []
    for _ in range(16):
        toy.train(1)
        resident.append(psutil.Process().memory_info().rss)
    return {"resident": resident}


def gradient(engine: Engine) -> dict[str, torch.Tensor]:
    return engine.whole({shard.name: shard.grad.clone() for shard in engine.shards()})


def whole_value(engine: Engine, toy: methods.Lab) -> dict[str, torch.Tensor]:
    return {shard.name: shard.value.clone() for shard in engine.matrices(names(toy))}


def names(toy: methods.Lab) -> list[str]:
    return [name for name, parameter in toy.model.named_parameters() if parameter.requires_grad]


def main(path: Path, *wanted: str) -> None:
    """Runs each `case:zero_stage` of `wanted`; rank 0 writes the outcomes, on all ranks they must be the same."""
    from clbench import engine_deepspeed

    torch.set_num_threads(1)
    world = engine_deepspeed.join()
    outcomes = {}
    for item in wanted:
        case, zero_stage = item.split(":")
        engine = ("engine=deepspeed", f"engine.processes={world.size}", f"engine.zero_stage={zero_stage}")
        found = {"facts": facts, "life": life}[case](*engine) if case in ("facts", "life") else outcome(case, *engine)
        same = {"facts": "closed", "life": None}.get(case, "weights")
        assert same is None or methods.same(world.share(found[same]), found[same]), f"ranks differ: {item}"
        outcomes[item] = found
        if world.is_first:
            torch.save(outcomes, path)
    world.wait()
    engine_deepspeed.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
