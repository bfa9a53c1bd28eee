"""What is said while a run works: the live line's log lines, how far an examination is, and how long it all will take."""

import json
import logging
import math
import time
from dataclasses import replace

import pytest

from clbench import progress
from clbench.config.composition import compose
from clbench.examine.matrix import Matrix
from clbench.examine.student import Student
from clbench.experiment import run
from clbench.progress import Line
from clbench.record.forecast import Forecast, seconds_of
from clbench.record.tracking import Tracker, written_to
from clbench.types import Example, Score
from tests.test_probes import closed, one_stage, stage, tiny_student


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.02)


@pytest.mark.parametrize("quiet", [False, True])
def test_a_log_file_has_a_line_every_so_often_even_while_nothing_is_reported(hasty, tmp_path, caplog, quiet):
    others = logging.getLogger("clbench").handlers[:]
    with written_to(tmp_path / "run"), Line("reading", total=4, quiet=quiet) as line:
        line.show(1, "reading: row 1/4")
        time.sleep(0.5)
    written = (tmp_path / "run" / "run.log").read_text().splitlines()
    assert len(written) >= 5 and all("reading: row 1/4, about" in one and one.endswith("left") for one in written[1:])
    # What a terminal or a plain log shows is at INFO, what only the file holds is below.
    assert {record.levelno for record in caplog.records} == {logging.DEBUG if quiet else logging.INFO}
    assert logging.getLogger("clbench").handlers == others


def test_time_left_is_at_the_pace_of_what_was_done_here(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    line = Line("work", total=1, quiet=True)
    line.begin(10, done=4)
    assert math.isnan(line.left)
    now[0] = 130.0
    line.show(6, "work")  # two of ten in 30 s, so four more take 60
    assert line.left == pytest.approx(60)


def test_a_student_reports_every_forward_and_every_batch_of_answers():
    heard = []
    plain = tiny_student()
    student = Student(plain.model, plain.encoder, tokens=20, report=lambda *one: heard.append(one))
    tests = closed("abcabcabc")
    list(Matrix(name="stream").measure(student, one_stage(stage(tests)), 1))
    assert {one[:2] for one in heard} == {("stream", "toy")} and len(heard) > 3
    done = [one[2] for one in heard]
    assert done == sorted(set(done)) and heard[-1][2:] == (9, 9)  # a prompt is one request, its choices share it
    heard.clear()
    open_task = stage(tuple(Example(id=str(i), prompt="A man " * (9 * i + 1), answer="x") for i in range(5)))
    list(Matrix(name="stream").measure(student, one_stage(open_task), 1))
    assert heard[-1] == ("stream", "toy", 5, 5)


FORECAST = Forecast(
    training=(10.0, 20.0, 30.0, 40.0),
    examining={("knowledge", "quiz"): 5.0, ("stream", "a"): 1.0},
    cadence={"knowledge": "ends"},
    views=2,
)


def test_a_forecast_adds_training_and_what_is_due_on_every_view():
    # Views are examined twice: 2 s of the stream after each stage, 10 s more of knowledge after the last.
    assert [FORECAST.until(stage) for stage in range(5)] == [0.0, 12.0, 34.0, 66.0, 118.0]
    said = FORECAST.spoken(done=0)
    assert said.startswith("about 2 min to go on this machine: training 2 min (4 stages, 25 s each on average), ")
    assert "examining 18 s (most of it: knowledge quiz 10 s, stream a 8.0 s)" in said
    assert "about 52 s to go" in FORECAST.spoken(done=3) and said.endswith("s)")
    assert replace(FORECAST, left_out="replay comes").spoken(done=0).endswith("s); replay comes on top")


def test_a_tasks_seconds_are_those_of_all_its_scores():
    def score(metric, seconds):
        facts = {"stage": 0, "stage_name": "base", "probe": "p", "value": 0.0, "n": 1, "stderr": 0.0}
        return Score(**facts, task="t", metric=metric, seconds=seconds)

    assert seconds_of([score("acc", 3.0), score("f1", 0.0), score("bleu", 1.5)]) == {("p", "t"): 4.5}


def test_the_live_line_stands_where_the_forecast_says(overrides):
    config = compose(overrides)
    tracker = Tracker(config, stages := [stage(closed("ab"))] * 4, silent=True)
    shown = []
    tracker._line.show = lambda done, text: shown.append((done, text))
    tracker.expect(FORECAST, finished=1)
    tracker.step(stages[0], 5, 10, None)  # of stage 1: half of 10 s
    tracker.examining(4, "fast", "knowledge", "quiz", 1, 2)
    tracker.examining(4, "fast", "stream", "a", 1, 4)
    tracker.examining(4, "slow", "knowledge", "quiz", 2, 2)
    assert [done for done, _ in shown] == [5.0, 66 + 40 + 2.5, 66 + 40 + 5.25, 66 + 40 + 5 + 1 + 5]
    assert shown[1][1].endswith("stage 4/4 examining: knowledge quiz  1/2")


def test_a_runs_log_names_probe_task_and_rows_also_of_the_untouched_model(hasty, overrides):
    written = (run(compose([*overrides, "probe.limit=101"])) / "run.log").read_text()
    assert "untouched model, examining: knowledge world_facts_x4  " in written
    assert "to go on this machine: training" in written and "stage 3/3 examining: " in written


@pytest.mark.slow
@pytest.mark.parametrize(("method", "stage", "steps", "rows"), [("seq", 1, 120, 16), ("er", 2, 30, 64)])
def test_forecast_and_run_agree_within_a_factor_of_one_and_a_half(overrides, method, stage, steps, rows):
    """Before the first stage, and with replay before the second: many rows a step, as a step of the tiny model takes long by itself."""
    longer = (f"train.steps={steps}", f"train.batch_size={rows}", "stream.train_rows=400", "stream.test_rows=200")
    path = run(compose([*overrides, *longer, "probe.limit=null", f"method={method}"]))
    said = [line for line in (path / "run.log").read_text().splitlines() if "to go on this machine" in line]
    seconds = float(said[stage - 1].split("about ")[1].split(" s")[0])
    costs = [json.loads(line) for line in (path / "cost.jsonl").read_text().splitlines()]
    taken = sum(cost["seconds_train"] + cost["seconds_probe"] for cost in costs[stage:])
    assert 1 / 1.5 < seconds / taken < 1.5, (seconds, taken)


@pytest.mark.parametrize(("arguments", "rows"), [(["method=er_trace"], 2), (["method=er", "stream.limit=1"], 1)])
def test_of_replay_after_a_task_is_said_that_it_grows_and_of_one_task_nothing_more(
    overrides, arguments, rows, monkeypatch
):
    told = []
    monkeypatch.setattr(Tracker, "expect", lambda tracker, forecast, *, finished: told.append(forecast.left_out))
    run(compose([*overrides, *arguments]))
    assert told == ["replay yet to come and what the method adds come", "the replay of further tasks comes"][:rows]


def test_after_the_first_stage_the_forecast_has_the_replay_and_the_pace_that_were_seen(overrides, monkeypatch):
    told = []
    monkeypatch.setattr(Tracker, "expect", lambda tracker, forecast, *, finished: told.append((forecast, finished)))
    path = run(compose([*overrides, "method=er"]))
    (before, none), (after, one) = told
    assert (none, one) == (0, 1) and before.left_out and not after.left_out
    costs = [json.loads(line) for line in (path / "cost.jsonl").read_text().splitlines()]
    pace = costs[1]["seconds_train"] / costs[1]["tokens_trained"]
    read = [cost["tokens_trained"] + cost["tokens_replayed"] for cost in costs[2:]]
    assert all(cost["tokens_replayed"] for cost in costs[2:])
    assert list(after.training[1:]) == pytest.approx([pace * tokens for tokens in read], rel=0.1)
