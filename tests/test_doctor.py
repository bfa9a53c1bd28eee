"""The table of methods, and the choice of a search."""

import json
from pathlib import Path

from clbench.cli import CONF_DIR
from clbench.doctor import CARD, card, targets
from clbench.runs import read_runs
from clbench.tuning import main, trials


def test_every_method_yaml_has_a_whole_card():
    modules = targets(CONF_DIR / "method")
    assert {"seq", "er", "ewc", "secura_release"} <= modules.keys()
    for module in set(modules.values()):
        assert set(card(module)) >= set(CARD)


def test_a_variant_has_its_parents_module():
    modules = targets(CONF_DIR / "method")
    assert modules["ewc_online"] == modules["ewc"] == "baselines.ewc"


def make_run(results: Path, method: str, lr: float, accuracy: float, kept: float) -> None:
    """A complete run of one stage: one task, a probe of 100 items of which the base has 80 right by a chance of 0."""
    folder = results / "runs" / f"{method}-{lr}"
    (folder / "items").mkdir(parents=True)
    manifest = {
        "run": folder.name,
        "experiment": "tune",
        "stream": "s",
        "order": "default",
        "model": "m",
        "method": method,
        "seed": 0,
        "tasks": ["t"],
        "metrics": {"t": "accuracy"},
        "config": {"train": {"lr": lr}, "method": {"name": method}, "engine": {}},
        "config_hash": "x",
        "git": {"commit": "c", "dirty": False},
        "versions": {},
        "command": "",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "status").write_text("complete\n")
    rows = []
    for stage, right in ((0, 80), (1, round(80 * kept))):
        for probe, task, metric, value in (
            ("stream", "t", "accuracy", accuracy * stage),
            ("knowledge", "k", "acc", right / 100),
        ):
            rows.append(
                {
                    "stage": stage,
                    "stage_name": "x",
                    "probe": probe,
                    "task": task,
                    "metric": metric,
                    "value": value,
                    "n": 100,
                    "stderr": 0.0,
                    "seconds": 0.0,
                }
            )
        import numpy as np

        np.savez_compressed(
            folder / "items" / f"stage-{stage:02d}.npz",
            **{"knowledge|k|acc": np.arange(100) < right, "knowledge|k|chance": np.zeros(100)},
        )
    rows.append(
        {
            "stage": 0,
            "stage_name": "x",
            "probe": "knowledge",
            "task": "k",
            "metric": "chance",
            "value": 0.0,
            "n": 100,
            "stderr": 0.0,
            "seconds": 0.0,
        }
    )
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "cost.jsonl").write_text("")


def test_a_search_prefers_the_mean_of_accuracy_and_retention(tmp_path, capsys):
    make_run(tmp_path, "a", 0.1, accuracy=0.9, kept=0.2)  # (0.9 + 0.2) / 2 = 0.55
    make_run(tmp_path, "a", 0.2, accuracy=0.7, kept=0.9)  # (0.7 + 0.9) / 2 = 0.80
    make_run(tmp_path, "a", 0.3, accuracy=0.1, kept=1.0)  # 0.55
    found = trials(read_runs(tmp_path))
    assert [trial.setting for trial in found][0] == "train.lr=0.2"
    assert abs(found[0].criterion - 0.8) < 1e-9
    assert main([str(tmp_path)]) == 0
    assert "train.lr=0.2" in capsys.readouterr().out
    chosen = [line for line in (tmp_path / "tuning.csv").read_text().splitlines() if ",1,a-" in line]
    assert len(chosen) == 1 and "train.lr=0.2" in chosen[0]
