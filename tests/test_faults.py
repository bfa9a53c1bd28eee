"""Records, checkpoints and caches that were touched: one line that names what it is, never other numbers and never a traceback."""

import dataclasses
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from clbench import cli
from clbench.config.composition import compose
from clbench.experiment import run
from clbench.record import ledger, untouched
from clbench.record.ledger import Checkpoint, Ledger, mark_interrupted, status_of
from clbench.record.manifest import FORMAT
from clbench.record.runs import remove_left
from clbench.types import Cost, NotWritten, Score, UserMistake
from tests.test_model import Text, recipe

MANIFEST = {"format": FORMAT, "run": "demo-seq-s0", "data": {}, "probe_data": {}, "model_fingerprint": "f"}
AT = {"probe": "stream", "task": "sums", "metric": "accuracy", "value": 0.5, "n": 2, "stderr": 0.1, "seconds": 1.0}
COST = {own.name: 0 for own in dataclasses.fields(Cost)}


def checkpoint(stage: int, *, step: int = 0, value: float = 1.0) -> Checkpoint:
    state = {"steps": stage, "memory": "text", "centre/w": torch.arange(3.0)}
    weights = {"b": torch.full((4, 2), value), "a": torch.ones(3, dtype=torch.bfloat16), "none": torch.ones(0)}
    return Checkpoint(stage=stage, step=step, weights=weights, state=state, moments={"step/b": torch.tensor(3.0)})


def recorded(path: Path, stages: int = 2, *, within: bool = True) -> Path:
    """A run that was interrupted after `stages` stages, within the next."""
    record = Ledger(path, manifest=MANIFEST)
    for stage in range(stages + 1):
        record.append([Score(stage=stage, stage_name="sums", items=(1.0, 0.0), **AT)])
        record.append_cost(Cost(**COST | {"stage": stage}))
        record.save(checkpoint(stage))
    if within:
        record.save(checkpoint(stages + 1, step=5))
    record.set_status("interrupted")
    record._lock.close()
    return path


def opened(path: Path) -> Ledger:
    """As a run that continues opens it."""
    status_of(path, MANIFEST, resume="auto")
    record = Ledger(path, manifest=MANIFEST)
    if record.finished >= 0:
        record.load()
        record.load_within()
    record._lock.close()
    return record


def refused(path: Path) -> str:
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(UserMistake) as mistake:
        opened(path)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before, "something was changed"
    line = str(mistake.value)
    assert str(path) in line and "\n" not in line
    return line


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    kept = Ledger(recorded(tmp_path), manifest=MANIFEST).load_within()
    expected = checkpoint(3, step=5)
    assert (kept.stage, kept.step) == (3, 5)
    for part in ("weights", "state", "moments"):
        found, wanted = getattr(kept, part), getattr(expected, part)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value


@pytest.mark.parametrize("name", [ledger.STAGE, ledger.WITHIN])
def test_no_flipped_bit_of_a_checkpoint_goes_unseen(tmp_path, name):
    path = recorded(tmp_path)
    whole = (path / "checkpoint" / name).read_bytes()
    places = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:150].tolist()
    for place in [0, 8, len(whole) - 1, *places]:
        (path / "checkpoint" / name).write_bytes(whole)
        flip(path / "checkpoint" / name, place)
        # A blank in the header that another character takes the place of may still be the same JSON.
        try:
            opened(path)
        except UserMistake as mistake:
            assert name in str(mistake) and "\n" not in str(mistake)
        else:
            assert Ledger(path, manifest=MANIFEST).load().weights["b"].equal(checkpoint(2).weights["b"])


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 999, None])
@pytest.mark.parametrize("name", [ledger.STAGE, ledger.WITHIN])
def test_a_checkpoint_that_is_cut_or_something_else_is_one_line(tmp_path, name, content):
    path = recorded(tmp_path)
    file = path / "checkpoint" / name
    file.write_bytes(file.read_bytes()[:-7] if content is None else content)
    assert name in refused(path)
    file.unlink()
    assert opened(path).finished == (2 if name == ledger.WITHIN else -1)


def test_a_checkpoint_of_another_run_is_one_line(tmp_path):
    path = recorded(tmp_path / "own")
    other = Ledger(tmp_path / "other", manifest=MANIFEST | {"run": "demo-ewc-s0"})
    other.save(checkpoint(2))
    shutil.copy(other.path / "checkpoint" / ledger.STAGE, path / "checkpoint")
    assert "demo-ewc-s0" in refused(path)


def test_checkpoints_of_equal_runs_are_equal_byte_for_byte(tmp_path):
    contents = {(recorded(tmp_path / str(number)) / "checkpoint" / ledger.STAGE).read_bytes() for number in range(4)}
    assert len(contents) == 1


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("scores.jsonl", lambda content: content.replace(b"0.5", b"0.9", 1)),
        ("scores.jsonl", lambda content: content[: len(content) // 2]),
        ("scores.jsonl", lambda content: b"\xff\xfe" + content),
        ("scores.jsonl", None),
        ("cost.jsonl", lambda content: b""),
        ("cost.jsonl", None),
        ("items/stage-01.npz", lambda content: content[:-1]),
        ("items/stage-00.npz", None),
        ("seals.jsonl", lambda content: content[:-2]),
        ("seals.jsonl", lambda content: b"[1]\n" + content),
        ("seals.jsonl", lambda content: content.replace(b'"stage": 2', b'"stage": 7')),
        ("seals.jsonl", None),
        ("manifest.json", lambda content: content.replace(b"demo-seq-s0", b"demo-seq-s1")),
        ("manifest.json", lambda content: content[:-20]),
        ("manifest.json", lambda content: b"[]"),
        ("manifest.json", lambda content: content.replace(b'"format": 1', b'"format": 0')),
        ("manifest.json", lambda content: content.replace(b'"format"', b'"former"')),
        ("manifest.json", lambda content: b"\xff\xfe\x00"),
        ("manifest.json", None),
    ],
)
def test_records_that_were_touched_are_one_line_and_left_as_they_are(tmp_path, name, damage):
    path = recorded(tmp_path)
    if damage is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(damage((path / name).read_bytes()))
    assert Path(name).name in refused(path)


@pytest.mark.parametrize("name", ["scores.jsonl", "cost.jsonl", "seals.jsonl", "items/stage-01.npz"])
def test_a_torn_tail_is_cut_back_to_the_last_sealed_stage(tmp_path, caplog, name):
    path = recorded(tmp_path)
    whole = (path / name).read_bytes()
    with (path / name).open("ab") as file:
        file.write(b'{"stage": 3, "val')
    with caplog.at_level(logging.INFO):
        assert opened(path).finished == 2 and (path / name).read_bytes() == whole
    assert f"beyond stage 2 is cut off: {name}" in caplog.text or name == "seals.jsonl"


def test_records_of_a_stage_that_is_not_finished_are_cut_off_and_said_to_be(tmp_path, caplog):
    path = recorded(tmp_path)
    expected = files(path)
    with Ledger(path, manifest=MANIFEST) as record:
        record.append([Score(stage=3, stage_name="sums", items=(1.0, 0.0), **AT)])
    with caplog.at_level(logging.INFO):
        opened(path)
    assert files(path) | {"status": b""} == expected | {"status": b""}
    assert "beyond stage 2 is cut off: scores.jsonl, items/stage-03.npz" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        opened(path)
    assert "cut off" not in caplog.text


def test_a_status_that_is_no_text_is_read_as_that_of_a_run_that_goes_on(tmp_path):
    path = recorded(tmp_path)
    (path / "status").write_bytes(b"\xffcomplete\n")
    assert opened(path).finished == 2
    mark_interrupted(path)
    assert (path / "status").read_text() == "interrupted\n"


def test_a_removed_checkpoint_is_said_to_lose_what_it_stood_for(tmp_path, caplog):
    path = recorded(tmp_path)
    (path / "checkpoint" / ledger.STAGE).unlink()
    with caplog.at_level(logging.WARNING):
        opened(path)
    assert "done again" in caplog.text


def test_a_cached_model_that_was_touched_is_made_again_and_said_so(tmp_path, monkeypatch, caplog):
    model, _ = recipe().load(tmp_path)
    whole = [
        parameter.clone() for parameter in model.parameters()
    ]  # the model's own are read from the file as they are used
    record = recipe().record(tmp_path)
    (folder,) = [path for path in (tmp_path / "models").iterdir() if path.is_dir()]
    middle = (folder / "model.safetensors").stat().st_size // 2
    damages = {
        "model.safetensors": lambda path: flip(path, middle),
        "tokenizer.json": lambda path: path.write_text(path.read_text().replace("cat", "cow")),
        "config.json": lambda path: path.write_text(path.read_text().replace("16", "18")),
        "recipe.json": lambda path: path.write_text("{"),
        "generation_config.json": Path.unlink,
        "": lambda path: (shutil.rmtree(path), path.write_text("")),
    }
    for name, damage in damages.items():
        damage(folder / name)
        caplog.clear()
        again, _ = recipe().load(tmp_path)
        assert caplog.text.count("is made again") == 1 and folder.name in caplog.text
        assert recipe().record(tmp_path) == record
        for one, other in zip(again.parameters(), whole, strict=True):
            assert torch.equal(one, other)
    monkeypatch.setattr("clbench.models.tiny.pretrain", lambda *_, **__: pytest.fail("made a third time"))
    recipe(corpus=Text()).load(tmp_path)


def test_kept_scores_of_the_untouched_model_that_were_touched_are_not_taken(tmp_path, caplog):
    found = untouched.Untouched(
        run="r", tokens=7, scores={"p": (Score(stage=0, stage_name="base", items=(1.0, 0.25), **AT),)}
    )
    path, other = (untouched.kept_at(tmp_path, {"a": number}) for number in (0, 1))
    assert untouched.find(path) is None and not caplog.text
    untouched.keep(path, found)
    assert untouched.find(path) == found and not caplog.text
    whole = path.read_bytes()
    for content in (whole.replace(b"0.25", b"0.75"), whole.replace(b"7", b"8", 1), whole[:-9], b"", b"[]", b"\xff"):
        path.write_bytes(content)
        caplog.clear()
        assert untouched.find(path) is None and "measured again" in caplog.text
    shutil.copy(path, other)
    other.write_bytes(whole)
    assert untouched.find(other) is None
    path.unlink()
    path.mkdir()
    assert untouched.find(path) is None


def test_a_run_whose_kept_scores_were_touched_measures_them_again(overrides, cache_dir):
    path = run(compose(overrides))
    scores = (path / "scores.jsonl").read_text().splitlines()
    kept = [file for file in (cache_dir / "untouched").glob("*.json") if f'"{path.name}"' in file.read_text()]
    for file in kept:
        file.write_text(file.read_text().replace('"value": 0.', '"value": 0.9'))
    shutil.rmtree(path)
    again = (run(compose(overrides)) / "scores.jsonl").read_text().splitlines()
    values = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in one] for one in (scores, again)
    ]
    assert values[0] == values[1]


@contextmanager
def room(size: int):
    """No file may grow beyond `size` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("size", [*range(0, 420, 35), 500, 700, 900, 1200])
def test_a_disk_that_fills_up_is_one_line_and_costs_no_finished_stage(tmp_path, size):
    path, whole = recorded(tmp_path / "filled", 0, within=False), recorded(tmp_path / "whole", 2, within=False)
    failed = False
    try:
        with Ledger(path, manifest=MANIFEST) as record, room(size):
            record.append([Score(stage=1, stage_name="sums", items=(1.0, 0.0), **AT)])
            record.append_cost(Cost(**COST | {"stage": 1}))
            record.save(checkpoint(2, step=1))
            record.save(checkpoint(1))
    except NotWritten as failure:
        assert "\n" not in str(failure) and str(path) in str(failure) and "cannot be written" in str(failure)
        failed = True
    assert failed == (size < 900)
    again = opened(path)
    assert again.finished == (0 if failed else 1)
    assert not [name for name in files(path) if "tmp" in name]
    with Ledger(path, manifest=MANIFEST) as record:
        for stage in range(again.finished + 1, 3):
            record.append([Score(stage=stage, stage_name="sums", items=(1.0, 0.0), **AT)])
            record.append_cost(Cost(**COST | {"stage": stage}))
            record.save(checkpoint(stage))
    assert files(path) | {"status": b""} == files(whole) | {"status": b""}


def test_what_a_kill_left_half_written_is_removed_at_the_next_start(tmp_path):
    path = recorded(tmp_path / "run")
    expected = files(path)
    for name in ("checkpoint/.tmpAbC123", "checkpoint/stage.tmp", ".status.4194999.tmp", "items/.stage-03.npz.1.tmp"):
        (path / name).write_text("half")
    opened(path)
    assert files(path) == expected
    here = os.uname().nodename
    (tmp_path / f".leaderboard.csv.{here}-4194999.tmp").write_text("half")  # beyond the highest process number
    kept = [f".stages.csv.{here}-{os.getpid()}.tmp", f".stages.csv.x{here}-4194999.tmp"]
    for name in kept:
        (tmp_path / name).write_text("being written, here or by a process of another machine")
    remove_left(tmp_path)
    assert sorted(one.name for one in tmp_path.iterdir()) == [*sorted(kept), "run"]
    half = tmp_path / "models" / f".toy-{recipe().settings_hash[:12]}-x"
    half.mkdir(parents=True)
    recipe().load(tmp_path)
    assert not half.exists()


def test_the_file_of_a_killed_sweep_goes_and_that_of_another_machine_or_of_a_live_one_stays(tmp_path):
    begin = "Hooks().on_multirun_start(OmegaConf.create({'results_dir': sys.argv[1]})); os.kill(os.getpid(), 9)"
    code = f"import os, sys; from omegaconf import OmegaConf; from clbench.cli import Hooks; {begin}"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    (left,) = tmp_path.iterdir()
    host, _, process = left.stem.rpartition("-")
    others = [f"{host}-{os.getpid()}.jsonl", f"{host}b-{process}.jsonl"]
    for name in others:
        (tmp_path / name).write_text("")
    remove_left(tmp_path)
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize(
    "name",
    [
        "lock",
        "scores.jsonl",
        "cost.jsonl",
        "seals.jsonl",
        "checkpoint/stage.safetensors",
        "checkpoint/within.safetensors",
    ]
    + ["items/stage-01.npz", "manifest.json"],
)
def test_a_directory_where_a_file_should_be_is_one_line(tmp_path, name):
    path = recorded(tmp_path)
    (path / name).unlink()
    (path / name).mkdir()
    with pytest.raises((UserMistake, NotWritten)) as refusal:
        opened(path)
    assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)


@pytest.mark.parametrize("name", ["items", "checkpoint", "../run"])
def test_a_file_where_a_directory_should_be_is_one_line(tmp_path, name):
    path = tmp_path / "run"
    if name != "../run":
        path.mkdir()
    (path / name).resolve().write_text("")
    with pytest.raises(NotWritten, match="cannot be written"):
        Ledger(path, manifest=MANIFEST)


def test_stray_files_among_the_records_are_left_alone(tmp_path):
    path = recorded(tmp_path)
    for name in ("notes.txt", "items/notes.txt", "checkpoint/notes.txt", "items/own.npz"):
        (path / name).write_text("mine")
    opened(path)
    assert (path / "items" / "notes.txt").is_file() and (path / "items" / "own.npz").is_file()


def test_a_full_disk_ends_the_command_with_one_line_and_exit_code_1(overrides, monkeypatch, capsys):
    monkeypatch.setattr(
        "clbench.record.ledger.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space"))
    )
    monkeypatch.setattr("sys.argv", ["clbench", *overrides])
    with pytest.raises(SystemExit) as end:
        cli.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
    assert end.value.code == 1 and len(lines) == 1 and "No space" in lines[0]
