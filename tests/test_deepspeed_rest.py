"""What CI leaves to the slow suite: what tests/test_deepspeed.py tries on some ZeRO stages, on the others; memory stage by stage; ranks that end early."""

import json
import signal
import subprocess
import sys

import psutil
import pytest

from clbench.cli import take_part
from clbench.config.composition import compose
from clbench.train.launch import launch
from clbench.types import RankFailed
from tests import ranks
from tests.conftest import QUIET, TINY_MODEL
from tests.test_deepspeed import (  # noqa: F401 (two are fixtures)
    BITWISE,
    CORE,
    REST,
    ROOT,
    STAGES,
    Pair,
    check_bitwise,
    check_equal_runs,
    check_rows,
    check_weights,
    pair,
    ranks_among,
    runs,
    start_ranks,
    two,
    wait_for,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("case", "stage"), [one for one in REST if one[0] != "seq_bfloat16"])
def test_two_processes_train_the_weights_of_one(pair, case, stage):  # noqa: F811
    check_weights(pair, case, stage)


@pytest.mark.parametrize("stage", (0, 1))
@pytest.mark.parametrize("case", BITWISE)
def test_two_processes_are_bitwise_one_that_adds_in_their_order(pair, case, stage):  # noqa: F811
    check_bitwise(pair, case, stage)


@pytest.mark.parametrize(("case", "stage"), REST)
def test_every_step_trains_on_the_same_rows_whatever_the_number_of_processes(pair, case, stage):  # noqa: F811
    check_rows(pair, case, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_sixteen_engines_take_no_more_memory_than_two(stage, tmp_path):
    fresh = Pair(tmp_path)
    for resident in fresh.ask("life", *two(stage))["resident"]:
        assert resident[-1] <= 1.05 * resident[1]
    fresh.end()


@pytest.mark.parametrize("stage", (0, 1))
@pytest.mark.parametrize("method", CORE)
def test_a_run_of_two_processes_has_the_weights_and_scores_of_one(runs, method, stage):  # noqa: F811
    check_equal_runs(runs(method, stage)["path"], runs(method)["path"])


def test_memory_does_not_grow_over_sixteen_stages(cache_dir, tmp_path):
    folder = tmp_path / "ranks"
    folder.mkdir()
    fresh = Pair(folder)
    short = [
        "stream=seq16",
        "stream.limit=16",
        "stream.train_rows=24",
        "stream.test_rows=6",
        "train.steps=2",
        "probe.limit=12",
    ]
    places = [f"cache_dir={cache_dir}", f"results_dir={tmp_path / 'results'}"]
    found = fresh.ask("run", *TINY_MODEL, *short, *QUIET, *places, "method=seq", *two(2))
    fresh.end()
    for rank, resident in enumerate(found["resident"]):
        assert len(resident) == 16
        print(
            f"rank {rank}: {resident[1] / 2**20:.0f} MiB after stage 2, {resident[15] / 2**20:.0f} MiB after stage 16"
        )
        assert resident[15] <= 1.05 * resident[1]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_its_parent(overrides, tmp_path, how):
    command = [sys.executable, "-m", "clbench", *overrides, *two(), "train.steps=1000"]
    parent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    ledgers = tmp_path / "results" / "runs"
    wait_for(lambda: any('"stage": 0,' in path.read_text() for path in ledgers.glob("*/scores.jsonl")), parent)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(ranks_among(children)) == 2
    parent.send_signal(how)
    assert parent.wait(30) != 0
    assert not psutil.wait_procs(children, timeout=10)[1]
    if how == signal.SIGTERM:
        (path,) = ledgers.glob("*/status")
        assert path.read_text() == "interrupted\n"


def test_the_error_of_the_first_rank_is_told_once(overrides):
    with pytest.raises(RankFailed, match="a mistake of ours") as told:
        launch(ranks.broken, compose([*overrides, *two()]), command="")
    assert str(told.value).count("Traceback") == 1


def test_ranks_that_diverge_end_as_one_process_does(overrides):
    broken = [*overrides, *two(), "train.lr=1e30", "train.clip=0", "train.schedule=constant", "train.warmup=0"]
    path = launch(take_part, compose(broken), command="")
    assert (path / "status").read_text().startswith("diverged")


def test_joining_ranks_started_by_another_launcher(overrides, tmp_path):
    processes = start_ranks([sys.executable, "-m", "clbench", *overrides, *two(1)], tmp_path)
    codes = [process.wait(240) for process in processes]
    assert codes == [0, 0], (tmp_path / "rank-0.log").read_text()[-3000:]
    (path,) = (tmp_path / "results" / "runs").glob("*/status")
    assert path.read_text() == "complete\n"
    assert len(json.loads((path.parent / "manifest.json").read_text())["tasks"]) == 3
