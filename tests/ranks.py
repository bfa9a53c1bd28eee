"""What the ranks of tests/test_deepspeed.py do: they answer questions, one by one, under the DeepSpeed engine.

The same functions answer under the local engine in the test's own process, so that like is compared with like. A question is a line of JSON on
standard input, `[number, function, *arguments]`, the same to every rank; the first one puts the answer into the file `<number>.pt`.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

os.environ.update(HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu", TQDM_DISABLE="1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil  # noqa: E402
import torch  # noqa: E402
from deepspeed.utils import safe_set_full_fp32_param  # noqa: E402
from torch import Tensor, distributed  # noqa: E402

from clbench import experiment  # noqa: E402
from clbench.config import composition, run_directory  # noqa: E402
from clbench.data.encoder import Encoder  # noqa: E402
from clbench.experiment import underway  # noqa: E402
from clbench.models.loss import answer_loss  # noqa: E402
from clbench.models.weights import trainable  # noqa: E402
from clbench.protocols import Engine, Method  # noqa: E402
from clbench.record.ledger import Checkpoint, Ledger  # noqa: E402
from clbench.record.tracking import Tracker  # noqa: E402
from clbench.train.launch import join, leave  # noqa: E402
from clbench.train.local import LocalEngine  # noqa: E402
from clbench.train.ranks import Ranks  # noqa: E402
from clbench.types import Batch  # noqa: E402
from tests import test_methods as methods  # noqa: E402

STEPS = 3
ARITHMETIC = (
    "train.lr=1e-4",
    "train.clip=0",
    "train.weight_decay=0.1",
    "train.micro_batch_size=1",
    "train.warmup=0.4",
    f"train.steps={STEPS}",
)
"""Weight decay, several micro-batches a rank, a rate that changes: each is a way for engines to differ."""
CASES = {
    "seq": ("method=seq",),
    "seq_clipped": ("method=seq", "train.clip=0.05"),
    "seq_odd_batch": ("method=seq", "train.batch_size=5"),
    "seq_one_row": ("method=seq", "train.batch_size=1"),
    "seq_bfloat16": ("method=seq", "engine.dtype=bfloat16"),
    "er": ("method=er", "method.fraction=0.5"),
    "ewc": ("method=ewc", "method.strength=50", "method.fisher_examples=5"),
    "ilora": ("method=ilora", "method.fraction=0.5", "method.consistency=1"),
    "clora": ("method=clora",),
    "curlora": ("method=curlora",),
    "secura": ("method=secura",),
    "secura_release": ("method=secura_release",),
    "seq_merge": ("method=seq_merge",),
    "olora": ("method=olora",),
    "l2": ("method=l2",),
    "kl_base": ("method=kl_base", "method.strength=1"),
    "kl_base_prompt": ("method=kl_base", "method.strength=1", "method.tokens=all"),
    "lwf": ("method=lwf", "method.strength=100"),
    "self_replay": ("method=self_replay", "method.rows=20"),
    "self_replay_text": ("method=self_replay_text", "method.rows=20"),
    "er_general": ("method=er_general",),
    "agem": ("method=agem", "method.fraction=1"),
    "slao": ("method=slao",),
    "base_interpolation": ("method=base_interpolation",),
    "lines": ("method=lines",),
    "osf": ("method=osf",),
}
KEPT_IN_OUT = {
    f"{method}_gpt2": (f"method={method}", "method.lora.targets=all-linear")
    for method in ("olora", "seq_merge", "merge_average", "clora_svd_major")
} | {"secura_gpt2": ("method=secura", "method.targets=[attn.c_proj,c_fc]")}
"""On GPT-2, whose weights are kept [in, out]. SECURA's shift of c_attn has the keys' bias, of which the gradient is 0 but for rounding."""


# --- two stages of a method on the toy stream ------------------------------------------------------------------------------


@dataclass
class Notes:
    """What was seen of a method's training on this rank, by step: rows, their loss, the penalty's value. `gradient` is the first corrected one."""

    rows: list[list[tuple[int, ...]]] = field(default_factory=lambda: [[]])
    losses: list[float] = field(default_factory=lambda: [0.0])
    penalties: list[float] = field(default_factory=list)
    gradient: dict[str, Tensor] = field(default_factory=dict)


def watched(method: Method) -> Notes:
    notes, loss, correct = Notes(), method.loss, method.correct_gradients

    def noted_loss(model: torch.nn.Module, batch: Batch) -> Tensor:
        rows = zip(batch.input_ids, batch.attention_mask.bool(), batch.sources, batch.weights, strict=True)
        notes.rows[-1] += [(int(source), *ids[mask].tolist()) for ids, mask, source, weight in rows if weight > 0]
        found = loss(model, batch)
        notes.losses[-1] += float(found.detach())
        return found

    def noted_correct(engine: Engine) -> Tensor | float:
        notes.gradient = notes.gradient or gradient(engine)
        notes.rows.append([])
        notes.losses.append(0.0)
        notes.penalties.append(float(penalty := correct(engine)))
        return penalty

    method.loss, method.correct_gradients = noted_loss, noted_correct
    return notes


def lab(case: str, *overrides: str) -> methods.Lab:
    method, *rest = (CASES | KEPT_IN_OUT)[case]
    made = methods.gpt2 if case in KEPT_IN_OUT else methods.llama
    dtype = torch.bfloat16 if "engine.dtype=bfloat16" in rest else torch.float32
    with patch.dict(methods.TINY, num_hidden_layers=1):
        toy = methods.lab(method.removeprefix("method="), *ARITHMETIC, *rest, *overrides, dtype=dtype, made=made)
    if case == "agem":  # the memory is opposed from here on, which it is not where training begins
        rng = torch.Generator().manual_seed(10)
        with torch.no_grad():
            for tensor in trainable(toy.model).values():
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=rng))
    return toy


def outcome(case: str, *overrides: str) -> dict[str, object]:
    """What remains of two stages: weights, the method's state, outputs of every view; and what was trained on."""
    toy = lab(case, *overrides)
    notes = watched(toy.method)
    reported = [train(toy, number) for number in (1, 2)]
    weights = methods.everything(toy.model)
    logits = {}
    for view, held in toy.method.views(toy.model).items():
        with held, methods.folded(toy.model):
            logits[view] = toy.logits()
    assert all(methods.same(weights, others) for others in from_all(weights)), "ranks differ"
    ranks_rows = from_all(notes.rows[:-1])
    return {
        "weights": weights,
        "state": toy.method.state_dict(),
        "logits": logits,
        "reported": reported,
        "losses": [sum(parts) for parts in zip(*from_all(notes.losses[:-1]), strict=True)],
        "penalties": notes.penalties,
        "gradient": notes.gradient,
        "rows": [sorted(row for rows in step for row in rows) for step in zip(*ranks_rows, strict=True)],
    }


def train(toy: methods.Lab, number: int) -> float:
    """Stage `number`; the loss that it reports."""
    tracker = Tracker(toy.run.config, toy.run.stream.stages, silent=True)
    _, trained, toy.moments = underway.train(toy.run, toy.stage(number), tracker, moments=toy.moments, within=None)
    toy.model.eval()
    return trained.loss


class InTurn(LocalEngine):
    """One process that does the work of two ranks in turn: their rows, their micro-batches, gradients added in their order."""

    def backward(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, list(self._parameters.values()))
        self.pending = [*vars(self).get("pending", []), gradients]

    def _reduce(self) -> None:
        pending = vars(self).pop("pending", [])
        half = len(pending) // 2
        for number, parameter in enumerate(self._parameters.values() if pending else ()):
            parts = [sum(gradients[number] for gradients in part) for part in (pending[:half], pending[half:]) if part]
            parameter.grad = sum(parts)

    def step(self) -> None:
        self._reduce()
        super().step()

    def tensors(self, names: list[str] | None = None) -> Iterator:
        self._reduce()
        return super().tensors(names)


def in_turn(case: str) -> dict[str, object]:
    """`outcome` of one process that adds in the order of two."""

    def both(self, rows_of_step, *, rows, tokens=None, rank=None, world_size=None):
        if rank is None:
            return split(self, rows_of_step, rows=rows)
        parts = (split(self, rows_of_step, rows=rows, tokens=tokens, rank=part, world_size=2) for part in (0, 1))
        return [batch for part in parts for batch in part]

    split = Encoder.micro_batches
    with patch.object(underway, "LocalEngine", InTurn), patch.object(Encoder, "micro_batches", both):
        return outcome(case)


# --- an engine from its opening to its closing ------------------------------------------------------------------------------


def facts(*overrides: str) -> dict[str, object]:
    """What an engine answers between its opening and its closing; equal for all engines. Nine entries a core, so parts are uneven."""
    toy = methods.lab("curlora", *ARITHMETIC, "method.rank=3", *overrides)
    before = {part: set(vars(part)) for part in (*toy.model.modules(), *toy.model.parameters())}
    plan, engine = toy.open(1)
    rows = methods.global_batch(plan, 0, config=toy.run.config.train, seed=0, stage=1)
    batches = toy.run.encoder.micro_batches(rows, rows=1, rank=engine.rank, world_size=engine.world_size)
    answers: dict[str, object] = {}

    def backward(share: float = 1.0) -> None:
        for batch in batches:
            engine.backward(100 * share * answer_loss(toy.model, batch))

    def loss() -> float:
        with torch.no_grad():
            return float(engine.total(sum(answer_loss(toy.model, batch) for batch in batches)))

    for number, tensor in enumerate(engine.tensors()):
        tensor.value = torch.sin(number + torch.arange(9.0)).view(3, 3)
    answers["value"] = values(engine)
    backward()
    answers["gradient"] = gradient(engine)
    engine.clear()
    backward(0.5)
    answers["half the gradient"] = gradient(engine)
    backward(0.25)
    engine.clear()
    backward()
    answers["gradient again"] = gradient(engine)
    for tensor in engine.tensors():
        tensor.grad += 5.0 * tensor.value
    answers["gradient after edit"] = gradient(engine)
    some = list(answers["value"])[1::2]
    for tensor in engine.tensors(some):
        tensor.grad = tensor.grad - 5.0 * tensor.value
    answers["gradient after edits of some"] = gradient(engine)
    engine.clear()
    # A penalty as a hook: its term comes once a micro-batch, so each brings its share.
    hooks = [
        parameter.register_hook(lambda grad, parameter=parameter: grad + parameter.detach() / len(batches))
        for parameter in toy.model.parameters()
        if parameter.requires_grad
    ]
    backward()
    answers["gradient with hooks"] = gradient(engine)
    for hook in hooks:
        hook.remove()
    engine.clear()
    for tensor in engine.tensors():
        tensor.value = tensor.value + 8.0
    answers["loss after write"], answers["value after write"] = loss(), values(engine)
    for tensor in engine.tensors():
        tensor.value *= 0.5
    answers["loss after edit"], answers["value after edit"] = loss(), values(engine)
    backward()
    engine.step()
    answers["value after step"] = values(engine)
    answers["outside a forward"] = sum(parameter.numel() for parameter in toy.model.parameters())
    engine.close()
    answers["linear"] = torch.nn.functional.linear is torch._C._nn.linear
    answers["closed"] = methods.everything(toy.model)
    answers["left behind"] = sorted({name for part, known in before.items() for name in vars(part).keys() - known})
    return answers


def descent(clip: float, *overrides: str) -> dict[str, object]:
    """A gradient, and how far one step of plain descent at rate 1 goes on it."""
    toy = methods.lab("seq", *TOY_STEP, f"train.clip={clip}", *overrides)
    descend = lambda parameters, config, moments: torch.optim.SGD(parameters.values(), lr=1.0)  # noqa: E731
    with patch.object(underway.optim, "optimizer", descend):
        plan, engine = toy.open(1)
    rows = methods.global_batch(plan, 0, config=toy.run.config.train, seed=0, stage=1)
    start = values(engine)
    for batch in toy.run.encoder.micro_batches(rows, rows=1, rank=engine.rank, world_size=engine.world_size):
        engine.backward(100 * answer_loss(toy.model, batch))
    found = gradient(engine)
    engine.step()
    after = values(engine)
    engine.close()
    return {"gradient": found, "way": {name: start[name] - value for name, value in after.items()}}


def uneven(*overrides: str) -> dict[str, object]:
    """What the last rank is told that writes nine entries, in parts of five, by DeepSpeed's function for whole tensors."""
    toy = methods.lab("curlora", *ARITHMETIC, "method.rank=3", *overrides)
    _, engine = toy.open(1)
    error = ""
    try:
        safe_set_full_fp32_param(next(iter(trainable(toy.model).values())), torch.ones(3, 3))
    except RuntimeError as refusal:
        error = str(refusal)
    engine.close()
    return {"error": from_all(error)[-1]}


TOY_STEP = ("train.warmup=0", "train.schedule=constant", "train.micro_batch_size=1")


def gradient(engine: Engine) -> dict[str, Tensor]:
    return {tensor.name: tensor.grad.clone() for tensor in engine.tensors()}


def values(engine: Engine) -> dict[str, Tensor]:
    return {tensor.name: tensor.value.clone() for tensor in engine.tensors()}


def from_all(value: object) -> list:
    """Every rank's `value`."""
    if not distributed.is_initialized():
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


# --- lives ----------------------------------------------------------------------------------------------------------------------


def life(*overrides: str) -> dict[str, object]:
    """Resident memory of each rank, in bytes, after each of 16 engines."""
    toy = lab("seq", *overrides, "train.steps=1")
    resident = []
    for _ in range(16):
        toy.train(1)
        resident.append(psutil.Process().memory_info().rss)
    return {"resident": from_all(resident)}


def run(*overrides: str) -> dict[str, object]:
    """A whole run. Its directory, what a kill after stage 1 would have left (`after 1`), and each rank's resident memory after each stage."""
    config = composition.compose(list(overrides))
    path = run_directory(config)
    left = Path(f"{config.results_dir}-after-1") / "runs" / path.name
    save, stage_of, resident = Ledger.save, experiment.run_stage, []

    def noted_save(self: Ledger, checkpoint: Checkpoint) -> None:
        save(self, checkpoint)
        if checkpoint.stage == 1 and not checkpoint.step:
            shutil.copytree(path, left)

    def noted_stage(*arguments: object, **named: object) -> object:
        found = stage_of(*arguments, **named)
        resident.append(psutil.Process().memory_info().rss)
        return found

    is_many = distributed.is_initialized()
    ranks = Ranks(rank=distributed.get_rank(), size=distributed.get_world_size()) if is_many else Ranks()
    with patch.object(Ledger, "save", noted_save), patch.object(experiment, "run_stage", noted_stage):
        experiment.run(config, ranks=ranks)
    return {"path": path, "after 1": left, "resident": from_all(resident)}


def broken(config: object, *, command: str) -> None:
    """What a rank does that fails by a mistake of ours."""
    raise RuntimeError("a mistake of ours")


def rejoin(port: str, *overrides: str) -> dict[str, object]:
    """Two stages by ranks that have left each other and joined anew."""
    leave()
    os.environ["MASTER_PORT"] = port
    join()
    return outcome("seq", *overrides)


def main(
    folder: Path, functions: Sequence[Callable[..., dict]] = (outcome, facts, uneven, descent, life, run, rejoin)
) -> None:
    torch.set_num_threads(1)
    joined = join()
    for line in sys.stdin:
        number, function, *arguments = json.loads(line)
        found = {f.__name__: f for f in functions}[function](*arguments)
        if joined.is_first:
            torch.save(found, folder / "answer.tmp")
            (folder / "answer.tmp").replace(folder / f"{number}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
