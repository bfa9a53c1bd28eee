"""What holds for every input, tried on inputs that nobody thought of: damaged records, scores, draws, configurations."""

import json
import math
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from clbench.config import Config, from_plain, groups, keys, run_hash
from clbench.config.checks import check
from clbench.config.composition import compose
from clbench.config.secrets import masked
from clbench.data.memory import Memory
from clbench.data.sampling import draw, epoch_indices
from clbench.record.ledger import Ledger, status_of
from clbench.record.runs import read_lines, read_runs
from clbench.report import metrics
from clbench.types import Cost, Example, NotWritten, Score, Source, UserMistake
from tests.conftest import TINY_MODEL
from tests.test_faults import AT, COST, MANIFEST, checkpoint

EACH = settings(max_examples=100, derandomize=True, database=None, deadline=None)
FULL = MANIFEST | {
    **{"experiment": "demo", "stream": "two", "order": "default", "model": "tiny", "method": "seq", "seed": 0},
    **{"variant": "v", "config": {}, "config_hash": "h", "git": {"commit": "c", "dirty": False}, "canaries": {}},
    **{"tasks": ["sums", "words"], "metrics": {"sums": "accuracy", "words": "accuracy"}},
}
STAGES = 2


def write_stages(path: Path, status: str) -> dict[int, dict[str, bytes]]:
    """Records two stages and the untouched model at `path`; gives what of them was sealed after each stage."""
    kept = {}
    with Ledger(path, manifest=FULL) as record:
        for stage in range(STAGES + 1):
            record.append([Score(stage=stage, stage_name="sums", items=(1.0, 0.0), **AT)])
            record.append_cost(Cost(**COST | {"stage": stage}))
            record.save(checkpoint(stage))
            kept[stage] = of_stages(path)
    (path / "status").write_text(status)
    return kept


def of_stages(path: Path) -> dict[str, bytes]:
    """The records that grow with the stages."""
    names = [path / "scores.jsonl", path / "cost.jsonl", *(path / "items").iterdir()]
    return {str(file.relative_to(path)): file.read_bytes() for file in names}


@pytest.fixture(scope="module", params=["complete\n", "interrupted\n"])
def recorded(request, tmp_path_factory) -> tuple[dict[str, bytes], dict[int, dict[str, bytes]], Path]:
    """The files of a run, what was sealed after each stage, and the folder of damaged runs."""
    path = tmp_path_factory.mktemp("whole")
    kept = write_stages(path, request.param)
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    del files["lock"]
    return files, kept, tmp_path_factory.mktemp("results") / "runs"


PLACE = st.integers(0, 2**20)
SOME = st.binary(min_size=1, max_size=8) | st.sampled_from(
    [b"\n", b"{", b"}", b'"', b"9", b"null", b"[]", b"\xff", b"\0"]
)
CHANGES = st.one_of(
    st.tuples(st.just("cut"), PLACE, st.none()),
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("insert"), PLACE, SOME),
    st.tuples(st.just("overwrite"), PLACE, SOME),
    st.tuples(st.just("without a line"), PLACE, st.none()),
    st.tuples(st.just("a line twice"), PLACE, st.none()),
    st.tuples(st.just("gone"), st.none(), st.none()),
)


def changed(content: bytes, change: tuple[str, Any, Any]) -> bytes | None:
    """Content of a file after a change; None: there is no file."""
    kind, place, what = change
    if kind == "gone" or not content:
        return None
    lines = content.splitlines(keepends=True)
    if kind == "without a line":
        return b"".join(lines[: place % len(lines)] + lines[place % len(lines) + 1 :])
    if kind == "a line twice":
        return b"".join(lines[: place % len(lines) + 1] + lines[place % len(lines) :])
    place %= len(content)
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << what]) + content[place + 1 :]
    return (
        content[:place]
        + {"cut": b"", "insert": what, "overwrite": what}[kind] * (kind != "cut")
        + {"cut": b"", "insert": content[place:], "overwrite": content[place + len(what or b"") :]}[kind]
    )


def put(path: Path, files: dict[str, bytes | None]) -> None:
    """Has `path` hold these files and no others."""
    for name in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
    for file in path.rglob("*"):
        if file.is_file() and str(file.relative_to(path)) not in files:
            file.unlink()
    for name, content in files.items():
        if content is None:
            (path / name).unlink(missing_ok=True)
        else:
            (path / name).write_bytes(content)


def check_damaged_records(recorded, changes: list[tuple[str, tuple[str, Any, Any]]]) -> list[str]:
    """Reads runs of each of which a file was changed, for the tables and to continue them; says what came of the latter."""
    files, kept, runs = recorded
    paths = [runs / f"{number}" for number in range(len(changes))]
    for path, (name, change) in zip(paths, changes, strict=True):
        put(path, files | {name: changed(files[name], change)})
    records, prefixes = read_runs(runs.parent), [read_lines(one["scores.jsonl"]) for one in kept.values()]
    for row in records.runs.itertuples():
        scores = records.scores[records.scores["run"] == row.run].drop(columns="run").to_dict("records")
        assert "\n" not in row.problem
        if row.state == "unreadable":
            assert row.problem and not scores
        else:
            assert scores in [[], *prefixes]
            assert row.state != "complete" or scores == prefixes[-1]
    return [check_resumed(path, kept) for path in paths]


def check_resumed(path: Path, kept: dict[int, dict[str, bytes]]) -> str:
    try:
        status_of(path, FULL, resume="auto")
        record = Ledger(path, manifest=FULL)
    except (UserMistake, NotWritten) as refusal:
        assert "\n" not in str(refusal) and str(path) in str(refusal)
        return "refused"
    record._lock.close()
    if record.finished >= 0:
        assert record.load().stage == record.finished
    assert of_stages(path) == kept.get(record.finished, {"scores.jsonl": b"", "cost.jsonl": b""})
    return "the sealed prefix"


NAMES = ("scores.jsonl", "cost.jsonl", "seals.jsonl", "manifest.json", "status", "items/stage-01.npz")
NAMES += ("checkpoint/stage.safetensors",)
AT_ONCE = 10


@pytest.mark.parametrize("count", [100, pytest.param(5000, marks=pytest.mark.slow)])
def test_of_a_damaged_record_the_sealed_part_is_read_or_one_line_refuses_it(recorded, count):
    outcomes: Counter[str] = Counter()
    one = st.tuples(st.sampled_from(NAMES), CHANGES)

    @settings(EACH, max_examples=count // AT_ONCE, suppress_health_check=[HealthCheck.too_slow])
    @given(changes=st.lists(one, min_size=AT_ONCE, max_size=AT_ONCE))
    def each(changes):
        outcomes.update(check_damaged_records(recorded, changes))

    each()
    assert outcomes.total() >= count and set(outcomes) == {"refused", "the sealed prefix"}, outcomes


def matrices(least: int = 2) -> st.SearchStrategy[np.ndarray]:
    """Scores of 2 to 6 tasks, each trained in a stage of its own."""
    shape = st.integers(least, 6).map(lambda tasks: (tasks + 1, tasks))
    return arrays.arrays(np.float64, shape, elements=st.floats(0, 1))


@EACH
@given(scores=matrices())
def test_an_average_lies_among_the_scores_and_what_is_forgotten_is_at_least_what_was_lost(scores):
    tasks = scores.shape[1]
    assert scores[-1].min() - 1e-12 <= metrics.average_accuracy(scores) <= scores[-1].max() + 1e-12
    # The best score before the end is at least that of the own stage.
    assert metrics.forgetting(scores) >= -metrics.bwt(scores) - 1e-12
    assert metrics.accuracy_so_far(scores)[-1] == pytest.approx(metrics.average_accuracy(scores))
    # AA = LA + BWT (T - 1) / T: the last task has nothing to lose.
    gained = metrics.bwt(scores) * (tasks - 1) / tasks
    assert metrics.average_accuracy(scores) == pytest.approx(metrics.learning_accuracy(scores) + gained, abs=1e-12)


@EACH
@given(scores=matrices(), scale=st.floats(0.1, 100), shift=st.floats(-5, 5))
def test_transfer_and_forgetting_are_in_the_unit_of_the_scores_wherever_that_begins(scores, scale, shift):
    for measure in (metrics.bwt, metrics.fwt, metrics.forgetting):
        assert measure(scale * scores + shift) == pytest.approx(scale * measure(scores), abs=1e-9)


@EACH
@given(scores=matrices(), constant=st.floats(0, 1))
def test_a_model_that_never_changes_transfers_and_forgets_nothing(scores, constant):
    still = np.tile(scores[:1], (len(scores), 1))
    for measure in (metrics.bwt, metrics.fwt, metrics.forgetting):
        assert measure(still) == 0
    assert metrics.average_accuracy(np.full_like(scores, constant)) == pytest.approx(constant)


OUTCOMES = st.integers(20, 60).flatmap(lambda n: st.tuples(*2 * [st.lists(st.booleans(), min_size=n, max_size=n)]))


@settings(EACH, max_examples=40)
@given(pairs=st.lists(OUTCOMES, min_size=1, max_size=3), floor=st.floats(0, 0.5))
def test_retention_is_one_where_nothing_changed_and_lies_within_its_interval(pairs, floor):
    before = {str(number): np.array(pair[0], dtype=float) for number, pair in enumerate(pairs)}
    after = {str(number): np.array(pair[1], dtype=float) for number, pair in enumerate(pairs)}
    floors = dict.fromkeys(before, floor)
    same = metrics.retention(before, after=before, floor=floors, chance=floors)
    other = metrics.retention(before, after=after, floor=floors, chance=floors)
    assert math.isnan(same.retention) == math.isnan(other.retention)
    for found in (same, other):
        assert bool(found.reason) or not math.isnan(found.retention)
        for probe in found.probes:
            assert 0 <= probe.lost_corrected <= probe.lost <= 1 and 0 <= probe.gained_corrected <= probe.gained
            assert probe.delta == pytest.approx(probe.gained - probe.lost)
    if not math.isnan(same.retention):
        assert same.retention == 1 and same.lost == same.gained == 0
        assert other.retention_low <= other.retention_high and same.retention_low <= 1 <= same.retention_high


@EACH
@given(values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9), level=st.floats(0.5, 0.99))
def test_an_interval_is_centred_at_the_mean_and_wider_at_a_higher_level(values, level):
    mean, low, high = metrics.interval(values, level=level)
    assert low <= mean <= high and high - mean == pytest.approx(mean - low, abs=1e-6)
    assert mean == pytest.approx(np.mean(values), abs=1e-6)
    _, lower, higher = metrics.interval(values, level=(1 + level) / 2)
    assert lower <= low + 1e-9 and higher >= high - 1e-9


@EACH
@given(size=st.integers(1, 40), count=st.integers(1, 30), steps=st.integers(1, 6), seed=st.integers(0, 2**63 - 1))
def test_every_epoch_passes_each_row_once_however_it_is_cut_into_steps(size, count, steps, seed):
    drawn = [epoch_indices(size, start=step * count, count=count, seed=seed, stage=1) for step in range(steps)]
    together = [index for step in drawn for index in step]
    assert together == epoch_indices(size, start=0, count=count * steps, seed=seed, stage=1)
    for start in range(0, len(together) - size + 1, size):
        assert sorted(together[start : start + size]) == list(range(size))


def examples(size: int, kind: str) -> tuple[Example, ...]:
    return tuple(Example(id=f"{kind}/{number}", prompt="p", answer="a") for number in range(size))


@EACH
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    shares=st.tuples(*3 * [st.floats(0, 2)]),
    batch_size=st.integers(1, 16),
    step=st.integers(0, 50),
    seed=st.integers(0, 99),
)
def test_a_batch_has_of_every_source_its_share_whatever_was_drawn_before(sizes, shares, batch_size, step, seed):
    sources = [Source(examples=examples(size, str(n)), share=shares[n], weight=n + 1) for n, size in enumerate(sizes)]
    rows = draw(sources, batch_size=batch_size, step=step, seed=seed, stage=2)
    for number, source in enumerate(sources):
        own = [row for row in rows if row[1] == number]
        assert len(own) == (round(source.share * batch_size) if source.examples else 0)
        assert all(example in source.examples and weight == number + 1 for example, _, weight in own)
    draw(sources, batch_size=batch_size + 1, step=step + 1, seed=seed, stage=3)
    assert draw(sources, batch_size=batch_size, step=step, seed=seed, stage=2) == rows


@EACH
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    fraction=st.floats(0, 1),
    capacity=st.none() | st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_a_memory_holds_what_it_may_of_what_it_was_offered_and_comes_back_from_its_state(
    sizes, fraction, capacity, seed
):
    memory, offered = Memory(), []
    for stage, size in enumerate(sizes, start=1):
        new = examples(size, str(stage))
        offered += new
        memory.take(new, fraction=fraction, capacity=capacity, seed=seed, stage=stage)
    ids = [example.id for example in memory.examples]
    most = sum(math.ceil(fraction * size) for size in sizes) if capacity is None else min(capacity, len(offered))
    assert len(set(ids)) == len(ids) == most and memory.seen == len(offered)
    assert set(memory.examples) <= set(offered)
    again = Memory()
    again.restore(memory.state())
    assert again == memory


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("configured")
    return asdict(compose([*TINY_MODEL, "method=ewc", f"results_dir={folder}", f"cache_dir={folder}"]))


def at(nested: dict[str, Any], name: str) -> Any:
    group, _, last = name.rpartition(".")
    return (nested[group] if group else nested)[last]


def put_at(nested: dict[str, Any], name: str, value: Any) -> None:
    group, _, last = name.rpartition(".")
    (nested[group] if group else nested)[last] = value


def kept(name: str) -> st.SearchStrategy[Any]:
    """Values that `config.key` allows for a key: numbers in its range, one of its words; None where it has neither."""
    facts = keys()[name]
    group, _, last = name.rpartition(".")
    shape = groups()[group] if group else Config
    kind = str(next(own.type for own in fields(shape) if own.name == last))
    least, most = facts.get("least", -math.inf), min(facts.get("most", math.inf), 1e9)
    if facts.get("among"):
        return st.sampled_from(facts["among"])
    if "float" in kind:
        below = facts.get("below", math.inf)
        return st.floats(max(least, -1e9), min(most, below), exclude_max=below <= most)
    return st.integers(int(max(least, 0)), int(most))


RANGED = [name for name, facts in keys().items() if math.isfinite(facts.get("least", -math.inf)) or facts.get("among")]
# What depends on more than its own range.
ALONE = [name for name in RANGED if not name.startswith("engine.") and name not in ("train.steps", "train.epochs")]


@settings(EACH, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_configuration_within_its_ranges_is_allowed_and_comes_back_from_json(plain, data):
    chosen = data.draw(st.sets(st.sampled_from(ALONE), max_size=6))
    new = json.loads(json.dumps(plain))
    for name in sorted(chosen):
        put_at(new, name, data.draw(kept(name), label=name))
    config = from_plain(new)
    check(config)
    assert asdict(config) == new and from_plain(json.loads(json.dumps(asdict(config)))) == config
    assert masked(masked(new)) == masked(new)
    # What no score depends on does not name the run, and everything else does.
    for name in chosen:
        if not keys()[name].get("identity", True):
            put_at(new, name, at(plain, name))
    assert run_hash(asdict(config)) == run_hash(new)
    assert (run_hash(new) == run_hash(plain)) == (new == plain)


def outside(name: str) -> tuple[list[float], st.SearchStrategy[float]]:
    """The numbers next to a key's range, and all that are not in it."""
    least, most, below = (keys()[name].get(bound, math.inf) for bound in ("least", "most", "below"))
    nearest = [math.nextafter(least, -math.inf), math.nextafter(most, math.inf), below, math.nan]
    ends = [(-1e300, nearest[0]), *((low, 1e300) for low in nearest[1:3] if low < math.inf)]
    return nearest, st.one_of(*(st.floats(low, high) for low, high in ends))


def refused(plain: dict[str, Any], name: str, value: float) -> None:
    new = json.loads(json.dumps(plain))
    put_at(new, name, value)
    with pytest.raises(UserMistake) as mistake:
        check(from_plain(new))
    assert str(mistake.value).startswith(f"{name}=") and "\n" not in str(mistake.value)


NUMBERS = [name for name in ALONE if not keys()[name].get("among")]


def test_the_numbers_next_to_a_range_are_one_line_that_names_the_key(plain):
    for name in NUMBERS:
        for value in outside(name)[0]:
            refused(plain, name, value)


@settings(EACH, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NUMBERS), data=st.data())
def test_a_number_outside_its_range_is_one_line_that_names_the_key(plain, name, data):
    refused(plain, name, data.draw(outside(name)[1]))
