"""What a configuration may say: every number finite and in its range, every name plain, every class of the kind that stands there."""

import copy
from dataclasses import asdict, fields
from typing import Any

import pytest
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from clbench import cli
from clbench.build import check_classes, check_value
from clbench.config import Config, from_plain
from clbench.config.checks import check
from clbench.config.composition import CONF_DIR, check_groups, compose
from clbench.doctor import methods
from clbench.protocols import Method, ModelSource, Task
from clbench.types import UserMistake
from tests.conftest import TINY_MODEL


@pytest.fixture(scope="module")
def configured(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("values")
    return asdict(compose([*TINY_MODEL, "method=ewc", f"results_dir={folder}", f"cache_dir={folder}"]))


def changed(configured: dict[str, Any], key: str, value: Any) -> Config:
    """The configuration with another value at a dotted key."""
    plain = copy.deepcopy(configured)
    *path, last = key.split(".")
    group = plain
    for name in path:
        group = group[name]
    group[last] = value
    return from_plain(plain)


def refused(configured: dict[str, Any], key: str, value: Any) -> str:
    """The line that refuses a value; it names the key."""
    config = changed(configured, key, value)
    with pytest.raises(UserMistake) as mistake:
        check(config)
        check_classes(config)
    line = str(mistake.value)
    assert line.startswith(key) and "\n" not in line
    return line


NUMBERS = [
    *(f"train.{name}" for name in ("lr", "epochs", "warmup", "weight_decay", "clip", "beta1", "beta2")),
    *(
        "method.strength",
        "method.decay",
        "method.lora.alpha",
        "method.lora.dropout",
        "model.lr",
        "model.architecture.x",
    ),
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_that_is_not_finite_is_refused_wherever_it_stands(configured, key, value):
    assert f"{key}={value}" in refused(configured, key, value)


def test_a_number_within_lists_is_looked_at_too(configured):
    assert refused(configured, "probe.shots", {"mmlu": [1, [float("nan")]]})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.warmup", 1.1),
        ("train.beta1", 1.0),
        ("train.beta2", -0.1),
        ("train.lr", -1e-9),
        ("engine.threads", 100_000),
        ("engine.device", "tpu"),
        ("tracking.wandb", "perhaps"),
        ("seed", 2**63),
        ("method.lora.rank", 0),
        ("method.lora.dropout", 1.0),
        ("model.steps", -1),
        ("model.tokenizer", "letters"),
        ("model.batch_size", 0),
        ("probe.probes.perplexity.window", 0),
        ("tasks.world_total.train_rows", 0),
    ],
)
def test_a_number_or_word_outside_what_is_allowed_is_refused(configured, key, value):
    refused(configured, key, value)


@pytest.mark.parametrize(("key", "value"), [("train.warmup", 1), ("train.beta1", 0), ("method.lora.dropout", 0)])
def test_the_edges_of_a_range_that_belong_to_it_are_allowed(configured, key, value):
    config = changed(configured, key, value)
    check(config)
    check_classes(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method.strength", "abc"),
        ("method.lora.rank", 1.5),
        ("method.lora.rank", True),
        ("method.lora.targets", 3),
        ("model.corpus.lines", "many"),
        ("method.fisher_examples", None),
    ],
)
def test_a_value_of_another_type_is_refused(configured, key, value):
    assert "is not allowed" in refused(configured, key, value)


@pytest.mark.parametrize(
    "method", ["clora.basis", "curlora.select", "kl_base.tokens", "self_replay.form", "secura.magnorm", "secura.merge"]
)
def test_an_unknown_word_is_answered_with_those_that_a_method_knows(method):
    name, _, key = method.partition(".")
    config = compose([*TINY_MODEL, f"method={name}", f"method.{key}=best"])
    with pytest.raises(UserMistake, match=rf"^method\.{key}='best' is not allowed, input should be '\w+'.* or '\w+'; "):
        check_classes(config)


def test_what_a_class_has_no_field_for_is_refused_and_what_it_needs_is_asked_for(configured):
    assert "no field of baselines.ewc.Ewc" in refused(configured, "method.strenght", 1.0)
    plain = copy.deepcopy(configured)
    del plain["method"]["strength"]
    with pytest.raises(UserMistake, match="method.strength is missing"):
        check_classes(from_plain(plain))


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("method", "pandas.read_pickle"),
        ("method", "baselines.ewc.penalty_value"),
        ("method", "tasks.world_task.WorldTask"),
        ("method", "baselines.ewc.Nonesuch"),
        ("method.lora", "os.system"),
        ("method.lora", "baselines.seq.Seq"),
        ("model", "baselines.seq.Seq"),
        ("model.corpus", "subprocess.check_output"),
        ("tasks.world_total", "clbench.examine.matrix.Matrix"),
        ("probe.probes.stream", "tasks.world_task.WorldTask"),
        ("probe.probes.perplexity.texts", "os.listdir"),
    ],
)
def test_a_target_of_another_kind_is_refused_and_never_called(configured, monkeypatch, key, target):
    monkeypatch.setattr("os.system", lambda *given: pytest.fail("it was called"))
    assert target in refused(configured, f"{key}._target_", target)


def test_a_target_where_a_plain_value_is_due_is_refused(configured):
    assert "is none" in refused(configured, "method.strength", {"_target_": "builtins.float", "_args_": [3]})
    assert "is none" in refused(configured, "model.architecture", {"hidden_size": {"_target_": "os.getpid"}})


PLUGIN = """
from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from baselines.seq import Seq

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Own(Seq):
    strength: Annotated[float, Field(ge=0, le=1)]
    kept: dict[str, Tensor] = field(default_factory=dict)
"""


def test_a_plain_value_where_a_target_is_due_is_refused(configured):
    for value in (None, 3, {"rank": 4}):
        assert "a Lora is due; name its class as method.lora._target_" in refused(configured, "method.lora", value)
    assert "no group of settings" in refused(configured, "probe.probes.stream", None)
    assert "no group of settings" in refused(configured, "tasks.world_total", [1])


@pytest.mark.parametrize("value", ["null", "3", "true", "0.5", "seq,null"])
@pytest.mark.parametrize("group", ["method", "model", "stream", "train", "probe", "engine", "tracking", "settings"])
def test_a_group_without_an_option_is_one_line(group, value):
    with pytest.raises(UserMistake, match=f"{group}={value} names no option of {group}; .*conf/{group}"):
        compose([f"{group}={value}"])


def test_settings_of_a_group_are_no_option(configured):
    check_groups(["method={strength: 3}", "method=seq,er", "+experiment=[a,b]", "seed=null", "method.lora=null"])


def test_an_architecture_that_is_no_llamas_is_refused_before_a_model_is_made(configured):
    wrong = {"nonesuch": 3, "hidden_size": 33, "num_attention_heads": 0, "num_hidden_layers": -1}
    for name, value in wrong.items():
        plain = copy.deepcopy(configured["model"])
        plain["architecture"][name] = value
        with pytest.raises((UserMistake, HydraException), match="model.architecture"):
            check_value("model", plain, ModelSource)
            instantiate(plain, _convert_="all")


def test_a_yaml_that_cannot_be_read_is_one_line_that_names_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "own.yaml").write_text("a: [1\nb: }")
    monkeypatch.setattr("sys.argv", ["clbench", f"--config-dir={tmp_path}", "method=own", f"results_dir={tmp_path}"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("clbench: ") and "method/own.yaml" in line and "line 2" in line


def test_an_interruption_while_a_class_is_imported_is_no_mistake(configured, tmp_path, monkeypatch):
    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        check_value("method", configured["method"] | {"_target_": "interrupted.Seq"}, Method)


TASKS = sorted((CONF_DIR / "task").glob("*.yaml"))


def test_a_tasks_metric_is_the_one_that_its_class_computes():
    looked = 0
    for path in TASKS:
        task = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if "metric" not in task:
            continue
        looked += 1
        task |= {"max_train": None, "max_test": None}
        check_value("task", task, Task)
        with pytest.raises(UserMistake, match="task.metric='nonsense' is not allowed, input should be '"):
            check_value("task", task | {"metric": "nonsense"}, Task)
    assert looked > 60


def test_a_method_of_somebody_elses_states_its_ranges_where_it_declares_its_fields(configured, tmp_path, monkeypatch):
    (tmp_path / "own_method.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    plain = configured["method"]
    method = {key: plain[key] for key in ("name", "seed", "lora")} | {"_target_": "own_method.Own", "strength": 0.5}
    check_classes(changed(configured, "method", method))
    with pytest.raises(
        UserMistake, match="method.strength=1.5 is not allowed, input should be less than or equal to 1"
    ):
        check_classes(changed(configured, "method", method | {"strength": 1.5}))
    with pytest.raises(UserMistake, match="method.lora._target_=os.system"):
        check_classes(changed(configured, "method", method | {"lora": {"_target_": "os.system"}}))


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("ewc", "strength", -1.0),
        ("ewc", "fisher_examples", 0),
        ("ewc_online", "decay", 1.1),
        ("er", "ratio", -1.0),
        ("er", "fraction", 2.0),
        ("er", "capacity", 0),
        ("ilora", "decay", 2.0),
        ("ilora", "consistency", -0.1),
        ("l2", "strength", -0.1),
        ("olora", "strength", -0.1),
        ("clora", "fraction", 0.0),
        ("clora", "k", 0),
        ("curlora", "rank", 0),
        ("secura", "rank", 0),
        ("secura", "quantile", 1.5),
        ("secura", "fusion_step", 0),
    ],
)
def test_a_methods_own_number_outside_its_range_is_refused(method, key, value):
    given = {name: one for name, one in methods()[method].items() if name != "name"}
    check_value("method", given, Method)
    with pytest.raises(UserMistake, match=f"method.{key}={value} is not allowed"):
        check_value("method", given | {key: value}, Method)


@pytest.mark.parametrize("key", ["experiment", "method.name", "model.label", "stream.name"])
@pytest.mark.parametrize("name", ["../../x", "a/b", "", ".hidden", "=cmd", "$x", "<b>", "a|b", "a b", "n" * 65, "é"])
def test_a_name_that_becomes_a_folder_is_a_plain_name(configured, key, name):
    config = changed(configured, key, name)
    with pytest.raises(UserMistake, match="plain name"):
        check(config)


def test_names_of_tasks_and_probes_are_plain(configured):
    with pytest.raises(UserMistake, match="plain name"):
        check(changed(configured, "stream.tasks", ["../world_total"]))
    with pytest.raises(UserMistake, match="plain name"):
        check(changed(configured, "probe.probes", {"a|b": {}}))


def test_a_graphics_card_that_is_not_there_is_a_mistake(configured, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    from clbench.build import build

    with pytest.raises(UserMistake, match="engine.device=cuda"):
        build(changed(configured, "engine.device", "cuda"))


def test_every_number_of_a_fixed_group_has_a_range():
    for group in fields(Config):
        shape = group.default_factory if isinstance(group.default_factory, type) else None
        for own in fields(shape) if shape not in (None, dict, list) else ():
            numeric = {"int", "float", "int | None", "float | None"}
            described = own.type if isinstance(own.type, str) else str(own.type).replace("<class '", "").rstrip("'>")
            if described in numeric and own.name != "zero_stage":
                assert own.metadata.get("least", float("-inf")) > float("-inf"), f"{group.name}.{own.name}"


def test_an_adapter_wider_than_a_layer_is_a_mistake():
    from transformers import LlamaConfig, LlamaForCausalLM

    from clbench.models.lora import Lora

    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=11)
    with pytest.raises(UserMistake, match="16 at most"):
        Lora(rank=17, alpha=1, targets=["q_proj"]).add(LlamaForCausalLM(LlamaConfig(**small)), seed=0)
