"""What is done with a recorded run: the stages that it keeps, examined on other probes, and two runs compared."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

from clbench import compare, export
from clbench.config.composition import CONF_DIR, compose, with_probes
from clbench.experiment import run
from clbench.experiment.afterwards import examine_again, recorded
from clbench.record import examined as records
from clbench.record.ledger import KEPT, read_checkpoint
from clbench.record.runs import pack, read_runs
from clbench.report import tables
from clbench.types import UserMistake
from clbench.verify import verify
from tests.conftest import small
from tests.test_export import base_of, check, logits

METHODS = sorted(path.stem for path in (CONF_DIR / "method").glob("*.yaml"))
TWO = ("stream.limit=2", "train.lr=1e-2", "train.checkpoint=all", "probe.text_tokens=256")
SAME = ("probe=world", "probe.limit=12", "probe.text_tokens=256")
"""The probes that the tiny runs have themselves, so that their records say what an examination has to give."""
NO_WEIGHT = "secura_release"
"""The method whose outputs no weight gives."""


def scores(lines) -> dict[tuple[int, str, str, str], tuple[float, int]]:
    """What was measured by stage, probe, task and metric, floors and what training says of itself aside."""
    return {
        (one["stage"], one["probe"], one["task"], one["metric"]): (one["value"], one["n"])
        for one in lines
        if one["probe"] not in ("canaries", "data")
    }


def own_scores(path: Path):
    return scores(json.loads(line) for line in (path / "scores.jsonl").read_text().splitlines())


def examined_scores(file: Path):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return scores(score for line in lines[:-1] for score in line["scores"])


@pytest.mark.parametrize(
    "method",
    [name if name in ("ilora", "seq_merge") else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_kept_stages_give_the_scores_that_were_recorded_and_are_exported(method, overrides, cache_dir, tmp_path):
    path = run(compose([*overrides, *TWO, *small(method)]))
    assert examined_scores(examine_again(path, SAME)) == own_scores(path)
    assert verify(path) == ([], 1)
    (view, *others) = read_runs(path.parents[1]).by_view().runs["run"]
    for name in (view, *others):
        rows = compare.compare(*[compare.read_side(path.with_name(name))] * 2)
        assert {row.key[0] for row in rows} >= {"stream", "knowledge"} and all(row.first == row.second for row in rows)
        assert all(row.low <= 0 <= row.high for row in rows if row.n_items) and sum(row.n_items > 0 for row in rows) > 4
    with export.trained(path, stage=1) as (first, *_), export.trained(path) as (last, *_):
        assert torch.equal(logits(first), logits(last)) == (method == "base")
    for name, stage in ((view, 1), *((other, 2) for other in others)):
        if method == NO_WEIGHT:
            with pytest.raises(UserMistake, match="cannot be exported"):
                export.export_run(path.with_name(name), tmp_path / name, stage=stage)
        else:
            trains = method != "base"
            check(path.with_name(name), tmp_path / name, base_of(cache_dir), stage=stage, trains=trains)


@pytest.fixture(scope="module")
def kept(tiny, tmp_path_factory) -> Path:
    """A run of SEQ that has kept both its stages, and one with another seed that has kept the last, with tables."""
    results = tmp_path_factory.mktemp("kept")
    path = run(compose([*tiny, *TWO, f"results_dir={results}"]))
    run(compose([*tiny, *TWO, "train.checkpoint=last", "seed=1", f"results_dir={results}"]))
    tables.refresh(results)
    return path


@pytest.fixture()
def results(kept, tmp_path) -> Path:
    """A copy to write to."""
    return Path(shutil.copytree(kept.parents[1], tmp_path / "copied"))


def seeds(results: Path) -> list[Path]:
    return sorted((results / "runs").iterdir(), key=lambda path: path.name.partition("-s")[2])


def test_all_keeps_what_every_stage_trained_and_nothing_of_the_base(kept):
    manifest = json.loads((kept / "manifest.json").read_text())
    first, last = (read_checkpoint(kept / "checkpoint" / KEPT.format(stage), run=manifest["run"]) for stage in (1, 2))
    assert (first.stage, last.stage) == (1, 2) and not first.moments
    assert first.weights and all("lora" in name for name in first.weights)
    assert any(not first.weights[name].equal(last.weights[name]) for name in first.weights)
    end = read_checkpoint(kept / "checkpoint" / "stage.safetensors", run=manifest["run"])
    assert all(end.weights[name].equal(value) for name, value in last.weights.items())
    files = {path.name for path in (kept / "checkpoint").iterdir()}
    assert files == {"stage.safetensors", "stage-01.safetensors", "stage-02.safetensors"}
    other = seeds(kept.parents[1])[1]
    assert [path.name for path in (other / "checkpoint").iterdir()] == ["stage.safetensors"]
    assert sorted(recorded(kept).checkpoints) == [1, 2] and sorted(recorded(other).checkpoints) == [2]


def test_the_stages_that_are_kept_are_no_part_of_a_runs_identity(kept):
    assert json.loads((kept / "manifest.json").read_text())["config"]["train"]["checkpoint"] == "all"
    assert verify(kept) == ([], 1)
    assert len({path.name.rpartition("-s")[0] for path in seeds(kept.parents[1])}) == 1


OTHER = ("probe=world", "probe.tasks=[world_facts_x64]", "probe.limit=5", "probe.text_tokens=64")


@pytest.fixture(scope="module")
def examined_once(kept, tmp_path_factory) -> Path:
    """The same runs, both examined on other probes."""
    folder = tmp_path_factory.mktemp("examined") / "results"
    shutil.copytree(kept.parents[1], folder)
    for path in seeds(folder):
        examine_again(path, OTHER)
    return folder


@pytest.fixture()
def examined(examined_once, tmp_path) -> tuple[Path, Path]:
    """A copy to write to: its results directory, and the examination of the run that has kept all."""
    results = Path(shutil.copytree(examined_once, tmp_path / "copied"))
    (file,) = (seeds(results)[0] / "examined").iterdir()
    return results, file


def rows(results: Path, file: str = "stages.csv") -> list[dict[str, str]]:
    return list(csv.DictReader((results / file).open()))


def test_an_examination_stands_in_the_tables_and_ranks_nothing(examined):
    results, file = examined
    before = {path.name: path.read_bytes() for path in results.glob("*.*") if path.name != "stages.csv"}
    (path, other), stages = seeds(results), rows(results)
    assert re.fullmatch(r"world-[0-9a-f]{8}\.jsonl", file.name) and (other / "examined" / file.name).is_file()
    tables.refresh(results)
    found = [row for row in rows(results) if "/" in row["probe"]]
    assert {int(row["stage"]) for row in found if row["run"] == path.name} == {0, 1, 2}
    assert {int(row["stage"]) for row in found if row["run"] == other.name} == {
        0,
        2,
    }  # the untouched model and the last
    knowledge = {"run": path.name, "metric": "acc", "task": "world_facts_x64", "stage": "2"}
    (one,) = [row for row in found if row["probe"] == f"{file.stem}/knowledge" and row.items() >= knowledge.items()]
    assert one["n"] == "5"
    assert [row for row in rows(results) if "/" not in row["probe"]] == stages
    assert {name: (results / name).read_bytes() for name in before} == before
    assert verify(results) == ([], 2)
    pack(results)
    shutil.rmtree(results / "runs")
    assert verify(results) == ([], 2)


def test_an_examination_goes_on_with_the_stages_that_it_lacks(results):
    path, _ = seeds(results)
    file = examine_again(path, OTHER, stage=1)
    assert {key[0] for key in examined_scores(file)} == {0, 1}
    first = file.read_text().splitlines()
    assert examine_again(path, OTHER) == file
    assert {key[0] for key in examined_scores(file)} == {0, 1, 2}
    assert file.read_text().splitlines()[:2] == first[:2]
    whole = file.read_bytes()
    examine_again(path, OTHER)
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.write_bytes(file.read_bytes().replace(b"0.2", b"0.3", 1)), "is not what it was"),
        (lambda file: file.write_bytes(file.read_bytes()[:-200]), "Error"),
        (
            lambda file: file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[1:])),
            "is not what it was",
        ),
        (lambda file: file.rename(file.with_stem("mine")), "is not what it was"),
        (lambda file: file.write_bytes(b""), "Error"),
    ],
)
def test_a_damaged_examination_costs_its_own_numbers_alone(examined, damage, said, caplog):
    results, file = examined
    path, other = seeds(results)
    ranked = (results / "leaderboard.csv").read_bytes()
    damage(file)
    tables.refresh(results)
    assert {row["run"] for row in rows(results) if "/" in row["probe"]} == {other.name}
    assert (results / "leaderboard.csv").read_bytes() == ranked
    (told,) = [line for line in caplog.messages if "its numbers are left out" in line]
    assert path.name in told
    found, count = verify(path)
    assert count == 1 and len(found) == 1 and said in found[0], found


def test_an_examination_of_another_run_is_not_taken(examined):
    results, file = examined
    path, other = seeds(results)
    shutil.copy(file, other / "examined")
    assert f"is of {path.name}" in verify(other)[0][0]
    with pytest.raises(UserMistake, match=r"is damaged .*remove it to examine again"):
        examine_again(other, OTHER)


def test_a_score_of_an_examination_that_does_not_follow_from_its_items_is_named(examined):
    file, name = examined[1], f"examined/{examined[1].name}"
    path = file.parents[1]
    lines = records.read({name: file.read_bytes()}, file=name, run=path.name)
    score = next(one for one in lines[2]["scores"] if one["metric"] == "acc")
    score["value"] += 0.1
    file.write_bytes(records.written(lines, file=name))
    assert any(f"{file.stem}/knowledge|world_facts_x64|acc is" in one for one in verify(path)[0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("probe.limit=5",), "name the probes"),
        (("probe=nonesuch",), "nonesuch"),
        (("probe=world", "train.lr=1"), "train.lr is not to be given"),
        (("probe=world", "stage=7"), "has not kept stage=7, but 1, 2"),
        (("probe=world", "stage=two"), "stage='two'"),
    ],
)
def test_what_cannot_be_examined_is_one_line(words, said, kept, command):
    code, _, errors = command("clbench.examine", kept, *words)
    assert code == 2 and said in errors and errors.count("\n") == 1, errors


def test_the_embedded_world_is_not_asked_of_a_model_that_was_not_told_of_it(tmp_path):
    places = (f"data_dir={tmp_path}", f"results_dir={tmp_path}")
    config = compose(["model.name=a/b", "stream=seq16_local", "probe=local", *places])
    with pytest.raises(UserMistake, match="invented world"):
        with_probes(config, ["probe=world"])
    assert with_probes(config, ["probe=mini_local"])[1].probe.tasks[0] == "mmlu"


def test_compared_runs_differ_by_what_their_records_say(kept):
    first, second = (compare.read_side(path) for path in seeds(kept.parents[1]))
    own, other = (own_scores(path) for path in seeds(kept.parents[1]))
    found = {row.key: row for row in compare.compare(first, second)}
    assert (first.stage, second.stage) == (2, 2)
    probes = {key[0] for key in found}
    assert probes == {"stream", "knowledge", "perplexity", "divergence", "update"}
    shown = {"accuracy", "exact_match", "acc", "probability", "nll_token", "kl_token", "relative_norm"}
    assert {key[2] for key in found} == shown
    for key, row in found.items():
        assert (row.first, row.second) == (own[2, *key][0], other[2, *key][0])
    (divergence,) = [row for key, row in found.items() if key[0] == "divergence"]
    with np.load(seeds(kept.parents[1])[0] / "items" / "stage-02.npz") as one:
        a = one["divergence|world_text|kl_token"].astype(np.float64)
    with np.load(seeds(kept.parents[1])[1] / "items" / "stage-02.npz") as one:
        b = one["divergence|world_text|kl_token"].astype(np.float64)
    bounds = ttest_rel(a, b).confidence_interval(0.95)
    assert (divergence.low, divergence.high) == pytest.approx((bounds.low, bounds.high))
    (text,) = [row for key, row in found.items() if key[0] == "perplexity"]
    assert text.low < text.first - text.second < text.high
    assert all(row.n_items for key, row in found.items() if key[0] != "update")


def test_only_the_same_questions_are_paired(kept):
    first, second = (compare.read_side(path) for path in seeds(kept.parents[1]))

    def paired(manifest: dict) -> set[str]:
        other = replace(second, asked={"": manifest})
        return {row.key[0] for row in compare.compare(first, other) if row.n_items}

    manifest = second.asked[""]
    rows = {task: one | {"test_sha256": "other"} for task, one in manifest["data"].items()}
    facts = {name: one | {"sha256": "other"} for name, one in manifest["probe_data"].items()}
    assert paired(manifest) == {"stream", "knowledge", "perplexity", "divergence"}
    assert paired(manifest | {"data": rows}) == {"knowledge", "perplexity", "divergence"}
    assert paired(manifest | {"probe_data": facts}) == {"stream"}
    assert paired(manifest | {"model_fingerprint": "other"}) == {"stream", "knowledge"}


def test_the_command_prints_a_table_of_80_columns(kept, command):
    paths = seeds(kept.parents[1])
    code, out, errors = command("clbench.compare", *paths)
    lines = [line.rstrip() for line in out.splitlines()]
    assert code == 0 and max(map(len, lines)) <= 80, errors
    assert any(line.startswith("first: seq16-seq-s0") for line in lines)
    assert any(line.strip() == "perplexity" for line in lines)
    row = r"world_text +nll_token +\d\.\d{3} +\d\.\d{3} +[+-]0\.\d{3} \([+-]\d\.\d{3}, [+-]\d\.\d{3}\) +\d+"
    assert any(re.fullmatch(row, line) for line in lines), out
    code, _, errors = command("clbench.compare", paths[0], kept.parent / "none")
    assert code == 2 and errors.count("\n") == 1, errors
