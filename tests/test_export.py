"""A run's model outside clbench: the same logits from transformers alone, and from PEFT where the method is plain LoRA."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Module
from transformers import AutoModelForCausalLM, AutoTokenizer

from clbench import export
from clbench.config.composition import compose
from clbench.experiment import run

BASE = ("stream.limit=1", "train.lr=1e-2")


def logits(model: Module) -> Tensor:
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def check(path: Path, out: Path, base: Path, *, stage: int | None = None, trains: bool = True) -> None:
    """That a run's model is exported with the logits that it has in clbench; the adapter with them, where there is one."""
    has_adapter = export.export_run(path, out, stage=stage)
    assert has_adapter == (out / "adapter").is_dir()
    with export.trained(path, stage=stage) as found:
        expected = logits(found.model)
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
    path = run(compose([*overrides, *BASE, f"method={method}"]))
    check(path, tmp_path / "out", base_of(cache_dir))
    assert (tmp_path / "out" / "adapter").is_dir() == (method in PLAIN)


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
