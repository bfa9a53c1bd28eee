"""The experiments of real models: they compose, build their whole streams, and run to the end offline with a tiny model."""

import json
from pathlib import Path

import pytest
from hydra.utils import instantiate
from test_tasks import write, write_cases

from clbench.build import make_tasks
from clbench.config.composition import CONF_DIR, compose
from clbench.data.encoder import Encoder
from clbench.experiment import run
from clbench.stream import build_stream
from clbench.types import UserMistake

REAL = [
    "seq16_llama3",
    "seq16_llama31",
    "seq16_qwen2_1b5",
    "seq16_qwen2_7b",
    "seq16_gemma2_2b",
    "seq16_gemma3_270m",
    "real8_gemma3_270m",
    "curlora3_mistral7b",
    "trace8_llama2",
]
TINY = [
    *(
        "model=tiny_bpe",
        "model.steps=2",
        "model.batch_size=2",
        "model.vocabulary_size=300",
        "engine=local",
        "train.steps=1",
        "train.epochs=null",
    ),
    *(
        "model.architecture.num_hidden_layers=1",
        "model.architecture.hidden_size=32",
        "model.architecture.intermediate_size=32",
    ),
    *(
        "model.architecture.max_position_embeddings=2048",
        "train.max_length=1024",
        "train.batch_size=2",
        "tracking.progress=false",
    ),
    *("probe=mini_local", "probe.tasks=[piqa]", "probe.probes.knowledge.items=null"),
]


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> Path:
    """Invented rows of every task and probe that the experiments read."""
    folder = write_cases(tmp_path_factory.mktemp("rows"))
    pairs = [{"goal": f"To open box {i}", "sol1": "lift the lid", "sol2": "eat the box", "label": 0} for i in range(3)]
    write(folder / "piqa" / "validation.jsonl", pairs)
    write(folder / "piqa" / "train.jsonl", pairs)
    page = " , ".join(f"the box number {i} was opened by the tall keeper" for i in range(20))
    write(folder / "wikitext2_raw_documents" / "test.jsonl", [{"page": f" = Box {i} = \n \n {page}"} for i in range(3)])
    return folder


def arguments(experiment: str, offline: Path, tmp_path: Path) -> list[str]:
    places = [f"data_dir={offline}", f"cache_dir={offline / 'cache'}", f"results_dir={tmp_path}"]
    return [f"+experiment={experiment}", *TINY, *places]


def test_every_experiment_of_a_real_model_is_here():
    named = {path.stem for path in (CONF_DIR / "experiment").glob("*.yaml")}
    assert named - {"seq16_local"} == set(REAL)


@pytest.mark.parametrize("experiment", REAL)
def test_an_experiment_names_its_command_and_its_hardware(experiment):
    header = (CONF_DIR / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8").partition("defaults:")[0]
    assert f"python -m clbench +experiment={experiment}" in header
    assert "Hardware:" in header and "hours" in header and "Unmeasured" in header


@pytest.mark.parametrize("experiment", REAL)
def test_an_experiment_builds_its_whole_stream(experiment, offline, tmp_path):
    config = compose(arguments(experiment, offline, tmp_path))
    encoder = Encoder(
        instantiate(config.model, _convert_="all").load_tokenizer(Path(config.cache_dir)),
        max_length=config.train.max_length,
    )
    tasks = make_tasks(config)
    stream = build_stream(config.stream, order=config.order, tasks=tasks, encoder=encoder)
    assert [stage.name for stage in stream.stages] == list(config.stream.tasks)
    for stage in stream.stages:
        assert len(stage.train) == 3 and all(encoder.example(example).ids for example in stage.train)


@pytest.mark.parametrize("method", ["er_general", "self_replay_text"])
def test_general_text_of_a_real_model_is_none_that_a_probe_measures(method, offline, tmp_path):
    own = ["settings=none", f"method={method}", "+texts=wikitext", "stream.limit=2", "method.lora.targets=all-linear"]
    given = [*arguments("real8_gemma3_270m", offline, tmp_path / "results"), *own, f"data_dir={tmp_path}"]
    for folder in offline.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    pages = tmp_path / "wikitext2_raw_documents"
    pages.unlink()
    of_test = [json.loads(line) for line in (offline / pages.name / "test.jsonl").read_text().splitlines()]
    trained = [{"page": f" = Train {i} = \n \n train {i} leaves from the old station"} for i in range(3)]
    write(pages / "train.jsonl", trained)
    write(pages / "test.jsonl", [*of_test, {"page": f"{trained[1]['page']} at noon , and comes back"}])
    with pytest.raises(UserMistake, match=r"a probe measures \(perplexity wikitext2\)"):
        run(compose(given))
    write(pages / "test.jsonl", of_test)
    path = run(compose(given))
    assert (path / "status").read_text() == "complete\n"
    costs = [json.loads(line) for line in (path / "cost.jsonl").read_text().splitlines()]
    assert costs[1]["tokens_replayed"] > 0


@pytest.mark.parametrize("experiment", ["seq16_llama3", "curlora3_mistral7b", "trace8_llama2"])
def test_an_experiment_runs_to_its_end_offline(experiment, offline, tmp_path):
    path = run(compose([*arguments(experiment, offline, tmp_path), "stream.limit=3"]))
    assert (path / "status").read_text() == "complete\n"
    rows = [json.loads(line) for line in (path / "scores.jsonl").read_text().splitlines()]
    assert {row["probe"] for row in rows} == {
        "knowledge",
        "perplexity",
        "text_loss",
        "divergence",
        "update",
        "stream",
        "canaries",
    }
    assert {row["stage"] for row in rows} == {0, 1, 2, 3}
