"""The table of methods, and the choice of a search."""

import json
from pathlib import Path

import pytest
from hydra.utils import instantiate
from transformers import AutoConfig, AutoModelForCausalLM

from clbench import doctor
from clbench.adapters import describe
from clbench.cli import CONF_DIR, compose
from clbench.doctor import CARD, card, datasets_page, licence_warning, targets
from clbench.dry_run import dry_engine
from clbench.estimate import bound_tokens, examination_operations, meta_model, training_operations
from clbench.experiment import run
from clbench.forecast import tokens_of, trainable_counts, wrapped
from clbench.parts import make_method, make_tasks
from clbench.runs import read_runs
from clbench.tuning import main, trials
from clbench.types import UserMistake


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
        "variant": "x",
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


def test_the_page_of_datasets_is_that_of_the_yamls():
    assert (CONF_DIR / "task" / "README.md").read_text(encoding="utf-8") == datasets_page()


@pytest.mark.parametrize(
    ("licence", "warning"),
    [
        ("MIT", ""),
        ("CC-BY-SA-4.0", ""),
        ("CC-BY-NC-SA-4.0", "non-commercial"),
        ("research only, non-commercial", "non-commercial"),
        ("unstated", "no licence stated"),
        ("", "no licence stated"),
    ],
)
def test_terms_that_bind_a_user_are_warned_of(licence, warning):
    assert licence_warning(licence) == warning


LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def test_parameters_are_counted_without_storage():
    # Embedding and head 2 * 100 * 16; a layer q 16*16, k and v 8*16 each, o 16*16, three of 16*24, two norms of 16; a last norm.
    layer = 2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 24 + 2 * 16
    model = meta_model(AutoConfig.for_model(**LLAMA))
    assert sum(parameter.numel() for parameter in model.parameters()) == 2 * 1600 + 3 * layer + 16
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("method", sorted(targets(CONF_DIR / "method")))
def test_every_method_wraps_a_model_without_storage(method, overrides):
    config = compose([*overrides, f"method={method}"])
    tiny, meta = (
        make_method(config).wrap(model) for model in (real_model(), meta_model(AutoConfig.for_model(**LLAMA)))
    )
    assert [(n, p.shape) for n, p in meta.named_parameters() if p.requires_grad] == [
        (n, p.shape) for n, p in tiny.named_parameters() if p.requires_grad
    ]


def real_model():
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA))


@pytest.mark.parametrize("method", ["seq", "er", "er_trace", "ilora", "joint"])
def test_tokens_are_those_that_a_run_trains_on_and_reads(overrides, method):
    config = compose([*overrides, f"method={method}"])
    path = run(config)
    costs = [json.loads(line) for line in (path / "cost.jsonl").read_text().splitlines()]
    tokens, reason = counted(config)
    assert tokens.exact and not reason
    assert list(tokens.trained) == [cost["tokens_trained"] for cost in costs[1:]]
    assert list(tokens.replayed) == [cost["tokens_replayed"] for cost in costs[1:]]
    assert any(tokens.replayed) == (method not in ("seq", "joint"))
    for counts, cost in zip(zip(*tokens.examined.values(), strict=True), costs, strict=True):
        # What is generated may stop early; everything else is counted as it is read.
        assert cost["tokens_scored"] <= sum(counts) <= 1.5 * cost["tokens_scored"]


def counted(config):
    source = instantiate(config.model)
    method, model = wrapped(config, source.configuration(Path(config.cache_dir)))
    return tokens_of(config, make_tasks(config), source, method=method, model=model)


def test_what_a_probe_reads_without_writing_is_counted_exactly(overrides):
    config = compose([*overrides, "method=ilora"])
    config.probe.cadence = {"perplexity": "ends"}
    config.probe.probes = {name: config.probe.probes[name] for name in ("perplexity", "knowledge")}
    tokens, _ = counted(config)
    costs = [json.loads(line) for line in (run(config) / "cost.jsonl").read_text().splitlines()]
    # Three stages; two views each; perplexity before the first stage and after the last.
    assert [bool(count) for count in tokens.examined["perplexity"]] == [True, False, False, True]
    assert [sum(counts) for counts in zip(*tokens.examined.values(), strict=True)] == [
        cost["tokens_scored"] for cost in costs
    ]


def test_operations_are_those_that_the_ledger_records(overrides):
    config = compose([*overrides, "method=er"])
    costs = [json.loads(line) for line in (run(config) / "cost.jsonl").read_text().splitlines()]
    _, model = wrapped(config, instantiate(config.model).configuration(Path(config.cache_dir)))
    for cost in costs:
        tokens = cost["tokens_trained"] + cost["tokens_replayed"]
        training = training_operations(tokens, **describe(model))
        examination = examination_operations(cost["tokens_scored"], parameters=describe(model)["parameters"])
        assert cost["flops"] == training + examination


def test_operations_of_adapters_are_four_per_frozen_and_six_per_trained_parameter():
    assert training_operations(30, parameters=1000, trainable=100) == 30 * (4 * 1000 + 2 * 100)
    assert examination_operations(5, parameters=1000) == 2 * 5 * 1000


@pytest.mark.parametrize("method", sorted(targets(CONF_DIR / "method")))
def test_trainable_parameters_are_those_of_a_real_model(method, overrides):
    config = compose([*overrides, f"method={method}", "engine.dtype=bfloat16"])
    real = make_method(config).wrap(real_model().bfloat16())
    assert describe(wrapped(config, AutoConfig.for_model(**LLAMA))[1]) == describe(real)


def test_settings_of_an_experiments_method_are_not_those_of_the_others():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    architecture = AutoConfig.for_model("llama", vocab_size=100, **sizes)
    counts = trainable_counts(["+experiment=curlora3_mistral7b"], architecture)
    assert counts["curlora"] == 2 * 3 * 16 * 16
    assert counts["base"] == 0


def test_rows_that_cannot_be_had_are_bounded(overrides):
    config = compose([*overrides, "method=er", "train.steps=null", "train.epochs=1", "train.max_length=32"])
    method, model = wrapped(config, AutoConfig.for_model(**LLAMA))
    tokens = bound_tokens(config, [10, 20], [3, 4], method=method, engine=dry_engine(model, processes=1))
    # Batches of 4: 3 and 5 steps; memory holds a tenth of the first ten rows and gives as many rows again from the second stage on.
    assert tokens.trained == (3 * 4 * 32, 5 * 4 * 32) and tokens.replayed == (0, 5 * 4 * 32)
    assert tokens.examined == {"stream": (7 * 32,) * 3} and not tokens.exact


def test_the_doctor_prints_every_table_for_a_number_of_processes_that_no_engine_states(overrides, capsys):
    arguments = [*overrides, "method=ewc", "engine.processes=8", "gpu=a100", "utilisation=0.5"]
    assert doctor.main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    config = compose([*overrides, "method=ewc"])
    tokens, _ = counted(config)
    for text in (
        "Memory of one a100 of 8, in GB: ewc, stage 3",
        "ZeRO 0 ZeRO 1 ZeRO 2 ZeRO 3 examination",
        f"training {sum(tokens.trained):,}",
        f"probe stream, 4 times {sum(tokens.examined['stream']):,}",
        "Hours at 50% of the bfloat16 peak of 8 a100",
        "disk: model",
    ):
        assert text in printed
    for method in targets(CONF_DIR / "method"):
        assert f" {method} " in printed


def test_a_run_still_refuses_processes_without_an_engine_for_them(overrides):
    with pytest.raises(UserMistake, match="it is one process"):
        compose([*overrides, "engine.processes=8"])


@pytest.mark.parametrize(
    ("argument", "named"),
    [("gpu=abacus", "a100"), ("utilisation=2", "share"), ("engine.processes=two", "whole number")],
)
def test_a_gpu_share_or_number_of_processes_that_cannot_be_meant_is_a_mistake(argument, named, capsys):
    assert doctor.main([argument]) == 2
    assert named in capsys.readouterr().err
