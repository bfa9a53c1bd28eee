"""Every task of the embedded stream can be learned: the bound that its scores are read against. Minutes, so apart: make test-learnability."""

import json
from pathlib import Path

import pytest

from clbench import experiment
from clbench.config.composition import compose


@pytest.mark.learnability
def test_every_task_is_learned_alone_to_nine_tenths(tmp_path, cache_dir):
    path = experiment.run(
        compose(["method=single", f"results_dir={tmp_path}", f"cache_dir={cache_dir}", "tracking.progress=false"])
    )
    manifest = json.loads((path / "manifest.json").read_text())
    rows = [json.loads(line) for line in (Path(path) / "scores.jsonl").read_text().splitlines()]
    value = {(row["stage"], row["task"], row["metric"]): row["value"] for row in rows if row["probe"] == "stream"}
    learned = {
        task: value[stage, task, manifest["metrics"][task]] for stage, task in enumerate(manifest["tasks"], start=1)
    }
    assert len(learned) == 16
    assert min(learned.values()) >= 0.9, learned
