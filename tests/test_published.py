"""The papers' numbers: what the file holds, and which of ours stand beside them in the report."""

import json
import re
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf
from pytest import approx
from test_leaderboard import ALPHA, BETA, T_HALF, TASKS, change_manifest, reseal, write_run

from clbench.record.runs import read_runs
from clbench.report import html as report
from clbench.report import published
from clbench.report.published import beside
from clbench.report.summary import summarise

ROOT = Path(__file__).resolve().parent.parent
TABLE = pd.read_csv(ROOT / "results" / "published.csv", keep_default_na=False)
ROWS = list(TABLE.itertuples(index=False))
STATUSES = {"primary", "transcribed", "unverified"}
OUR_NAME = re.compile(r"[a-z][a-z0-9_]*")  # the papers' own words have capitals, spaces or begin with a digit
ONE_STAGE = {"commonsense_170k"}  # named as its authors name it


def numbers(**where):
    """Values of the rows whose columns have these values, in file order."""
    return TABLE[np.logical_and.reduce([TABLE[column] == value for column, value in where.items()])]["value"].tolist()


# --- the file


def test_the_file_has_its_columns_and_only_finite_values():
    assert list(TABLE) == [
        *("paper", "arxiv", "source", "stream", "model", "method", "setting"),
        *("task", "after", "metric", "value", "status", "note"),
    ]
    assert np.isfinite(TABLE["value"]).all()


def test_no_number_is_stated_twice():
    assert len(TABLE) == 390 and not TABLE.duplicated(list(TABLE)[:10]).any()


def test_every_row_says_where_it_comes_from_and_how_sure_that_is():
    assert set(TABLE["status"]) == STATUSES
    for row in ROWS:
        assert re.fullmatch(r"\d{4}\.\d{5}", row.arxiv) or row.arxiv == "" and row.status != "primary", row
        assert all((row.paper, row.source, row.stream, row.model, row.method, row.after, row.metric)), row
        assert all(cell == cell.strip() for cell in row if isinstance(cell, str)), row


def test_rates_are_fractions_of_one():
    free = {"token_perplexity", "F_Delta", "spectral norm of the update", "relative output norm"}
    assert {row.metric for row in ROWS if not -1 <= row.value <= 1} <= free


@pytest.mark.parametrize("stream", sorted({row.stream for row in ROWS if OUR_NAME.fullmatch(row.stream)} - ONE_STAGE))
def test_a_stream_named_as_ours_is_ours_with_the_tasks_of_the_rows(stream):
    tasks = set(OmegaConf.load(ROOT / "conf" / "stream" / f"{stream}.yaml").tasks)
    rows = [row for row in ROWS if row.stream == stream]
    prefix = stream.rpartition("_")[0] + "_"
    assert {row.after for row in rows} - {"base", "end"} <= tasks
    for row in rows:
        if row.task.startswith((prefix, f"{stream}_")):
            assert row.task in tasks
            stated = OmegaConf.load(ROOT / "conf" / "task" / f"{row.task}.yaml").metric
            # Exact match is recorded of every closed task. TRACE's own ROUGE-L is another than ours, and stands beside none.
            theirs = {"trace_meetingbank": "rougeL", "trace_py150": "edit_similarity"}.get(row.task, "exact_match")
            assert row.metric in (stated, theirs), row


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


# --- beside


ROW = {
    **{"paper": "P", "arxiv": "", "source": "Table 1", "stream": "three", "model": "GPT", "method": "alpha"},
    **{"setting": "", "task": "", "after": "end", "metric": "average_accuracy", "value": 0.5},
    **{"status": "primary", "note": "careful"},
}


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


@pytest.fixture
def stated(tmp_path, monkeypatch):
    """Makes rows of a file of published numbers, ROW with some columns changed, the file that is read."""

    def write(*rows):
        pd.DataFrame([ROW | row for row in rows]).to_csv(tmp_path / "published.csv", index=False)
        monkeypatch.setattr(published, "PLACES", (tmp_path / "nonesuch.csv", tmp_path / "published.csv"))

    return write


@pytest.fixture
def ours(results, stated):
    """What stands beside ROW with some columns changed: (mean, low, high, seeds, label) each."""

    def found(folder=results, **columns):
        stated(columns)
        summary = summarise(read_runs(folder))
        table = beside(summary, summary.leaderboard)
        assert len(table) >= (columns.get("stream", "three") == "three") * (folder == results)
        return table[table["mean"].notna()][["mean", "low", "high", "n_seeds", "label"]].to_numpy().tolist()

    return found


def test_a_measure_of_the_leaderboard_stands_beside_its_row(ours):
    # Seeds 0, 1, 2 add 0, .01, .02 to every score: .01 on the mean.
    mean = 2 / 3 + 0.01
    assert ours() == [[approx(mean), approx(mean - T_HALF), approx(mean + T_HALF), 3, "alpha"]]
    assert ours(method="beta", metric="bwt") == [[*[approx(-0.45)] * 3, 3, "beta"]]
    assert ours(metric="retention")[0][0] == approx(0.5 / 0.75)


def test_a_score_of_a_task_is_that_of_the_stage_it_was_published_for(ours):
    food = {"task": "food", "metric": "accuracy"}
    assert ours(**food) == [[approx(0.61), approx(0.61 - T_HALF), approx(0.61 + T_HALF), 3, "alpha"]]
    assert ours(**food, after="sums")[0][0] == approx(0.26)
    assert ours(**food, after="food")[0][0] == approx(0.71)
    assert ours(**food, after="base") == [[*[approx(0.2)] * 3, 3, "alpha"]]
    assert ours(task="facts", metric="acc", after="food")[0][0] == approx(0.8)
    assert ours(task="heldout", metric="bits_per_byte")[0][0] == approx(0.75)


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
def test_nothing_stands_beside_another_row(ours, columns):
    assert ours(**columns) == []


def test_seeds_that_did_not_all_measure_a_score_state_none(ours, results):
    run = next((results / "runs").glob("demo-alpha-s2*"))
    lines = (run / "scores.jsonl").read_text().splitlines(keepends=True)
    (run / "scores.jsonl").write_text(
        "".join(line for line in lines if '"food", "metric": "format_validity"' not in line)
    )
    reseal(run)
    assert ours(task="food", metric="format_validity") == []


def test_a_seed_that_was_run_twice_counts_once(ours, results):
    add_run(results, "alpha", seed=2, matrix=ALPHA, name="again")
    ((mean, _, _, n_seeds, _),) = ours(task="food", metric="accuracy")
    assert (mean, n_seeds) == (approx(0.61), 3)


def test_part_of_a_stream_another_order_and_unranked_runs_stand_beside_nothing(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("partial")
    add_run(folder, "alpha", seed=0, matrix=ALPHA, tasks=(*TASKS, "verse"))  # stream.limit=3
    add_run(folder, "alpha", seed=1, matrix=ALPHA, tasks=TASKS[::-1])
    add_run(folder, "alpha", seed=2, matrix=ALPHA, failed=["chance"])
    assert ours(folder) == []


def test_of_a_row_with_several_orders_only_the_published_one_counts(ours, results):
    for seed in range(3):
        add_run(results, "alpha", seed=seed, matrix=BETA, order="reversed")
    mean = 2 / 3 + 0.01
    assert ours() == [[approx(mean), approx(mean - T_HALF), approx(mean + T_HALF), 3, "alpha"]]


def test_variants_and_one_seed_are_told_apart(ours, results):
    add_run(results, "alpha", seed=0, matrix=BETA, steps=120)
    first, second = ours()
    assert all(re.fullmatch(r"alpha \[[0-9a-f]{8}\]", one[4]) for one in (first, second)) and first[4] != second[4]
    assert (second[0], second[3]) == (approx(0.4), 1) and np.isnan(second[1:3]).all()


# --- in the report


def test_the_report_shows_ours_beside_the_right_row_and_nowhere_else(results, stated):
    stated({}, {"method": "gamma", "note": "<other> budget", "setting": "rank 8"}, {"value": 65055.02, "metric": "F"})
    page = report.write(results).read_text(encoding="utf-8")
    assert "a juxtaposition, not a reproduction" in page and "&lt;other&gt; budget" in page
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]
    shown = {tuple(row[3:]) for row in cells if row[:3] == ["P", "Table 1", "GPT"]}
    assert shown == {
        (
            *("alpha", "", "", "end", "average_accuracy", "0.5"),
            "0.677 [0.652, 0.702], n = 3, alpha",
            "primary",
            "careful",
        ),
        (*("gamma", "rank 8", "", "end", "average_accuracy", "0.5"), "-", "primary", "&lt;other&gt; budget"),
        (*("alpha", "", "", "end", "F", "65055.02"), "-", "primary", "careful"),
    }


def test_the_report_of_a_stream_of_no_paper_has_no_published_numbers(results, stated):
    stated({"stream": "four"})
    assert "Published numbers" not in report.write(results).read_text(encoding="utf-8")


def test_the_projects_own_file_is_found():
    assert published.PLACES[1] == ROOT / "results" / "published.csv"
