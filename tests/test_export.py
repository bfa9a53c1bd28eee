"""A run's model outside clbench: the same logits from transformers alone, and from PEFT where the method is plain LoRA."""

import shutil
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import Module
from transformers import AutoModelForCausalLM, AutoTokenizer

from clbench import export
from clbench.config.composition import compose
from clbench.experiment import run
from tests.conftest import small

BASE = ("stream.limit=1", "train.lr=1e-2")


def logits(model: Module) -> Tensor:
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def check(path: Path, out: Path, base: Path, *, stage: int | None = None, trains: bool = True) -> None:
    """That a run's model is exported with the logits that it has in clbench; the adapter with them, where there is one."""
    has_adapter = not export.export_run(path, out, stage=stage)
    assert has_adapter == (out / "adapter").is_dir()
    with export.trained(path, stage=stage) as (model, *_):
        expected = logits(model)
    untouched = AutoModelForCausalLM.from_pretrained(base)
    assert (float((expected - logits(untouched)).abs().max()) > 1e-3) == trains
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), expected, rtol=0, atol=1e-5)
    assert (
        AutoTokenizer.from_pretrained(out)("of")["input_ids"] == AutoTokenizer.from_pretrained(base)("of")["input_ids"]
    )
    if has_adapter:
        adapted = PeftModel.from_pretrained(untouched, out / "adapter")
        torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=1e-5)


def base_of(cache_dir: Path) -> Path:
    (folder,) = (path for path in (cache_dir / "models").iterdir() if path.is_dir())
    return folder


PLAIN = ("seq", "ilora", "base_interpolation")
"""Methods whose first view is one LoRA on the untouched weights."""

SELDOM = ("ilora", "base_interpolation", "curlora", "osf")


@pytest.mark.parametrize(
    "method", ["seq", "merge_average", *(pytest.param(name, marks=pytest.mark.slow) for name in SELDOM)]
)
def test_a_run_is_exported_with_the_logits_that_it_was_examined_with(method, overrides, cache_dir, tmp_path):
    path = run(compose([*overrides, *BASE, *small(method)]))
    check(path, tmp_path / "out", base_of(cache_dir))
    assert (tmp_path / "out" / "adapter").is_dir() == (method in PLAIN)


@pytest.fixture
def own(tiny, cache_dir, tmp_path, monkeypatch) -> list[str]:
    """The command line of a run with the model of the folder "model" of the working folder, to which the tiny one is copied."""
    monkeypatch.chdir(tmp_path)
    made = instantiate(compose([*tiny, f"results_dir={tmp_path}"]).model, _convert_="all").made(cache_dir)
    shutil.copytree(made.name, "model")
    settings = [word for word in tiny if not word.startswith("model.")]
    return [*settings, *BASE, "model.name=model", "+model.world_seed=0", f"results_dir={tmp_path}"]


def test_a_run_that_began_from_an_adapter_is_exported_whole_and_never_as_an_adapter_of_the_base_alone(own, command):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("model"), LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.05 * ("lora_B" in name)
    model.save_pretrained("first")
    path = run(compose([*own, "model.name=first"]))
    code, out, _ = command("clbench.export", path, "out=out")
    assert code == 0 and out == (
        "out for transformers, none for PEFT: the run began from an adapter, so its own would not be for model alone\n"
    )
    assert not Path("out/adapter").exists()
    with export.trained(path) as (model, *_):
        expected = logits(model)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained("out")), expected, rtol=0, atol=1e-5)
    begun = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "first")
    assert float((expected - logits(begun)).abs().max()) > 1e-3


def test_an_adapter_of_a_model_in_a_folder_is_opened_from_another_folder(own, tmp_path, monkeypatch):
    path = run(compose(own))
    assert export.export_run(path, Path("out")) == ""
    with export.trained(path) as (model, *_):
        expected = logits(model)
    monkeypatch.chdir("/")
    opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter")
    torch.testing.assert_close(logits(opened), expected, rtol=0, atol=1e-5)


def test_the_command_says_where_it_wrote_and_refuses_what_it_cannot_export(overrides, tmp_path, command):
    path, new = run(compose([*overrides, *BASE])), f"out={tmp_path / 'new'}"
    code, out, _ = command("clbench.export", path, f"out={tmp_path / 'out'}", "stage=1")
    assert code == 0 and out.strip().endswith("adapter for PEFT")
    wrong = {
        (path, f"out={tmp_path / 'out'}"): "is not empty",
        (tmp_path, new): "holds no run",
        (path, new, "stage=2"): "has not kept stage=2, but 1; train.checkpoint=all",
        (path, new, "stages=1"): "stages=1 is not to be given here; allowed are out=..., stage=..., cache_dir=...",
        (path,): "say where to",
        (f"{path}@fast", new): "has no view 'fast'; it has model",
    }
    for words, said in wrong.items():
        code, _, errors = command("clbench.export", *words)
        assert code == 2 and said in errors and errors.count("\n") == 1, errors
