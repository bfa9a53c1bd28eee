"""Every yaml of conf/ composes, because it exists."""

import hashlib
import re
import tomllib
from dataclasses import asdict
from functools import reduce
from operator import getitem
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from clbench.build import check_classes
from clbench.config import run_hash
from clbench.config.composition import CONF_DIR, compose, register_schema
from clbench.types import UserMistake

CONF = Path(CONF_DIR)
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")


def options(group: str) -> list[str]:
    return sorted(str(path.relative_to(CONF / group).with_suffix("")) for path in (CONF / group).rglob("*.yaml"))


def test_the_groups_are_the_documented_ones():
    assert GROUPS == sorted("experiment method stream task model probe engine train tracking settings texts".split())


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, option) for group in GROUPS for option in options(group) if group not in ("task", "experiment", "texts")],
)
def test_an_option_composes(group, option, tmp_path):
    # WikiText stands in for nothing here: only the configuration is made.
    places = [f"results_dir={tmp_path}", f"data_dir={tmp_path}"]
    of_no_world = ["stream=seq16_local", "probe=local"] if group == "model" and option != "world" else []
    named = ["model.name=a/b"] if option == "own" else []
    config = compose([f"{group}={option}", *of_no_world, *named, *places])
    assert config.tasks and config.method["name"]


@pytest.mark.parametrize("option", [option for option in options("experiment") if option != "tune/common"])
def test_an_experiment_composes(option, tmp_path):
    config = compose([f"+experiment={option}", f"results_dir={tmp_path}", f"data_dir={tmp_path}"])
    assert config.experiment and "/" not in config.experiment


def test_a_method_takes_its_settings_for_the_model_and_the_command_line_has_the_last_word(tmp_path):
    common = ["+experiment=seq16_llama3", f"results_dir={tmp_path}"]
    assert compose([*common, "method=curlora"]).train.lr == 2.5e-4
    assert compose([*common, "method=dora"]).train.lr == 1e-4  # the table's default
    assert compose([*common, "method=curlora", "train.lr=3e-3"]).train.lr == 3e-3
    assert compose([*common, "method=curlora", "settings=none"]).train.lr == 1e-3  # of conf/method/curlora.yaml
    real8 = ["+experiment=real8_gemma3_270m", *common[1:]]
    without = compose([*real8, "method=seq", "~probe.probes.knowledge", "~probe.cadence.knowledge"]).probe
    assert "knowledge" not in (*without.probes, *without.cadence)  # what is taken out stays out


def test_gemmas_rates_are_those_that_the_recorded_search_chose():
    found = pd.read_csv(CONF.parent / "results" / "real" / "tuning" / "search.csv")
    chosen = found[(found["chosen"] == 1) & ~found["method"].str.contains("@")].set_index("method")["settings"]
    settings = yaml.safe_load((CONF / "settings" / "gemma3_270m.yaml").read_text())
    assert {"base", *chosen.index} == settings.keys()
    assert chosen.to_dict() == {name: f"train.lr={one['train']['lr']}" for name, one in settings.items() if one}


SEARCHED = {
    path.stem: found
    for path in sorted((CONF / "method").glob("*.yaml"))
    if (found := re.search(r"# this and (.*): conf/experiment/tune/(\w+)\.yaml", path.read_text()))
}


@pytest.mark.parametrize("method", SEARCHED)
def test_what_a_methods_yaml_says_was_searched_is_what_its_search_varies(method):
    key, search = SEARCHED[method].groups()
    varied = yaml.safe_load((CONF / "experiment" / "tune" / f"{search}.yaml").read_text())["hydra"]["sweeper"]["params"]
    assert (search, varied.keys()) == (method, {"train.lr", f"method.{key}"})


def test_methods_have_the_settings_that_the_recorded_search_chose():
    found = pd.read_csv(CONF.parent / "results" / "reference" / "tuning" / "search.csv")
    chosen = found[(found["chosen"] == 1) & ~found["method"].str.contains("@")].set_index("method")["settings"]
    searches = {path.stem for path in (CONF / "experiment" / "tune").glob("*.yaml")} - {"common", "rates", "optuna"}
    assert {*chosen.index} == searches
    for method, settings in chosen.items():
        config = asdict(compose([f"method={method}"]))
        for setting in settings.split(", "):
            key, _, value = setting.partition("=")
            assert (key, reduce(getitem, key.split("."), config)) == (key, float(value)), method


@pytest.mark.parametrize("method", ["base_interpolation", "lines"])
@pytest.mark.parametrize("settings", ["none", "published"])
def test_views_of_a_model_trained_as_seq_are_trained_at_its_rate(method, settings, tmp_path):
    found, seq = (
        compose([f"method={name}", f"settings={settings}", f"results_dir={tmp_path}"]) for name in (method, "seq")
    )
    assert found.train == seq.train and found.method["lora"] == seq.method["lora"]


OF_WORLD = {"tune/common", "tune/er_general", "tune/self_replay_text"}
SEARCHES = [option for option in options("experiment") if option.startswith("tune/") and option not in OF_WORLD]


@pytest.mark.parametrize(
    ("experiment", "search"),
    [
        *(("real8_gemma3_270m", search) for search in SEARCHES),
        *((experiment, "tune/rates") for experiment in ("seq16_local", "seq16_llama3")),
    ],
)
def test_a_search_takes_any_model_and_stream(experiment, search, tmp_path):
    one = compose([f"+experiment={experiment}", f"results_dir={tmp_path}"])
    both = compose([f"+experiment=[{experiment},{search}]", f"results_dir={tmp_path}"])
    assert both.experiment == "tune" and both.stream.last in (2, 6) and both.seed != one.seed
    assert (both.model, both.stream.tasks) == (one.model, one.stream.tasks)


def test_a_search_takes_a_model_by_its_name_alone(tmp_path):
    config = compose(["+experiment=tune/kl_base", "model.name=a/b", *OWN, f"results_dir={tmp_path}"])
    assert (config.model["name"], config.method["name"], config.seed) == ("a/b", "kl_base", 100)


OWN = ("stream=seq16_local", "probe=local")


def test_a_model_of_ones_own_needs_a_name_alone(tmp_path):
    places = (f"results_dir={tmp_path}", f"data_dir={tmp_path}")
    config = compose(["model.name='/models/My model!'", *OWN, *places])
    assert (config.model["label"], config.model["name"]) == ("My_model_", "/models/My model!")
    assert config.method["lora"]["targets"] == "all-linear"
    assert compose(["model.name=a/b", "method=curlora", *OWN, *places]).method["targets"] == "all-linear"
    named = compose(["model.name=a/b", "method.lora.targets=[q_proj]", "model.label=mine", *OWN, *places])
    assert (named.method["lora"]["targets"], named.model["label"]) == (["q_proj"], "mine")
    assert compose(["model=gemma3_270m", "model.name=a/b", *OWN, *places]).model["label"] == "gemma3_270m"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), r"world behind stream=seq16 and probe=world; choose stream=.*\bseq16_local\b.*; probe=.*\bmini\b"),
        ((*OWN, "method=er_general"), r"world behind method=er_general; choose method=agem, .*\bseq\b"),
    ],
)
def test_a_model_is_not_asked_about_a_world_that_it_was_not_told_of_and_what_suits_it_is_named(given, said, tmp_path):
    with pytest.raises(UserMistake, match=said) as refused:
        compose(["model.name=a/b", *given, f"results_dir={tmp_path}"])
    offered = re.findall(r"\w+", str(refused.value).partition("choose ")[2])
    assert not {"seq16", "world", "er_general", "self_replay_text"} & {*offered}


@pytest.mark.parametrize(("method", "texts"), [("er_general", 4), ("self_replay_text", 512)])
def test_the_general_text_of_a_model_that_knows_no_world_is_one_override(method, texts, tmp_path):
    given = [f"method={method}", f"results_dir={tmp_path}"]
    worlds = {"_target_": "tasks.world.general_texts", "texts": texts, "seed": 0}
    assert compose(given).method["texts"] == worlds
    own = ["model.name=a/b", *OWN, *given, f"data_dir={tmp_path}"]
    with pytest.raises(UserMistake, match=rf"world behind method={method}; choose .*; \+texts=wikitext$"):
        compose(own)
    config = compose([*own, "settings=published", "+texts=wikitext"])
    there = {"_target_": "tasks.wikitext.general_texts", "data_dir": str(tmp_path)}
    assert config.method["texts"] == worlds | there
    check_classes(config)


def test_one_task_may_have_a_folder_of_its_own_and_the_run_keeps_its_hash(tmp_path):
    given = ["model.name=a/b", *OWN, f"results_dir={tmp_path}"]
    everywhere, one = compose([*given, f"data_dir={tmp_path}"]), tmp_path / "one"
    apart = compose([*given, f"data_dir={tmp_path}", f"+tasks.boolq.data_dir={one}"])
    assert {name for name, task in apart.tasks.items() if task["data_dir"] == str(one)} == {"boolq"}
    assert run_hash(asdict(apart)) == run_hash(asdict(everywhere))
    with pytest.raises(UserMistake, match=r"tasks.bolq is no task of the stream; did you mean boolq\? choose one of "):
        compose([*given, "+tasks.bolq.data_dir=x"])


def test_a_run_has_one_hash_wherever_its_results_lie_even_in_a_folder_called_as_its_method_is():
    assert run_hash(asdict(compose(["results_dir=seq"]))) == run_hash(asdict(compose(["results_dir=out"])))


def test_a_prompt_in_a_chat_is_another_run_and_a_plain_one_the_run_that_it_was_before_there_were_others(tmp_path):
    plain = asdict(compose([f"results_dir={tmp_path}"]))
    before = {name: value for name, value in plain.items() if name != "prompt"}
    before["probe"] = {name: value for name, value in plain["probe"].items() if name != "include_path"}
    before["probe"]["probes"] = plain["probe"]["probes"] | {
        "knowledge": {k: v for k, v in plain["probe"]["probes"]["knowledge"].items() if k != "include_path"}
    }
    assert run_hash(before) == run_hash(plain) != run_hash(plain | {"prompt": "chat"})


def test_tasks_of_ones_own_for_lm_eval_are_part_of_the_run_wherever_their_folder_lies(tmp_path):
    hashes = []
    for folder, text in (("a", "task: x"), ("b", "task: x"), ("c", "task: y")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.yaml").write_text(text)
        given = [f"probe.include_path={tmp_path / folder}", f"results_dir={tmp_path}"]
        hashes.append(run_hash(asdict(compose(given))))
    assert hashes[0] == hashes[1] != hashes[2]
    with pytest.raises(UserMistake, match="probe.include_path='/nonesuch' is not a directory"):
        compose(["probe.include_path=/nonesuch", f"results_dir={tmp_path}"])


def test_other_code_anywhere_in_a_classs_package_is_another_run_and_beside_a_lone_module_it_is_not(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)

    def made(module):
        found = compose([f"method._target_={module}.Own", "method.name=own", f"results_dir={tmp_path}"])
        return run_hash(asdict(found)), found.sources

    (tmp_path / "mine" / "inner").mkdir(parents=True)
    for name in ("mine/inner/own.py", "alone.py"):
        (tmp_path / name).write_text("pass\n")
    alone, first = made("alone"), made("mine.inner.own")
    # With nothing beside it, it is the file's own.
    assert first[1] == {"mine.inner.own": hashlib.sha256(b"pass\n").hexdigest()}
    (tmp_path / "mine" / "helper.py").write_text("RATE = 1\n")
    second = made("mine.inner.own")
    (tmp_path / "mine" / "helper.py").write_text("RATE = 2\n")
    third = made("mine.inner.own")
    (tmp_path / "mine" / "inner" / "__init__.py").write_text("")
    assert len({first[0], second[0], third[0]}) == 3 and made("mine.inner.own") == third and made("alone") == alone
    assert made("mine.inner")[1]["mine.inner"] == third[1]["mine.inner.own"]


def test_a_method_without_settings_for_the_model_is_refused(tmp_path):
    with pytest.raises(
        UserMistake, match=r"conf/settings/published.yaml has no settings for method=dora; it has seq, "
    ):
        compose(["method=dora", "settings=published", "~settings.default", f"results_dir={tmp_path}"])


@pytest.mark.parametrize(
    ("launcher", "plugin", "class_name"),
    [
        ("slurm", "hydra_plugins.hydra_submitit_launcher", "SlurmLauncher"),
        ("ray_cluster", "hydra_plugins.hydra_ray_launcher", "RayLauncher"),
    ],
)
def test_a_launcher_composes_where_its_extra_is_installed(launcher, plugin, class_name):
    pytest.importorskip(plugin)
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra_compose("config", [f"hydra/launcher={launcher}"], return_hydra_config=True)
    assert composed.hydra.launcher._target_.endswith(f".{class_name}")


def test_every_launcher_of_conf_has_an_extra_that_it_names():
    extras = tomllib.loads((CONF.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in (CONF / "hydra" / "launcher").glob("*.yaml"):
        named = set(re.findall(r"clbench\[(\w+)\]", path.read_text()))
        assert named and named <= extras.keys()


@pytest.mark.parametrize("option", options("stream"))
def test_a_stream_names_tasks_that_exist_each_once(option):
    stream = OmegaConf.load(CONF / "stream" / f"{option}.yaml")
    assert stream.name == option and 0 < len(stream.tasks) == len(set(stream.tasks))
    assert not option.startswith("seq16") or len(stream.tasks) == 16
    assert set(stream.tasks) <= set(options("task"))


@pytest.mark.parametrize(
    ("orders", "count"),
    [
        (("olora_order1", "olora_order2", "olora_order3"), 4),
        (("olora_order4", "olora_order5", "olora_order6"), 15),
        (("superni_order1", "superni_order2"), 15),
    ],
)
def test_the_orders_of_a_published_stream_hold_the_same_tasks(orders, count):
    tasks = [tuple(OmegaConf.load(CONF / "stream" / f"{order}.yaml").tasks) for order in orders]
    assert len(set(tasks)) == len(orders)
    assert len({frozenset(names) for names in tasks}) == 1 and len(tasks[0]) == count


@pytest.mark.parametrize("option", [option for option in options("task") if option.startswith("world_")])
def test_a_task_of_the_world_is_made_from_its_yaml(option, tmp_path):
    config = compose([f"stream.tasks=[{option}]", f"results_dir={tmp_path}"])
    task = instantiate(config.tasks[option], _convert_="all")
    assert task.name == option and task.examples("train") and len(task.examples("test")) == 40


HUB_ID = re.compile(r"\b[\w-]+/[\w.-]+")


@pytest.mark.parametrize("group", ["model", "probe", "task"])
def test_every_hub_address_of_a_group_stands_in_its_table_of_licences(group):
    folder = CONF / group
    page = (folder / "README.md").read_text(encoding="utf-8")
    for path in folder.glob("*.yaml"):
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if group == "model":
            named = [loaded["name"]] if loaded.get("name", "???") != "???" else []
        elif group == "task":
            named = [loaded["dataset"]["hub"]] if "dataset" in loaded else []
        else:
            folders = loaded.get("probes", {}).get("knowledge", {}).get("folders", {})
            named = [found for key in folders for found in HUB_ID.findall(key)]
        for address in named:
            assert f"| {address}" in page, f"{path.name}: {address}"
