"""A base model in slices: no rank ever holds it whole, and nothing that is measured or kept depends on that. Two ranks, CPU, gloo."""

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clbench.build import sketch
from clbench.cli import take_part
from clbench.config import run_directory
from clbench.config.composition import compose
from clbench.train.launch import launch
from clbench.types import UserMistake
from tests import sharded_ranks
from tests.conftest import QUIET, TINY_MODEL, TINY_STREAM, small
from tests.test_deepspeed import Pair, check_equal_runs, checkpoint, distance, tiny
from tests.test_doctor import LLAMA
from tests.test_run import scores

SHARDED = ("engine=deepspeed", "engine.processes=2", "engine.zero_stage=3", "engine.shard_base=true")
TIED = ("model.architecture.tie_word_embeddings=true",)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("ranks"), script="sharded_ranks.py")
    yield pair
    pair.end()


@pytest.fixture(scope="module")
def runs(pair, cache_dir, tmp_path_factory):
    """Runs of two stages with every probe, each made once: `runs(method)` in one process, `runs(method, *overrides)` in two."""
    made = {}

    def of(method: str, *where: str) -> dict:
        if (method, where) not in made:
            overrides = tiny(method, cache_dir, tmp_path_factory.mktemp("runs") / "results")
            call = "held" if "engine.shard_base=true" in where else "run"
            made[method, where] = pair.ask(call, *overrides, *where) if where else sharded_ranks.run(*overrides)
        return made[method, where]

    return of


def model_of(cache_dir: Path, method: str, *more: str) -> list[str]:
    return [*TINY_MODEL, *TINY_STREAM, *QUIET, f"cache_dir={cache_dir}", *small(method), *more]


@cache
def local(function: str, *arguments: object) -> dict:
    """What one process answers."""
    return getattr(sharded_ranks, function)(*arguments)


# --- what is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [("engine=local",), SHARDED[:2], (*SHARDED[:1], "engine.processes=1", SHARDED[2])])
def test_slices_need_stage_3_and_processes(more):
    with pytest.raises(UserMistake, match="it needs engine=deepspeed, engine.zero_stage=3 and at least 2 processes"):
        compose([*more, "engine.shard_base=true"])


def test_slices_are_no_part_of_a_runs_name():
    plain, sliced = compose([*SHARDED, "engine.shard_base=false"]), compose(list(SHARDED))
    assert run_directory(plain) == run_directory(sliced)


@pytest.mark.parametrize(("method", "does"), [("seq_full", "trains"), ("osf", "decomposes")])
def test_a_method_that_needs_the_bases_weights_whole_is_refused_before_they_are_read(method, does):
    sketch(compose([f"method={method}"]), LLAMA)
    with pytest.raises(UserMistake, match=f"method={method} {does} the base .* engine.shard_base=false"):
        sketch(compose([f"method={method}", *SHARDED]), LLAMA)


# --- what is held --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["seq", "curlora", "secura"])
def test_no_rank_holds_more_than_its_half_and_one_unit(runs, method):
    found = runs(method, *SHARDED)
    sizes = found["sizes"]
    assert sizes["units"] == 5 and sizes["unit"] < sizes["base"] / 2
    assert sizes["counted"] == sizes["base"]
    for moments in found["moments"]:
        assert len(moments["before a stage"]) == 2 and len(moments["between"]) == 1 + 2 * 2
        for held in [*moments["between"], *moments["before a stage"]]:
            assert held["whole"] == 0, "whole between stages"
        assert len(moments["examining"]) > 90
        for held in [held for times in moments.values() for held in times]:
            assert sizes["base"] / 2 <= held["slices"] <= (sizes["base"] + sizes["padding"]) / 2
            assert held["whole"] <= sizes["unit"]
        # A unit is whole while it is used.
        assert max(held["whole"] for held in moments["examining"]) == sizes["unit"]


@pytest.mark.slow
def test_adapters_are_whole_between_stages(runs):
    found = runs("seq", *SHARDED)
    weights, _ = checkpoint(found["path"])
    assert found["adapters"] == 2 * [sum(value.numel() for value in weights.values())]
    assert all(value.numel() for value in weights.values())


# --- whole runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["seq", "ewc", "ilora", "clora", "curlora", "secura", "kl_base", "lwf"])
def test_a_run_in_slices_has_the_weights_and_scores_of_one_process(runs, method):
    check_equal_runs(runs(method, *SHARDED)["path"], runs(method)["path"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["seq_merge", "merge_average", "secura_release", "clora_svd_major"])
def test_weights_are_merged_and_read_in_slices_as_in_one_process(runs, method):
    check_equal_runs(runs(method, *SHARDED)["path"], runs(method)["path"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ewc", "secura"])
@pytest.mark.parametrize("way", ["from slices", "to slices"])
def test_a_run_goes_on_with_whole_weights_and_back_in_slices(runs, pair, cache_dir, tmp_path, method, way):
    stage_2 = (*SHARDED[:2], "engine.zero_stage=2")
    before, after = (SHARDED, stage_2) if way == "from slices" else (stage_2, SHARDED)
    left = runs(method, *before)["after 1"]
    shutil.copytree(left.parent, tmp_path / "results" / "runs")
    overrides = [*tiny(method, cache_dir, tmp_path / "results"), "resume=must"]
    found = pair.ask("run", *overrides, *after)
    assert len((found["path"] / "cost.jsonl").read_text().splitlines()) == 3
    check_equal_runs(found["path"], runs(method)["path"])


@pytest.mark.slow
def test_the_command_pretrains_and_runs_in_slices(tmp_path):
    """From nothing: the first rank fills the cache, then all load together."""
    overrides = tiny("seq", tmp_path / "cache", tmp_path / "results")
    path = launch(take_part, compose([*overrides, *SHARDED]), command="")
    alone = sharded_ranks.run(*tiny("seq", tmp_path / "cache", tmp_path / "alone"))["path"]
    check_equal_runs(path, alone)
    assert scores(path)


# --- answers in step -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["seq", "secura"])
def test_ranks_read_in_step_and_answer_as_one_process(pair, cache_dir, method):
    overrides = model_of(cache_dir, method)
    expected, answer = local("answers", *overrides), pair.ask("answers", *overrides, *SHARDED)
    found, alone = answer["found"], expected["found"]
    assert found["generate"] == alone["generate"] and len({len(text) for text in found["generate"]}) > 1
    for (value, greedy), (other, other_greedy) in zip(found["log_likelihoods"], alone["log_likelihoods"], strict=True):
        assert greedy == other_greedy and value == pytest.approx(other, rel=1e-5)
    for (*_, rows), (*_, others) in zip(found["read"], alone["read"], strict=True):
        torch.testing.assert_close(rows, others, rtol=0, atol=1e-5)
    first, second = answer["gathers"]
    assert first == second and len(first) > 50
    assert answer["counted"] == expected["counted"] and not answer["not to be trained on"]


# --- weights ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), TIED, ("engine.dtype=bfloat16",)], ids=["float32", "tied", "bfloat16"])
@pytest.mark.parametrize("method", ["seq", "secura"])
def test_weights_are_loaded_and_folded_to_the_last_bit(pair, cache_dir, method, more):
    overrides = model_of(cache_dir, method, *more)
    # One process first: it makes the model that the ranks load.
    expected, found = local("loaded", *overrides), pair.ask("loaded", *overrides, *SHARDED)
    for part in ("parameters", "buffers", "merged", "again"):
        assert found[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            assert found[part][name].dtype == value.dtype and torch.equal(found[part][name], value), (part, name)
    assert distance(found["merged"], found["again"]) > 0
    assert found["linear"]
    assert found["held when read"] == [[0], [0]] and found["copies"] == [len(expected["again"]), 0]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("method", ["seq", "secura"])
def test_an_export_from_slices_is_that_of_one_process(pair, cache_dir, tmp_path, method, more):
    overrides = model_of(cache_dir, method, *more)
    sharded_ranks.exported(str(tmp_path / "one"), *overrides)
    pair.ask("exported", str(tmp_path / "two"), *overrides, *SHARDED)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert found.keys() == expected.keys() and ("lm_head.weight" in found) != bool(more)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    names = {name: sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")}
    assert names["one"] == names["two"]
