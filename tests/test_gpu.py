"""On a CUDA device: bfloat16 beside float32, ZeRO 2 beside the local engine, and Llama-3-8B's shape with its speed and memory, in training and in reading probes.

`pytest -m gpu -s`; skipped where there is no CUDA device. The tests marked slow run the same checks on the CPU with a tiny model, so that
their path is known to work; what they print there says nothing about a GPU.
"""

import copy
import gc
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

from clbench.build import DTYPES, make_method, placed
from clbench.config.composition import CONF_DIR, compose
from clbench.contract.lab import ToyTask
from clbench.data.encoder import Encoder
from clbench.examine.student import Student
from clbench.experiment.underway import open_engine
from clbench.models.weights import count_parameters, trainable_state
from clbench.protocols import Stage
from clbench.train.launch import join, leave
from clbench.train.loop import global_batch, plan_stage, train_step
from clbench.train.ranks import Ranks
from clbench.types import Example
from tests.benchmarks.scoring import SHAPES, requests

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

LLAMA3_8B = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "model" / "llama3_8b.yaml").architecture)
SMALL = (
    LLAMA3_8B
    | {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}
    | {"num_attention_heads": 8, "num_key_value_heads": 4}
)
GEMMA3 = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "model" / "gemma3_270m.yaml").architecture) | {
    "vocab_size": 8000,
    "num_hidden_layers": 6,
    "initializer_range": 0.1,
}
"""Gemma-3-270M's heads and windows; weights so large that what a token sees shows in what it says."""
TINY = SMALL | {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}

PARITY = 1e-6
"""Largest difference of trained weights between engines, in float32 and with a bfloat16 base alike: adapters are float32 in both."""
ROUNDING = 0.01
"""Largest relative difference of a step's loss between a bfloat16 and a float32 base."""
PEAKS = {"a100": 312e12, "h100": 989e12, "h200": 989e12}
"""Dense bfloat16 operations a second, from the maker's data sheets."""
WARM_UP = 5
"""Steps before the clock starts."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training left: the loss of every step, the adapter; seconds and tokens of the steps after the warm-up, the peak in bytes."""

    losses: list[float]
    weights: dict[str, Tensor]
    seconds: float
    tokens: int
    peak: int
    parameters: dict[str, int]


class Numbers:
    """A tokenizer whose words are token ids; any other word is 1."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [int(word) if word.isdigit() else 1 for word in text.split()]}


def configured(*, dtype: str, steps: int, rows: int, length: int, zero_stage: int | None):
    engine = () if zero_stage is None else ("engine=deepspeed", "engine.processes=1", f"engine.zero_stage={zero_stage}")
    sizes = (f"train.steps={steps}", f"train.batch_size={rows}", f"train.max_length={length}")
    return compose(["method=seq", *engine, f"engine.dtype={dtype}", *sizes, "train.lr=1e-3", "train.warmup=0"])


def examples(count: int, *, length: int, vocabulary: int) -> tuple[Example, ...]:
    """Rows of `length` tokens whose last quarter repeats the first; every third is shorter, so that batches are padded."""
    rng, found = torch.Generator().manual_seed(0), []
    for row in range(count):
        words = [str(word) for word in torch.randint(1, vocabulary, (length,), generator=rng).tolist()]
        prompt = words[: length - length // 4 - 1 - 3 * (row % 3 == 0)]
        found.append(Example(id=str(row), prompt=" ".join(prompt), answer=" ".join(words[: length // 4 - 1])))
    return tuple(found)


def train(architecture: dict, device: str, *, config) -> Trained:
    """Trains LoRA on random weights, drawn on the device in the run's precision where they are many."""
    training, dtype = config.train, DTYPES[config.engine.dtype]
    torch.manual_seed(0)
    is_large = architecture["hidden_size"] > 1000
    with torch.device(device if is_large else "cpu"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**architecture), dtype=dtype if is_large else torch.float32
        )
    method = make_method(config)
    model = method.wrap(model.to(device=device, dtype=dtype)).train()
    encoder = Encoder(Numbers(), max_length=training.max_length, device=device)
    rows = examples(4 * training.batch_size, length=training.max_length, vocabulary=architecture["vocab_size"])
    stage = Stage(index=1, name="", task=ToyTask(1), train=rows, test=(), collate=encoder.collate, whole_stream=rows)
    plan = plan_stage(method.training_set(stage), training)
    engine = open_engine(model, config, plan)
    losses, tokens, began = [], 0, 0.0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(plan.total):
        drawn = global_batch(plan, step, config=training, seed=0, stage=1)
        if step >= WARM_UP:
            tokens += sum(len(encoder.example(example).ids) for example, _, _ in drawn)
        if step == WARM_UP:
            began = synchronised(device)
        losses.append(train_step(drawn, method=method, engine=engine, encoder=encoder, config=training)[0])
    seconds = synchronised(device) - began
    engine.close()
    found = Trained(
        losses=[float(loss) for loss in losses],
        weights=trainable_state(model),
        seconds=seconds,
        tokens=tokens,
        peak=torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        parameters=count_parameters(model),
    )
    del model, engine, method
    gc.collect()
    return found


def synchronised(device: str) -> float:
    """The time, in seconds, when all work given to the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.fixture
def alone(monkeypatch) -> Iterator[Ranks]:
    """The only rank of its kind, for DeepSpeed."""
    port = str(get_free_port())
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", port)
    yield join()
    leave()


def check_rounding(architecture: dict, device: str, *, length: int) -> None:
    """A bfloat16 base gives the losses of a float32 one but for rounding, and training lowers them."""
    sizes = {"steps": 20, "rows": 8, "length": length, "zero_stage": None}
    exact, rounded = (
        train(architecture, device, config=configured(dtype=dtype, **sizes)) for dtype in ("float32", "bfloat16")
    )
    apart = max(abs(a - b) / a for a, b in zip(exact.losses, rounded.losses, strict=True))
    print(
        f"bfloat16 against float32: losses at most {apart:.2e} apart, relatively; {exact.losses[0]:.3f} -> {exact.losses[-1]:.3f}"
    )
    assert apart < ROUNDING
    assert exact.losses != rounded.losses and exact.losses[-1] < exact.losses[0]


def check_parity(architecture: dict, device: str, *, dtype: str, length: int) -> None:
    """ZeRO 2 in one process trains the weights of the local engine."""
    sizes = {"dtype": dtype, "steps": 5, "rows": 8, "length": length}
    # The other kernels of attention add up gradients in an order of chance.
    with sdpa_kernel(SDPBackend.MATH):
        local, zero = (
            train(architecture, device, config=configured(zero_stage=zero_stage, **sizes)) for zero_stage in (None, 2)
        )
    apart = max(float((local.weights[name] - zero.weights[name]).abs().max()) for name in local.weights)
    print(f"ZeRO 2 against local, {dtype}: weights at most {apart:.2e} apart")
    assert local.weights.keys() == zero.weights.keys() and apart < PARITY


def check_size(architecture: dict, device: str, *, rows: int, length: int) -> Trained:
    """Twenty steps on ZeRO 2 with a bfloat16 base; prints tokens a second, share of the device's peak, and memory."""
    config = configured(dtype="bfloat16", steps=20, rows=rows, length=length, zero_stage=2)
    found = train(architecture, device, config=config)
    operations = found.tokens * (4 * found.parameters["parameters"] + 2 * found.parameters["trainable"])
    print(
        f"{found.parameters['parameters']:,} parameters, ZeRO 2, {rows} x {length} tokens a step: "
        f"{of_peak(found.tokens, operations, found.seconds, device)}, peak memory {found.peak / 1e9:.2f} GB, "
        f"loss {found.losses[0]:.3f} -> {found.losses[-1]:.3f}"
    )
    assert all(torch.tensor(found.losses).isfinite()) and len(found.losses) == 20
    return found


@torch.inference_mode()
def check_reading(architecture: dict, device: str, *, items: int) -> None:
    """Scores questions with four endings, as HellaSwag's, in bfloat16; prints tokens a second and share of the device's peak."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture), dtype=torch.bfloat16).eval()
    student = Student(model, Encoder(Numbers(), max_length=1024, device=device))
    pairs = requests((items, *SHAPES["HellaSwag-like"][1:]), architecture["vocab_size"])
    student.log_likelihoods(pairs[:16])
    before, began = student.tokens_scored, synchronised(device)
    found = student.log_likelihoods(pairs)
    seconds, tokens = synchronised(device) - began, student.tokens_scored - before
    parameters = count_parameters(model)["parameters"]
    print(f"{items} questions: {of_peak(tokens, 2 * tokens * parameters, seconds, device)} in {seconds:.2f} s")
    assert len(found) == 4 * items and all(value < 0 for value, _ in found)


@torch.inference_mode()
def check_scores(architecture: dict, device: str) -> None:
    """Questions with four endings, many in one forward, and texts of every length around 512 score in float32 as each by itself in float64."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture), dtype=torch.float32)
    exact, model = copy.deepcopy(model).to(device, torch.float64).eval(), placed(model, torch.device(device)).eval()
    pairs = requests((12, 0, (100, 200), (5, 10)), architecture["vocab_size"])
    long = [(*context, *ending) for context, ending in pairs]
    texts = tuple(token for ids in long for token in ids)
    pairs += [(texts[: length - 1], texts[length - 1 : length + 1]) for length in range(500, 532)]
    student = Student(model, Encoder(Numbers(), max_length=1024, device=device))
    found = student.log_likelihoods(pairs, max_length=1024)
    alone = [student.log_likelihoods([pair], max_length=1024)[0] for pair in pairs[-32:]]
    gaps = []
    for (context, ending), (value, _) in zip([*pairs, *pairs[-32:]], [*found, *alone], strict=True):
        log_probs_TV = exact(input_ids=torch.tensor([[*context, *ending]], device=device)).logits[0].log_softmax(-1)
        after = log_probs_TV[len(context) - 1 : -1]
        gaps.append(
            abs(value - float(after.gather(1, torch.tensor(ending, device=device)[:, None]).sum())) / len(ending)
        )
    print(f"scores in one forward and one at a time: at most {max(gaps):.1e} nats a token apart")
    assert max(gaps) < 1e-4


def of_peak(tokens: int, operations: int, seconds: float, device: str) -> str:
    """Tokens a second, and the share of the device's peak that the model's own operations take."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    peak = next((peak for key, peak in PEAKS.items() if key in name.lower()), None)
    share = "unknown: its peak is not listed" if peak is None else f"{operations / seconds / peak:.1%}"
    return f"{tokens / seconds:,.0f} tokens/s, MFU {share}, on {name}"


@pytest.mark.gpu
@needs_gpu
def test_a_bfloat16_base_trains_as_a_float32_one_on_a_gpu():
    check_rounding(SMALL, "cuda", length=128)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_2_trains_the_weights_of_the_local_engine_on_a_gpu(alone, dtype):
    check_parity(SMALL, "cuda", dtype=dtype, length=128)


@pytest.mark.gpu
@needs_gpu
def test_llama_3_8b_trains_on_a_gpu(alone):
    found = check_size(LLAMA3_8B, "cuda", rows=2, length=1024)
    assert found.parameters["parameters"] - found.parameters["trainable"] == 8_030_261_248
    assert found.losses[-1] < found.losses[0]


@pytest.mark.gpu
@needs_gpu
def test_scores_on_a_gpu_are_those_of_plain_forwards():
    check_scores(GEMMA3, "cuda")


@pytest.mark.gpu
@needs_gpu
def test_llama_3_8b_reads_probes_on_a_gpu():
    check_reading(LLAMA3_8B, "cuda", items=250)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device the checks run there")
def test_the_checks_for_a_gpu_run_on_the_cpu(alone, capsys):
    check_rounding(TINY, "cpu", length=32)
    for dtype in ("float32", "bfloat16"):
        check_parity(TINY, "cpu", dtype=dtype, length=32)
    check_size(TINY, "cpu", rows=2, length=32)
    check_reading(TINY, "cpu", items=3)
    check_scores(GEMMA3, "cpu")
    printed = capsys.readouterr().out
    assert printed.count("apart") == 4 and printed.count("tokens/s, MFU unknown") == 2
    assert os.environ["DS_ACCELERATOR"] == "cpu"
