"""The report's page: its bytes, and what a browser makes of it."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from pytest import approx
from test_leaderboard import ALPHA, BETA, noisy, reseal, write_blocks, write_manifest, write_run

from clbench.report import figures
from clbench.report import html as report
from clbench.report import tables as leaderboard

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium")
HOSTILE = '</script><b onclick="x">&\'*'
BANDS = {"facts": "facts_x4", "logic": "facts_x16"}

# Before the page's own script: nothing may go wrong unheard.
EARLY = """
const wrong = [];
addEventListener("error", (event) => wrong.push(event.message));
addEventListener("securitypolicyviolation", (event) => wrong.push(event.violatedDirective));
console.error = console.warn = (...words) => wrong.push(words.join(" "));
"""
# After it: clicks, and what is then there, as JSON in the page.
LATE = """
const found = {wrong, titles: {}, width: [innerWidth, document.documentElement.scrollWidth], bold: document.querySelectorAll("main b").length};
const board = document.querySelector(".leaderboard"), all = (where, root = document) => [...root.querySelectorAll(where)];
const press = (name, root = board) => all("button", root).find((button) => button.textContent === name).click();
const shown = () => all("tbody tr", board).filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
const boxes = all("nav input"), set = (box, value) => { box.checked = value; box.dispatchEvent(new Event("change")); };
const collect = (figure, name = figure) => found.titles[name] = all(`.${figure} svg g > title, .${figure} svg circle > title`).map((title) => title.textContent);
const pick = (figure, value, name = "measure") => {
  const box = document.querySelector(`.${figure} select[name=${name}]`);
  box.value = value;
  box.dispatchEvent(new Event("change"));
};
found.ticked = boxes.filter((box) => box.checked).map((box) => box.value);
for (const figure of ["ranks", "stages", "items", "drift", "cost", "matrix"]) collect(figure);
pick("plane", "forgetting");
found.points = all(".plane [data-label]").map((point) => [point.dataset.label, ...["cx", "cy"].map((side) => point.querySelector("circle").getAttribute(side))]);
found.bars = all(".ranks rect").map((bar) => ["x", "width"].map((side) => Number(bar.getAttribute(side))));
for (const measure of ["retention", "retention_probability"]) { pick("plane", measure); collect("plane", measure); }
found.curves = {};
for (const across of ["average_accuracy", "learning_accuracy"]) {
  pick("plane", across, "across");
  found.curves[across] = all(".plane [data-curve]").map((curve) => [curve.dataset.curve, ...all("title", curve).map((title) => title.textContent)]);
}
found.front = document.querySelector(".cost [data-front]").dataset.front.split("|");
for (const measure of ["retention", "before"]) { pick("bands", measure); collect("bands", `bands ${measure}`); }
pick("verdicts", "kl_to_base"); collect("verdicts", "verdicts kl_to_base");
pick("verdicts", "average_accuracy"); collect("verdicts");
document.addEventListener("click", (event) => { if (event.target.download) event.preventDefault(); }); // nothing is saved
found.files = all("figcaption a").map((link) => { link.click(); return [link.download, link.href]; });
found.svgs = all(".plot svg").length;
found.units = all(".plot svg").map((svg) => all(".axis", svg).map((axis) => axis.textContent));
const beyond = (box, one) => one.left < box.left - 1 || one.right > box.right + 1 || one.top < box.top - 1 || one.bottom > box.bottom + 1;
found.cut = all(".stages svg, .bands svg, .matrix svg, .verdicts svg").flatMap((svg) =>
  all("text", svg).filter((words) => beyond(svg.getBoundingClientRect(), words.getBoundingClientRect())).map((words) => words.textContent));
const lines = () => [...new Set(all(".stages [data-label], .bands [data-label]").map((line) => line.dataset.label))].sort();
found.lines = [lines()];
set(boxes.find((box) => box.value === "alpha"), false);
found.lines.push(lines());
found.order = [shown()];
for (const name of ["accuracy", "accuracy", "probability kept", "probability kept", "method"]) { press(name); found.order.push(shown()); }
press("ticked"); found.filtered = {ticked: shown()};
press("may be the best"); found.filtered.best = shown();
press("all"); found.filtered.all = shown();
const search = document.querySelector("input[type=search]");
search.value = "ta"; search.dispatchEvent(new Event("input")); found.filtered.ta = shown();
found.colours = ["color", "backgroundColor"].map((name) => getComputedStyle(document.body)[name]);
document.body.append(Object.assign(document.createElement("pre"), {id: "found", textContent: JSON.stringify(found)}));
"""


def in_bands(run):
    """Its base-knowledge tasks as bands of facts that the text states 4 and 16 times; probabilities only where the name is harmless."""
    lines = (run / "scores.jsonl").read_text()
    if run.name == "demo-hostile":
        lines = "".join(line for line in lines.splitlines(keepends=True) if '"probability"' not in line)
    for name, band in BANDS.items():
        lines = lines.replace(f'"{name}"', f'"{band}"')
    (run / "scores.jsonl").write_text(lines)
    for path in (run / "items").iterdir():
        with np.load(path) as items:
            kept = {"|".join(BANDS.get(part, part) for part in key.split("|")): items[key] for key in items.files}
        if run.name == "demo-hostile":
            kept = {key: value for key, value in kept.items() if not key.endswith("|probability")}
        np.savez_compressed(path, **kept)
    reseal(run)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Runs of `write_blocks`, of a method with a hostile name, and one that failed, in bands; a search of alpha at three learning rates; all tables."""
    folder = tmp_path_factory.mktemp("report")
    write_blocks(folder)
    write_run(folder, HOSTILE, seed=0, matrix=BETA, name="demo-hostile")
    write_run(folder, "beta<b>", seed=9, matrix=BETA, status="failed", stages=1)
    write_run(folder, "diverging", seed=0, matrix=BETA, status="diverged: stage 2 of 3: a loss is not finite", stages=1)
    for run in (folder / "runs").iterdir():
        in_bands(run)
    for number, rate in enumerate((3e-4, 1e-3, 1e-2)):
        run = write_run(folder / "tuning", "alpha", seed=0, matrix=noisy(ALPHA, seed=number), name=f"tune-{number}")
        manifest = json.loads((run / "manifest.json").read_text())
        manifest["config"]["train"]["lr"] = rate
        write_manifest(run, manifest)
    leaderboard.refresh(folder / "tuning")
    leaderboard.refresh(folder)
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def found(results):
    """What the test script found in the page, on a narrow dark screen."""
    return seen(results, width=500, scheme=0)


def seen(results, *, width, scheme):
    """What the test script finds in the page on a screen of so many pixels, dark (0) or light (1)."""
    if CHROMIUM is None:
        pytest.skip("no chromium on the path")
    page = (results / "report.html").read_text(encoding="utf-8")
    page = page.replace("<head>", f"<head><script>{EARLY}</script>", 1)
    page = page.replace("</body>", f"<script>{LATE}</script></body>")
    (results / "tried.html").write_text(page, encoding="utf-8")
    look = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},900",
        f"--blink-settings=preferredColorScheme={scheme}",
    ]
    there = (results / "tried.html").as_uri()
    done = subprocess.run([CHROMIUM, *look, "--dump-dom", there], capture_output=True, text=True, timeout=120)
    said = re.search(r'<pre id="found">(.*)</pre>', done.stdout, re.DOTALL)
    assert said, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(unescape(said[1]))


def table(results, name):
    return pd.read_csv(results / name)


def numbers(title):
    """Every number of a text."""
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", title)]


def close(values):
    """Shown with four significant digits."""
    return approx(list(values), rel=1e-3, abs=1e-9)


def rows_of(results):
    """The leaderboard by method, as the page calls it."""
    return table(results, "leaderboard.csv").set_index("method").rename(index={"diverging": "diverging (diverged)"})


def by_label(titles):
    """What stands after the label of each title."""
    return dict(title.split(": ", 1) for title in titles)


def test_a_browser_finds_no_fault_and_no_markup_in_a_name(found):
    assert found["wrong"] == []
    assert found["bold"] == 0 and HOSTILE in found["order"][0]


def test_a_narrow_screen_is_not_overrun_and_a_dark_one_is_dark(found):
    inner, needed = found["width"]
    assert inner <= 500 and needed <= inner
    ink, paper = (np.mean(numbers(colour)[:3]) for colour in found["colours"])
    assert paper < 40 < 200 < ink


def test_a_wide_light_screen_shows_the_same_without_fault(found, results):
    wide = seen(results, width=1400, scheme=1)
    assert wide["wrong"] == wide["cut"] == [] and wide["order"] == found["order"]
    inner, needed = wide["width"]
    assert 1200 < inner <= 1400 and needed <= inner
    ink, paper = (np.mean(numbers(colour)[:3]) for colour in wide["colours"])
    assert ink < 60 < 200 < paper


def test_a_click_on_a_heading_sorts_and_a_second_one_turns_it_round(found, results):
    rows, diverged = rows_of(results), "diverging (diverged)"  # which has no accuracy
    first, down, up, kept_down, kept_up, names = found["order"]
    assert first == list(rows.index) and {*names} == {*first}
    accuracy = [
        [round(rows["average_accuracy"][method], 3) for method in order if method != diverged] for order in (down, up)
    ]
    assert accuracy == [sorted(accuracy[0], reverse=True), sorted(accuracy[0])] and accuracy[0] != accuracy[1]
    assert {*kept_down[-2:]} == {*kept_up[-2:]} == {HOSTILE, diverged}  # which have none
    assert [name for name in names if name != HOSTILE] == sorted(rows.index.drop(HOSTILE))


def test_filters_leave_the_rows_that_they_name(found, results):
    filtered, ranks = found["filtered"], rows_of(results)["average_accuracy_rank_best"]
    assert {*filtered["ticked"]} == {*found["ticked"]} - {"alpha"}
    assert {*filtered["best"]} == {*ranks.index[ranks == 1]} and "beta" not in filtered["best"]
    assert {*filtered["all"]} == {*ranks.index}
    assert {*filtered["ta"]} == {"beta", "delta"}


def test_lines_are_those_of_the_ticked_methods(found):
    before, after = found["lines"]
    assert before == sorted(found["ticked"]) and after == [label for label in before if label != "alpha"]


def test_the_plane_shows_the_leaderboards_means_and_intervals(found, results):
    rows = rows_of(results)
    for measure in ("retention", "retention_probability"):
        titles = by_label(title for title in found["titles"][measure] if "learning rate" not in title)
        assert {*titles} == {*rows.index[rows[measure].notna()]}
        for method, title in titles.items():
            shown = rows.loc[
                method, [f"{name}{end}" for name in ("learning_accuracy", measure) for end in ("", "_low", "_high")]
            ]
            assert numbers(title) == close(shown.dropna()), method


def test_points_and_bars_stand_where_their_numbers_say(found, results):
    rows = rows_of(results)
    names, across, down = zip(*found["points"], strict=True)
    x, y = (np.array(side, dtype=float) for side in (across, down))
    for places, measure, sense in ((x, "learning_accuracy", 1), (y, "forgetting", -1)):
        assert np.corrcoef(places, rows.loc[list(names), measure])[0, 1] == approx(sense)
    ranks = rows[["average_accuracy_rank_best", "average_accuracy_rank_worst"]].dropna().to_numpy()
    lefts, widths = np.array(found["bars"]).T
    (step, start), spans = np.polyfit(ranks[:, 0], lefts, 1), ranks[:, 1] - ranks[:, 0]
    assert lefts == approx(start + step * ranks[:, 0]) and widths == approx(step * (spans + 0.6), rel=1e-3)


@pytest.mark.parametrize("across", ["learning_accuracy", "average_accuracy"])
def test_a_learning_rate_curve_goes_through_the_searchs_points_in_the_order_of_the_rates(found, results, across):
    tuned = table(results / "tuning", "leaderboard.csv")
    rates = tuned["notes"].str.extract(r"train\.lr=([\d.e-]+)", expand=False).astype(float)
    ((label, *titles),) = found["curves"][across]
    points = tuned.assign(rate=rates).sort_values("rate")[["rate", across, "retention_probability"]]
    assert label == "alpha" and len(points) == 3
    assert [numbers(title) for title in titles] == [close(point) for point in points.to_numpy()]


def test_make_tune_leaves_the_search_where_the_reports_of_make_reference_look_for_it():
    def written(target):
        said = subprocess.run(["make", "-n", target, "RESULTS=R"], cwd=ROOT, capture_output=True, text=True, check=True)
        return {*re.findall(r"results_dir=(\S+)|clbench\.leaderboard (\S+ --pack)", said.stdout)}

    assert written("reference") == {("R/reference", ""), ("", "R/reference --pack")}
    assert written("tune") == {("R/reference/tuning", ""), ("", "R/reference/tuning --pack")}


def test_a_curve_is_of_one_stream_model_and_setting_and_has_two_rates(tmp_path):
    """Rates that differ in another setting as well are two curves."""
    notes = {
        ("three", "alpha"): [
            "method.rank=8, train.lr=0.001",
            "method.rank=8, train.lr=0.0001",
            "method.rank=4, train.lr=0.01",
        ],
        ("three", "beta"): ["train.lr=0.001, train.steps=60", "train.lr=None, train.steps=60"],
        ("three", "gamma"): [""],
        ("other", "alpha"): ["method.rank=8, train.lr=0.1"],
    }
    rows = [
        {"stream": stream, "model": "tiny", "method": method, "notes": f"dirty commit; variant: {note}; below base"}
        for (stream, method), own in notes.items()
        for note in own
    ]
    measured = dict.fromkeys(figures.DRAWN, 0.5) | {"bwt": None}
    pd.DataFrame(rows).assign(**measured).to_csv(tmp_path / "leaderboard.csv", index=False)
    of = {"stream": "three", "model": "tiny"}
    (curve,) = figures._tuning(tmp_path / "leaderboard.csv", pd.Series(of))
    assert (curve["method"], curve["others"]) == ("alpha", "method.rank=8")
    assert [(point["rate"], point["retention"], point["bwt"]) for point in curve["points"]] == [
        (0.0001, 0.5, None),
        (0.001, 0.5, None),
    ]
    assert not list(figures._tuning(tmp_path / "nothing.csv", pd.Series(of)))


def test_the_lines_over_stages_are_those_of_retention_csv(found, results):
    titles = [title for title in found["titles"]["stages"] if title.startswith("beta at 3:")]
    stages = table(results, "retention.csv").query("method == 'beta' and stage == 3")
    accuracy = rows_of(results).loc["beta", "average_accuracy"]
    assert numbers(titles[0])[1] == approx(accuracy, rel=1e-3)
    for title, measure in zip(titles[1:], ("retention", "retention_probability", "perplexity_ratio"), strict=True):
        assert numbers(title)[1:] == close(stages[measure].agg(["mean", "min", "max"])), measure


def test_bands_are_those_of_probes_csv(found, results):
    probes = table(results, "probes.csv").query("method == 'alpha' and stage == 3").groupby("task")
    for measure in ("retention", "before"):
        titles = [numbers(title)[:2] for title in found["titles"][f"bands {measure}"] if title.startswith("alpha at")]
        assert titles == [close([times, probes[measure].mean()[f"facts_x{times}"]]) for times in (4, 16)]


def test_ranks_are_the_leaderboards(found, results):
    ranks = rows_of(results)[["average_accuracy_rank_best", "average_accuracy_rank_worst"]].dropna()
    assert {label: numbers(title) for label, title in by_label(found["titles"]["ranks"]).items()} == {
        method: list(pair) for method, *pair in ranks.itertuples()
    }


def test_items_lost_and_gained_are_the_means_of_retention_csv(found, results):
    stages = (
        table(results, "retention.csv").query("stage == 3").groupby("method")[["lost_corrected", "gained_corrected"]]
    )
    for method, title in by_label(found["titles"]["items"]).items():
        lost, gained = (numbers(part)[0] for part in title.split(", gained"))
        assert [lost, gained] == close(stages.mean().loc[method]), method


def test_the_heat_map_shows_the_scores_of_stages_csv(found, results):
    best = rows_of(results).index[0]
    stages = table(results, "stages.csv").query(
        f"method == '{best}' and order == 'default' and seed == 0 and probe == 'stream'"
    )
    cells = stages[stages["metric"] == "accuracy"].set_index(["task", "stage_name"])["value"]
    shown = found["titles"]["matrix"]
    assert len(shown) == 3 * 4
    for title in shown:
        task, stage, value = re.fullmatch(r"(.*) after (.*): (.*) \(fraction of 1\)", title).groups()
        assert float(value) == approx(cells[task, stage], rel=1e-3), title


def test_the_matrix_of_verdicts_has_every_pair_both_ways(found, results):
    pairs = table(results, "differences.csv").set_index("measure")
    other_way = {"better": "worse", "worse": "better"}
    for measure, titles in (("average_accuracy", "verdicts"), ("kl_to_base", "verdicts kl_to_base")):
        shown, own = by_label(found["titles"][titles]), pairs.loc[measure]
        assert len(shown) == 2 * len(own) == 20
        for pair in own.itertuples():
            there, back = (
                shown[f"{one} against {other}"] for one, other in ((pair.method, pair.other), (pair.other, pair.method))
            )
            assert there.startswith(pair.verdict) and back.startswith(other_way.get(pair.verdict, pair.verdict))
            known = [value for value in (pair.difference, pair.low, pair.high) if value == value]
            assert numbers(there)[: len(known)] == close(known)
            assert numbers(back)[: len(known)] == close(-value for value in (known[0], *known[:0:-1]))


def test_the_front_holds_the_methods_that_no_cheaper_one_reaches(found, results):
    rows = rows_of(results)[["tokens_trained", "average_accuracy"]].dropna()
    costs, gains = rows["tokens_trained"], rows["average_accuracy"]
    beaten = {
        method
        for method, cost, gain in rows.itertuples()
        if ((costs <= cost) & (gains >= gain) & ((costs < cost) | (gains > gain))).any()
    }
    best = {*rows.index} - beaten
    assert {*found["front"]} == best and "still" in best and "beta" not in best


def test_every_figure_is_a_file_and_every_axis_has_a_unit(found):
    assert len(found["files"]) == found["svgs"] == 12  # nine figures, four of them over the stages
    for name, link in found["files"]:
        kind, content = link.split(",", 1)
        assert name.endswith(".svg") and kind == "data:image/svg+xml;charset=utf-8"
        assert ElementTree.fromstring(unquote(content)).tag == "{http://www.w3.org/2000/svg}svg"
    assert all(len(units) == 2 and all("(" in unit for unit in units) for units in found["units"])
    assert found["cut"] == []


def test_a_line_in_a_figures_file_is_named(found):
    files = {name: ElementTree.fromstring(unquote(link.split(",", 1)[1])) for name, link in found["files"]}
    texts = {
        name: {node.text for node in file.iter("{http://www.w3.org/2000/svg}text")} for name, file in files.items()
    }
    for name in ("accuracy.svg", "retention.svg", "perplexity_ratio.svg", "bands.svg"):
        assert {*found["ticked"]} <= texts[name], name
    assert {"untouched model", "chance"} <= texts["accuracy.svg"]


def test_the_report_is_one_self_contained_file(results):
    page = (results / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["']|https?://(?!www\.w3\.org/2000/svg)""", page)
    assert "beta<b>" not in page and "beta&lt;b&gt;" in page and page.count("</script>") == 2
    for text in ("alpha", "c0ffee", "python -m clbench method=alpha seed=0", "not ranked"):
        assert text in page, text


def test_the_report_of_nothing_says_so(tmp_path):
    assert "There are no runs yet." in report.write(tmp_path).read_text(encoding="utf-8")


def test_a_report_of_the_same_runs_has_the_same_bytes(results):
    before = (results / "report.html").read_bytes()
    assert report.write(results).read_bytes() == before
