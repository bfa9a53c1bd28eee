"""The papers' numbers: what the file holds, and which of ours stand beside them."""

import csv
import json
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from pytest import approx
from test_leaderboard import ALPHA, BETA, T_HALF, TASKS, change_manifest, write_run

from clbench import published
from clbench.published import COLUMNS, STATUSES, Published, beside, find_published, main, read_published
from clbench.runs import read_runs
from clbench.statistics import entries
from clbench.types import UserMistake

ROOT = Path(__file__).resolve().parent.parent
ROWS = read_published(ROOT / "results" / "published.csv")
OUR_NAME = re.compile(r"[a-z][a-z0-9_]*")  # the papers' own words have capitals, spaces or begin with a digit
ONE_STAGE = {"commonsense_170k"}  # named as its authors name it


def numbers(**where):
    """Values of the rows whose columns have these values, in file order."""
    return [row.value for row in ROWS if all(vars(row)[column] == value for column, value in where.items())]


# --- the file


def test_no_number_is_stated_twice():
    keys = [tuple(vars(row)[column] for column in COLUMNS[:10]) for row in ROWS]
    assert len(keys) == len(set(keys)) == 390


def test_every_row_says_where_it_comes_from_and_how_sure_that_is():
    assert {row.status for row in ROWS} == set(STATUSES)
    for row in ROWS:
        assert re.fullmatch(r"\d{4}\.\d{5}", row.arxiv) or row.arxiv == "" and row.status != "primary", row
        assert all((row.paper, row.source, row.stream, row.model, row.method, row.after, row.metric)), row
        assert all(cell == cell.strip() for cell in vars(row).values() if isinstance(cell, str)), row


def test_rates_are_fractions_of_one():
    free = {"token_perplexity", "F_Delta", "spectral norm of the update", "relative output norm"}
    assert {row.metric for row in ROWS if not -1 <= row.value <= 1} <= free


@pytest.mark.parametrize("stream", sorted({row.stream for row in ROWS if OUR_NAME.fullmatch(row.stream)} - ONE_STAGE))
def test_a_stream_named_as_ours_is_ours_with_the_tasks_of_the_rows(stream):
    path = ROOT / "conf" / "stream" / f"{stream}.yaml"
    if not path.is_file():
        pytest.skip(f"conf/stream/{stream}.yaml does not exist yet")
    tasks = set(OmegaConf.load(path).tasks)
    rows = [row for row in ROWS if row.stream == stream]
    prefix = stream.rpartition("_")[0] + "_"
    assert {row.after for row in rows} - {"base", "end"} <= tasks
    for row in rows:
        if row.task.startswith((prefix, f"{stream}_")):
            assert row.task in tasks
            stated = OmegaConf.load(ROOT / "conf" / "task" / f"{row.task}.yaml").metric
            assert row.metric in (stated, "exact_match"), row  # exact match is recorded of every closed task


def test_a_method_named_as_ours_is_ours():
    own = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")}
    named = {row.method for row in ROWS if OUR_NAME.fullmatch(row.method)} - {"reference"}
    assert named <= own and {"secura", "curlora", "clora", "ilora", "seq", "olora", "base"} <= named


def test_numbers_are_those_of_the_papers():
    curlora = {"paper": "CURLoRA", "model": "Mistral-7B-v0.3", "setting": "rank 16", "source": "Table 1"}
    assert numbers(**curlora, method="seq", task="wikitext2", after="end") == [65055.02]
    assert numbers(**curlora, method="curlora", task="wikitext2", after="end") == [5.44]
    assert numbers(**curlora, method="seq", task="curlora3_published_mrpc") == [0.65, 0.32, 0.32]
    gpt2 = {"paper": "CURLoRA", "model": "GPT-2 Large", "method": "curlora", "setting": "rank 8"}
    assert numbers(**gpt2, source="notebook output") == [0.7034, 0.7569, 0.7059, 0.9971, 0.7059, 0.7603, 28.24]
    k2048 = {"paper": "CLoRA", "method": "clora", "setting": "rank 32, alpha 64, k 2048"}
    assert numbers(**k2048, task="bbh") == [0.3867] and numbers(**k2048, task="mmlu_pro") == [0.2059]
    trace = {"paper": "TRACE", "source": "Table 1", "model": "LLaMA-2-7B-chat", "method": "seq"}
    assert numbers(**trace) == [0.127, -0.457]
    assert numbers(paper="SECURA", source="abstract") == [0.0359, 0.0251, 0.7]
    assert [row.status for row in ROWS if row.paper == "I-LoRA"] == ["unverified"]


def test_trace_matrices_give_the_printed_average_and_backward_transfer():
    trace = {"paper": "TRACE", "model": "LLaMA-2-7B-chat"}
    for method in ("seq_full", "seq", "er_trace"):
        rows = [row for row in ROWS if row.source == "Appendix Tables 7-21" and row.method == method]
        final = {row.task: row.value for row in rows if row.after == "end"}
        own = {row.task: row.value for row in rows if row.after != "end"}
        assert len(final) == 8 and len(own) == 7
        average, transfer = numbers(**trace, source="Table 1", method=method)
        assert np.mean(list(final.values())) == approx(average, abs=6e-4)
        # T-1 denominator; the matrices are rounded to .001, so a mean of differences is good to .001 and its own rounding.
        assert np.mean([final[task] - value for task, value in own.items()]) == approx(transfer, abs=1.5e-3)


def test_trace_general_ability_changes_by_the_printed_mean():
    trace = {"paper": "TRACE", "source": "Table 2"}
    base = numbers(**trace, method="base")
    for method in ("seq_full", "seq", "er_trace"):
        *after, change = numbers(**trace, method=method)
        assert len(after) == len(base) == 6
        assert np.mean(after) - np.mean(base) == approx(change, abs=1e-4)


def test_olora_logs_average_to_the_stated_average():
    rows = [row for row in ROWS if row.stream == "olora_order1"]
    for method, group in groupby(rows, key=lambda row: row.method):
        *tasks, average = [row.value for row in group]
        assert len(tasks) == 4 and np.mean(tasks) == approx(average, abs=6e-5), method


# --- reading


ROW = {
    **{
        "paper": "P",
        "arxiv": "",
        "source": "Table 1",
        "stream": "three",
        "model": "GPT",
        "method": "alpha",
        "setting": "",
    },
    **{
        "task": "",
        "after": "end",
        "metric": "average_accuracy",
        "value": "0.5",
        "status": "primary",
        "note": "careful",
    },
}


def write_published(folder, *rows, columns=COLUMNS):
    """A file of published numbers: ROW with some columns changed."""
    with (folder / "published.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**ROW, **row} for row in rows)
    return folder / "published.csv"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": "sure"}, "line 3 has status 'sure'; choose one of primary, transcribed, unverified"),
        ({"value": "high"}, "line 3 has value 'high'"),
        ({"value": "nan"}, "line 3 has value 'nan'"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, change, said):
    with pytest.raises(UserMistake, match=re.escape(said)):
        read_published(write_published(tmp_path, {}, change))


def test_other_columns_or_cells_are_a_mistake(tmp_path):
    with pytest.raises(UserMistake, match="it must have paper, arxiv"):
        read_published(write_published(tmp_path, columns=COLUMNS[:-1]))
    path = write_published(tmp_path, {})
    path.write_text(path.read_text() + "P,,Table 1\n")
    with pytest.raises(UserMistake, match="line 3 must have 13 cells"):
        read_published(path)


def test_the_nearest_file_is_read(tmp_path, monkeypatch):
    package = tmp_path / "site" / "clbench"
    package.mkdir(parents=True)
    monkeypatch.setattr(published, "_HERE", package)
    results = tmp_path / "results"
    results.mkdir()
    with pytest.raises(UserMistake, match="is in none of"):
        find_published(results)
    installed = write_published(package, {})
    assert find_published(results) == installed
    checkout = tmp_path / "site" / "results"
    checkout.mkdir()
    for folder in (checkout, results):
        nearer = write_published(folder, {})
        assert find_published(results) == nearer


# --- beside


def add_run(results, method, *, tasks=TASKS, **arguments):
    """A run of the stream "three", whose configuration names `tasks`."""
    run = write_run(results, method, **arguments)
    config = json.loads((run / "manifest.json").read_text())["config"]
    change_manifest(run, config={**config, "stream": {"name": "three", "tasks": list(tasks)}})
    return run


@pytest.fixture
def results(tmp_path):
    for seed in range(3):
        add_run(tmp_path, "alpha", seed=seed, matrix=ALPHA)
        add_run(tmp_path, "beta", seed=seed, matrix=BETA)
    return tmp_path


def ours(results, **columns):
    """What stands beside ROW with some columns changed: (mean, low, high, seeds, model) each."""
    row = Published(**{**ROW, **columns, "value": 0.5})
    return [(one.mean, one.low, one.high, one.n_seeds, one.name) for one in beside(row, entries(read_runs(results)))]


MODEL = "tiny, data abc123"


def test_a_measure_of_the_leaderboard_stands_beside_its_row(results):
    # Seeds 0, 1, 2 add 0, .01, .02 to every score: .01 on the mean.
    mean = 2 / 3 + 0.01
    assert ours(results) == [(approx(mean), approx(mean - T_HALF), approx(mean + T_HALF), 3, MODEL)]
    assert ours(results, method="beta", metric="bwt") == [(*[approx(-0.45)] * 3, 3, MODEL)]
    assert ours(results, metric="retention")[0][0] == approx(0.5 / 0.75)


def test_a_score_of_a_task_is_that_of_the_stage_it_was_published_for(results):
    food = {"task": "food", "metric": "accuracy"}
    assert ours(results, **food) == [(approx(0.61), approx(0.61 - T_HALF), approx(0.61 + T_HALF), 3, MODEL)]
    assert ours(results, **food, after="sums")[0][0] == approx(0.26)
    assert ours(results, **food, after="food")[0][0] == approx(0.71)
    assert ours(results, **food, after="base") == [(*[approx(0.2)] * 3, 3, MODEL)]
    assert ours(results, task="facts", metric="acc", after="food")[0][0] == approx(0.8)
    assert ours(results, task="heldout", metric="bits_per_byte")[0][0] == approx(0.75)


@pytest.mark.parametrize(
    "columns",
    [
        {"stream": "four"},
        {"method": "gamma"},
        {"metric": "accuracy"},  # no measure of a whole stream
        {"metric": "gain over DoRA"},
        {"after": "base"},  # the leaderboard has averages of the end only
        {"task": "verse", "metric": "accuracy"},
        {"task": "food", "metric": "rougeL"},
        {"task": "food", "metric": "accuracy", "after": "verse"},
    ],
)
def test_nothing_stands_beside_another_row(results, columns):
    assert ours(results, **columns) == []


def test_seeds_that_did_not_all_measure_a_score_state_none(results):
    run = next((results / "runs").glob("demo-alpha-s2*"))
    lines = (run / "scores.jsonl").read_text().splitlines(keepends=True)
    (run / "scores.jsonl").write_text(
        "".join(line for line in lines if '"food", "metric": "format_validity"' not in line)
    )
    assert ours(results, task="food", metric="format_validity") == []


def test_a_seed_that_was_run_twice_counts_once(results):
    add_run(results, "alpha", seed=2, matrix=ALPHA, name="again")
    ((mean, _, _, n_seeds, _),) = ours(results, task="food", metric="accuracy")
    assert (mean, n_seeds) == (approx(0.61), 3)


def test_part_of_a_stream_another_order_and_unranked_runs_stand_beside_nothing(tmp_path):
    add_run(tmp_path, "alpha", seed=0, matrix=ALPHA, tasks=(*TASKS, "verse"))  # stream.limit=3
    add_run(tmp_path, "alpha", seed=1, matrix=ALPHA, tasks=TASKS[::-1])
    add_run(tmp_path, "alpha", seed=2, matrix=ALPHA, failed=["chance"])
    assert ours(tmp_path) == []


def test_variants_models_and_one_seed_are_told_apart(results):
    add_run(results, "alpha", seed=0, matrix=BETA, steps=120)
    other = add_run(results, "beta", seed=0, matrix=BETA, steps=60, name="other")
    change_manifest(other, model="large")
    first, second = ours(results)
    assert re.fullmatch(r"tiny \[[0-9a-f]{8}\], data abc123", first[4]) and first[4] != second[4]
    assert (second[0], second[3]) == (approx(0.4), 1) and np.isnan(second[1:3]).all()
    assert sorted(one[3:] for one in ours(results, method="beta")) == [(1, "large, data abc123"), (3, MODEL)]


# --- the command


def command(*arguments):
    """`python -m clbench.published arguments`."""
    return subprocess.run([sys.executable, "-m", "clbench.published", *arguments], capture_output=True, text=True)


def test_the_command_prints_ours_beside_the_right_row_and_nowhere_else(results):
    write_published(
        results,
        {},
        {"method": "gamma", "note": "[other] budget", "setting": "rank 8"},
        {"source": "log", "value": "65055.02", "metric": "F"},
    )
    done = command(str(results))
    assert (done.returncode, done.stderr) == (0, "")
    assert "this is a juxtaposition, not a reproduction" in done.stdout
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "alpha end average_accuracy 0.5 1 0.677 [0.652, 0.702] 3 tiny, data abc123" in lines
    assert "gamma rank 8 end average_accuracy 0.5 2 -" in lines
    assert "alpha end F 65055.02 1 -" in lines
    assert {"P, Table 1, primary; model GPT; stream three", "P, log, primary; model GPT; stream three"} <= set(lines)
    assert {"1 careful", "2 [other] budget"} <= set(lines)
    assert done.stdout.count("0.677") == 1 and lines[-1].endswith("published.csv; ours stands beside 1.")


def test_the_project_file_is_shown_without_any_run_of_ours(tmp_path, capsys):
    assert main([str(tmp_path), "--stream", "curlora3_published", "--method", "curlora"]) == 0
    shown = capsys.readouterr().out
    assert "28.25" in shown and "65055.02" not in shown and "TRACE" not in shown
    assert "ours stands beside 0." in shown


def test_runs_that_are_left_out_are_named(tmp_path, capsys):
    write_published(tmp_path, {})
    add_run(tmp_path, "alpha", seed=0, matrix=ALPHA, tasks=(*TASKS, "verse"))
    assert main([str(tmp_path)]) == 0
    said = "Left out, as of other tasks or in another order: three, default, alpha, tiny, data abc123."
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stream", "seq99"], "--stream 'seq99' is in no row of"),
        (["--method", "Seq"], "--method 'Seq' is in no row of"),
        (["--stream", "olora_order1", "--method", "secura"], "leave one of them out"),
        (["--colour"], "unrecognized arguments: --colour; see python -m clbench.published --help"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, said):
    assert main([str(tmp_path), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and said in printed.err


def test_a_missing_results_dir_is_one_line_and_exit_code_2(tmp_path):
    done = command(str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "nowhere" in done.stderr
