"""What must not leave the machine or run on another: secrets are masked, text in tables and pages is text."""

import csv
import io
import json
import logging

import pandas as pd
import pytest

from clbench.config import identity, run_hash
from clbench.config.composition import compose
from clbench.config.secrets import masked
from clbench.experiment import run
from clbench.progress import set_up_logging
from clbench.record.tracking import written_to
from clbench.report import html as report
from clbench.report import tables
from tests.test_leaderboard import ALPHA, change_manifest, write_run
from tests.test_sweep import sweep

PLANTED = [
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    "sk-proj-AbCdEfGhIjKlMnOpQrSt",
    "ghp_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789",
    "AKIAABCDEFGHIJKLMNOP",
]


@pytest.mark.parametrize("secret", PLANTED)
@pytest.mark.parametrize("around", ["{}", "x={} y", "see {}, there", "'{}'", "https://host/{}/x"])
def test_a_token_of_a_known_form_is_masked_wherever_it_stands(secret, around):
    assert secret not in masked(around.format(secret)) and "***" in masked(around.format(secret))


@pytest.mark.parametrize(
    "text",
    [
        "https://me:pa55w0rd@host/x",
        "s3://pa55w0rd@bucket",
        "method.api_key=pa55w0rd",
        "HF_TOKEN=pa55w0rd python",
        '{"password": "pa55w0rd"}',
        "Authorization: Bearer pa55w0rdpa55w0rd",
        "secret: pa55w0rd",
    ],
)
def test_what_is_called_a_secret_is_masked(text):
    assert "pa55w0rd" not in masked(text) and masked(masked(text)) == masked(text)


@pytest.mark.parametrize(
    "text",
    [
        "probe.text_tokens=8192",
        "train.micro_batch_tokens=384",
        "model.tokenizer=words",
        "9 tokens: 12",
        "revision: 3f786850e387550fdab836ed7e6dc881de23001b",
        "https://huggingface.co/google/gemma-3-270m",
        "mail@host.org",
        "max_new_tokens=8",
        "token: null",
    ],
)
def test_what_is_no_secret_stays(text):
    assert masked(text) == text


def test_values_by_their_names_at_any_depth():
    nested = {"a": [{"hub_token": "x", "tokens": 3, "token": None}], "api_key": 7, "b": ("https://u@h",)}
    expected = {"a": [{"hub_token": "***", "tokens": 3, "token": None}], "api_key": "***", "b": ("https://***@h",)}
    assert masked(nested) == expected


def test_a_secret_changes_no_runs_identity():
    one, other = ({"method": {"name": "x", "data": f"https://u:{word}@h"}} for word in ("one", "other"))
    assert run_hash(one) == run_hash(other) == run_hash(masked(one)) and "one" not in json.dumps(identity(one))


def test_a_planted_secret_is_in_no_record_log_or_report(overrides, tmp_path, monkeypatch):
    secret = PLANTED[0]
    config = compose([*overrides, "stream.limit=1", "train.steps=0", f"+model.note='see https://u:{secret}@host'"])
    path = run(config, command=f"HF_TOKEN={secret} python -m clbench method.token={secret}")
    assert "https://***@host" in (path / "manifest.json").read_text()
    tables.refresh(path.parents[1])
    report.write(path.parents[1])
    for file in path.parents[1].rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file


def test_a_sweeps_own_files_have_no_secrets(overrides, tmp_path, monkeypatch):
    secret = PLANTED[0]
    more = ("hydra.output_subdir=.hydra", "+model.note='see https://u:pa55w0rd@host'", f"+method.lora.token={secret}")
    assert sweep(monkeypatch, overrides, *more) == 2, "a LoRA has no token"
    texts = {file: file.read_bytes() for file in (tmp_path / "results").rglob("*") if file.is_file()}
    assert {"multirun.yaml", "overrides.yaml", "config.yaml", "hydra.yaml"} <= {file.name for file in texts}
    for file, text in texts.items():
        assert secret.encode() not in text and b"pa55w0rd" not in text, file


def test_the_screen_and_the_log_have_no_secrets(tmp_path, capsys):
    before = logging.getLogger("clbench").handlers[:], logging.getLogger("clbench").propagate
    try:
        set_up_logging()
        with written_to(tmp_path):
            logging.getLogger("clbench").info("reading %s with %d tokens", "https://u:pa55w0rd@host", 3)
    finally:
        logging.getLogger("clbench").handlers[:], logging.getLogger("clbench").propagate = before
    for text in (capsys.readouterr().err, (tmp_path / "run.log").read_text()):
        assert "reading https://***@host with 3 tokens" in text and "pa55w0rd" not in text


def test_the_log_alone_has_no_secrets(tmp_path):
    with written_to(tmp_path):
        logging.getLogger("clbench").info("reading %s", "https://u:pa55w0rd@host")
    assert "reading https://***@host" in (tmp_path / "run.log").read_text()


def test_a_cell_that_begins_like_a_formula_is_text(tmp_path):
    cells = ["=cmd()", "+1", "-1", "@x", "\tx", "plain", "a=b", ""]
    content = tables.inert(pd.DataFrame({"text": cells, "number": [-1.5] * 8})).to_csv(index=False)
    rows = list(csv.DictReader(io.StringIO(content)))
    assert [row["text"] for row in rows] == ["'=cmd()", "'+1", "'-1", "'@x", "'\tx", "plain", "a=b", ""]
    assert {row["number"] for row in rows} == {"-1.5"}


def test_names_of_other_peoples_records_are_text_in_every_table_and_page(tmp_path):
    evil = write_run(tmp_path, "evil", seed=0, matrix=ALPHA)
    change_manifest(
        evil, method="=cmd|' /C calc'!A0<script>alert(1)</script>", stream="<img src=x>", command="<script>"
    )
    tables.refresh(tmp_path)
    for name in ("leaderboard.csv", "stages.csv", "retention.csv", "probes.csv"):
        for row in csv.reader((tmp_path / name).open(newline="")):
            assert not any(cell.startswith(("=", "@", "+")) for cell in row)
    page, text = report.write(tmp_path).read_text(), (tmp_path / "leaderboard.md").read_text()
    for tag in ("<script>alert", "<img"):
        assert tag not in page and tag not in text
    assert "=cmd\\|" in text
