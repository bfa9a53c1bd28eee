"""The forecast of memory against the allocations of real training on the CPU, one process and two."""

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from clbench.adapters import trainable_state  # noqa: E402
from clbench.cli import compose  # noqa: E402
from clbench.data import Encoder  # noqa: E402
from clbench.dry_run import DryRun, Footprint, NoTask, OneTokenPerWord  # noqa: E402
from clbench.estimate import meta_model  # noqa: E402
from clbench.experiment import open_engine  # noqa: E402
from clbench.footprint import local, sharded  # noqa: E402
from clbench.meta import META, Held, Shapes  # noqa: E402
from clbench.parts import make_method  # noqa: E402
from clbench.train import global_batch, plan_stage, train_step  # noqa: E402
from clbench.types import Example, Stage  # noqa: E402
from tests.test_deepspeed_features import two_ranks  # noqa: E402

TOLERANCE = 0.2
STAGES = 2
LLAMA = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
SHAPES = {"long answers": (256, 128, 4, 4), "two micro-batches": (64, 8, 16, 8)}
"""Tokens of a row, of them answer, rows of a step, rows of a forward."""
ACTIVE = ("long answers", "two micro-batches")
"""Shapes at which activations are most of the memory."""
TWO_RANKS = [(method, shape) for method in ("seq", "ewc") for shape in ACTIVE]
"""Not full fine-tuning at this size: the messages' own copies come and go by chance, and are up to a fifth of what is measured."""


def configured(method: str, shape: str, tmp: Path, *overrides: str):
    length, _, batch_size, micro = SHAPES[shape]
    return compose(
        [
            f"method={method}",
            "train.steps=2",
            f"train.max_length={length}",
            f"train.batch_size={batch_size}",
            f"train.micro_batch_size={micro}",
            "train.micro_batch_tokens=100000",  # as on an accelerator: the CPU cuts batches shorter
            f"results_dir={tmp}",
            f"cache_dir={tmp}",
            *overrides,
        ]
    )


def forecast(method: str, shape: str, tmp: Path, *, processes: int, zero_stage: int = 0) -> Footprint:
    config = configured(method, shape, tmp)
    model = meta_model(AutoConfig.for_model(**LLAMA))
    dry = DryRun(
        method=make_method(config),
        model=model,
        config=config.train,
        processes=processes,
        answer_length=SHAPES[shape][1],
        sharded=zero_stage == 3,
    )
    return dry.run(stages=STAGES)


def measured(method: str, shape: str, tmp: Path, *overrides: str) -> dict[str, int]:
    """Bytes that torch's allocator has given out: the most in the steps of two stages, what is left at the end, what is saved.

    Every third row is shorter, so that all batches are padded.
    """
    gc.collect()  # what an earlier measurement left must not be freed within this one
    config = configured(method, shape, tmp, *overrides)
    length, answer, batch_size, _ = SHAPES[shape]
    encoder = Encoder(OneTokenPerWord(), max_length=length)
    rows = tuple(
        Example(id=f"{row}", prompt="w " * (length - answer - 1 - 5 * (row % 3 == 0)), answer="w " * (answer - 1))
        for row in range(batch_size)
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA))
        trained_by = make_method(config)
        model = trained_by.wrap(model)
        for index in range(1, STAGES + 1):
            stage = Stage(
                index=index, name="", task=NoTask(), train=rows, test=(), collate=encoder.collate, whole_stream=rows
            )
            trained_by.begin_stage(stage, model)
            plan = plan_stage(trained_by.training_set(stage), config.train)
            engine = open_engine(model, config, plan)
            model.train()
            for step in range(plan.total):
                drawn = global_batch(plan, step, config=config.train, seed=0, stage=index)
                with record_function(f"step {index} {step}"):
                    train_step(drawn, method=trained_by, engine=engine, encoder=encoder, config=config.train)
            model.eval()
            trained_by.end_stage(stage, engine)
            engine.close()
            del engine
            trained_by.consolidate(model)
            gc.collect()  # cycles hold a closed DeepSpeed engine until the collector comes by
    events = profiler.profiler.kineto_results.events()
    live, history = 0, []
    for when, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        live += size
        history.append((when, live))
    spans = [
        (event.start_ns(), event.start_ns() + event.duration_ns()) for event in events if event.name()[:5] == "step "
    ]
    assert len(spans) == 2 * STAGES
    saved = [*trainable_state(model).values(), *trained_by.state_dict().values()]
    return {
        "peak": max(held for when, held in history if any(first <= when <= last for first, last in spans)),
        "left": live,
        "saved": sum(tensor.nbytes for tensor in saved if isinstance(tensor, torch.Tensor)),
    }


@pytest.mark.parametrize("shape", ACTIVE)
@pytest.mark.parametrize("method", ["seq", "ewc", "ilora", "clora", "secura", "olora", "seq_full"])
def test_the_forecast_is_near_what_one_process_allocates(method, shape, tmp_path):
    footprint, found = forecast(method, shape, tmp_path, processes=1), measured(method, shape, tmp_path)
    print(f"{method}, {shape}: forecast {footprint.training:,}, measured {found['peak']:,} bytes")
    assert footprint.training == local(footprint).total == pytest.approx(found["peak"], rel=TOLERANCE)
    assert footprint.moments == 2 * footprint.trained
    # Activations matter here: what stays is less than half.
    assert found["peak"] > 2 * found["left"]


@pytest.mark.parametrize("method", ["seq", "ewc", "ilora", "clora", "secura", "olora", "merge_average", "curlora"])
def test_what_a_method_keeps_is_counted_exactly(method, tmp_path):
    footprint, found = (
        forecast(method, "two micro-batches", tmp_path, processes=1),
        measured(method, "two micro-batches", tmp_path),
    )
    # What the interpreter and torch keep besides is small: seeds, step counters, indices.
    assert footprint.frozen + footprint.trained + footprint.extras == pytest.approx(found["left"], abs=4096)
    assert footprint.checkpoint == found["saved"]


def test_what_grows_with_every_stage_is_foreseen(tmp_path):
    config = configured("olora", "two micro-batches", tmp_path)

    def dry(stages: int) -> Footprint:
        model = meta_model(AutoConfig.for_model(**LLAMA))
        return DryRun(method=make_method(config), model=model, config=config.train, processes=1, answer_length=8).run(
            stages=stages
        )

    # The adapter of every finished stage is kept, float32, beside what one stage leaves.
    adapter = dry(1).trained
    assert dry(16).extras - dry(1).extras == 15 * adapter
    assert dry(16).checkpoint - dry(1).checkpoint == 15 * adapter


def test_storages_are_counted_while_they_live():
    with Held() as held:
        whole = torch.empty(100, device=META)
        view = whole[:50]
        other = whole + 1
        assert held.live == held.peak == 800
        del whole
        assert held.live == 800
        del view
        assert held.live == 400
        held.mark()
        del other
        assert (held.live, held.peak) == (0, 400)


def test_numbers_that_are_not_there_are_stood_in_for():
    with Shapes(answer_length=3):
        labels = torch.empty(4, 10, device=META)
        rows, columns = torch.nonzero(labels != 0, as_tuple=True)
        assert len(rows) == len(columns) == 12 and rows.is_meta
        assert float(labels.sum()) == 1.0 and (labels == 0).all()
        assert torch.randn(2, 3, generator=torch.Generator()).is_meta


FOOTPRINT = Footprint(
    frozen=800, trained=80, moments=160, working=500, examining=300, extras=40, checkpoint=120, largest=20, entry=2
)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer", "buffers"),
    [
        (0, 880, 80, 160, 0),
        (1, 880, 80, 20 + 40, 80),  # a quarter of the master copy and of the moments, a buffer for all gradients
        (2, 880, 80, 20 + 40, 80),
        (
            3,
            220,
            80 + 20,
            20 + 40,
            2 * 80 + 880,
        ),  # a quarter of all weights; gathered there may be all of a small model
    ],
)
def test_four_ranks_share_as_deepspeed_does(stage, weights, gradients, optimizer, buffers):
    memory = sharded(FOOTPRINT, zero_stage=stage, processes=4)
    assert (memory.weights, memory.gradients, memory.optimizer, memory.buffers) == (
        weights,
        gradients,
        optimizer,
        buffers,
    )
    assert memory.extras == 40 and memory.activations == 500 - 80
    assert memory.total == weights + gradients + optimizer + buffers + 40 + 420


@pytest.mark.parametrize(("stage", "passing"), [(0, 2 * 80), (1, 2 * 20), (2, 2 * 20), (3, 80 + 20)])
def test_where_activations_are_small_the_reduction_of_gradients_is_the_peak(stage, passing):
    small = replace(FOOTPRINT, working=81)
    assert sharded(small, zero_stage=stage, processes=4).activations == passing


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[str, list[int]]:
    """What the first of two ranks allocates at most, for each ZeRO stage, by method and shape; one pair of processes for all."""
    path = tmp_path_factory.mktemp("ranks") / "measured.json"
    two_ranks([sys.executable, __file__, str(path)])
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("method", "shape"), TWO_RANKS)
def test_the_forecast_is_near_what_each_of_two_ranks_allocates(ranks, method, shape, stage, tmp_path):
    footprint = forecast(method, shape, tmp_path, processes=2, zero_stage=stage)
    foreseen, found = sharded(footprint, zero_stage=stage, processes=2).total, ranks[f"{method}, {shape}"][stage]
    print(f"{method}, {shape}, ZeRO {stage}: forecast {foreseen:,}, measured {found:,} bytes")
    assert foreseen == pytest.approx(found, rel=TOLERANCE)


def rank(path: Path) -> None:
    """What rank 0 of two allocates at most."""
    from clbench import engine_deepspeed

    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    world = engine_deepspeed.join()
    engine = ("engine=deepspeed", f"engine.processes={world.size}")
    found = {
        f"{method}, {shape}": [
            measured(method, shape, path.parent, *engine, f"engine.zero_stage={stage}")["peak"] for stage in range(4)
        ]
        for method, shape in TWO_RANKS
    }
    if world.is_first:
        path.write_text(json.dumps(found))
    world.wait()
    engine_deepspeed.leave()


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
