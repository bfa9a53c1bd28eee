"""The weights that a run begins with: all there, those of the configuration, finite, the same when it continues, and never a pickle."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from clbench import hashes
from clbench.config.composition import compose
from clbench.experiment import run
from clbench.models.pretrained import Pretrained
from clbench.models.tiny import fresh_llama, word_tokenizer
from clbench.types import UserMistake

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
WORDS = tuple("the cat sleeps a dog runs home".split())


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """The folder of a tiny model with tied embeddings."""
    folder = tmp_path_factory.mktemp("model") / "sound"
    tokenizer = word_tokenizer(WORDS)
    fresh_llama(tokenizer, architecture=SIZES, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def load(folder: Path, **given):
    """As a run does it: tokenizer and length, then the fingerprint, then the weights."""
    source = Pretrained(label="x", name=str(folder), **given)
    source.load_tokenizer(folder)
    source.configuration(folder)
    source.record(folder)
    return source.load(folder)[0]


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def refused(folder: Path) -> str:
    with pytest.raises(UserMistake) as mistake:
        load(folder)
    assert "\n" not in str(mistake.value)
    return str(mistake.value)


def rename(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[f"other.{name}"] = tensors.pop(name)


def without_layer(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
            "missing: model.layers.1.mlp.up_proj.weight)",
        ),
        (without_layer, "and 6 more"),
        (rename, "unknown: other.model.embed_tokens.weight"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "unknown: extra"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(17)}),
            "model.norm.weight ([17] instead of [16])",
        ),
        (lambda tensors: tensors["model.norm.weight"].fill_(torch.nan), "not finite in model.norm.weight"),
        (lambda tensors: tensors["model.norm.weight"][3:4].fill_(torch.inf), "not finite in model.norm.weight"),
    ],
)
def test_weights_that_are_not_those_of_the_configuration_are_refused_by_name(folder, edit, said):
    change(folder, edit)
    assert said in refused(folder)


def test_a_whole_model_is_loaded_its_tied_weights_from_one_tensor(folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in load(folder).state_dict().items():
        assert torch.equal(tensor, plain[name])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text('{"model_type": '),
        lambda folder: change_config(folder, model_type="nonesuch"),
        lambda folder: change_config(folder, hidden_size=32),
        lambda folder: change_config(folder, hidden_size="wide"),
        lambda folder: change_config(folder, num_hidden_layers=3),
        lambda folder: change_config(folder, num_hidden_layers=1),
        lambda folder: change_config(
            folder, auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}, model_type="mine"
        ),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100]),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 4096),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
    ],
)
def test_a_damaged_folder_is_one_line(folder, damage):
    damage(folder)
    assert str(folder) in refused(folder)


@pytest.mark.parametrize("content", ["[]", '"text"', "null", '{"a": ', "\ufeff{}"])
@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"]
    + ["adapter_config.json", "model.safetensors.index.json"],
)
def test_a_file_that_holds_no_object_is_named(folder, name, content):
    (folder / name).write_text(content, encoding="utf-8")
    line = refused(folder)
    assert str(folder) in line and (name in line or name == "tokenizer.json")


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("the pickle was read",)


def test_a_pickle_is_never_read(folder):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    load(folder)
    (folder / "model.safetensors").unlink()
    assert "pytorch_model.bin" in refused(folder) and "save_pretrained" in refused(folder)


def test_code_beside_the_weights_runs_only_when_the_yaml_says_so(folder, tmp_path):
    change_config(folder, auto_map={"AutoConfig": "mine.C"}, model_type="mine")
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused(folder)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def adapter(sound, tmp_path) -> Path:
    """A LoRA of the tiny model that moves its answers."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(sound), LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    return folder


def test_an_adapters_folder_is_the_base_with_the_adapter_merged(sound, adapter):
    base, tensors = load_file(sound / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    own = load(adapter).state_dict()
    torch.testing.assert_close(own[f"{name}.weight"], base[f"{name}.weight"] + 8 / 2 * b @ a)
    assert own.keys() == load(sound).state_dict().keys()
    assert all(parameter.requires_grad for parameter in load(adapter).parameters())
    record = Pretrained(label="x", name=str(adapter)).record(adapter)
    assert record["model_adapter_of"] == str(sound)
    assert record["model_fingerprint"] != Pretrained(label="x", name=str(sound)).record(sound)["model_fingerprint"]


@pytest.mark.parametrize("kind", ["weights", "tokenizer"])
def test_other_weights_or_another_tokenizer_are_refused_when_a_run_continues(sound, folder, tmp_path, tiny, kind):
    settings = [name for name in tiny if not name.startswith("model.")]
    places = [
        f"model.name={folder}",
        "model.label=toy",
        "+model.world_seed=0",
        "train.max_length=64",
        f"results_dir={tmp_path}",
    ]
    config = compose([*settings, *places, "probe.text_tokens=null", "stream.limit=1"])
    path = run(config)
    assert json.loads((path / "manifest.json").read_text())["model_fingerprint"] == hashes.of_folder(folder)
    (path / "status").write_text("interrupted\n")
    if kind == "weights":
        change(folder, lambda tensors: tensors["model.norm.weight"][:1].add_(2**-20))
    else:
        (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserMistake, match="model_fingerprint"):
        run(config)
    (path / "status").write_text("complete\n")
    with pytest.raises(UserMistake, match="model_fingerprint"):
        run(config)


def test_an_adapter_that_lacks_a_tensor_or_lies_beside_a_whole_model_is_refused(sound, adapter, folder):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path, {"format": "pt"})
    assert "missing: " in refused(adapter)
    shutil.copy(adapter / "adapter_config.json", folder)
    assert "both" in refused(folder)
    change = json.loads((adapter / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": str(sound) + "-gone"
    }
    (adapter / "adapter_config.json").write_text(json.dumps(change))
    assert "could not be loaded" in refused(adapter)


def test_a_fingerprint_is_that_of_tensors_configuration_and_tokenizer_and_not_of_names_and_files(
    sound, folder, tmp_path
):
    first = hashes.of_folder(sound)
    assert hashes.of_folder(folder) == first
    spread = tmp_path / "spread"
    AutoModelForCausalLM.from_pretrained(sound).save_pretrained(spread, max_shard_size="4KB")
    assert len(list(spread.glob("*.safetensors"))) > 1
    for path in sound.glob("*.json"):
        shutil.copy(path, spread)
    assert hashes.of_folder(spread) == first
    change(folder, lambda tensors: tensors["model.norm.weight"][:1].add_(2**-20))
    assert hashes.of_folder(folder) != first
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        shutil.copytree(sound, folder, dirs_exist_ok=True)
        assert hashes.of_folder(folder) == first
        (folder / name).write_text((folder / name).read_text() + " ")
        assert hashes.of_folder(folder) != first
