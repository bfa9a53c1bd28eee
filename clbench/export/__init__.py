"""What a run trained, as an ordinary checkpoint of Hugging Face, and as a PEFT adapter where it is one.

The model is the method's first view after the run's last finished stage: what the leaderboard's row of that method was measured on.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hydra.utils import instantiate
from peft.tuners.lora import LoraLayer
from torch.nn import Module

from clbench.build import check_classes, load_model, make_method, set_up_torch, wrap
from clbench.config import from_plain
from clbench.hashes import of_tensors
from clbench.models.folding import export
from clbench.models.weights import load_trainable_state
from clbench.record.ledger import STAGE, read_checkpoint, read_manifest
from clbench.record.manifest import FORMAT
from clbench.types import UserMistake


@contextmanager
def trained(path: Path, *, cache_dir: Path | None = None) -> Iterator[tuple[Module, Callable[[Path], object]]]:
    """The model of the run recorded at `path` as its first view has it, and what writes its tokenizer to a folder.

    Raises UserMistake where the run has no finished stage, or its model or tokenizer is another one now. `cache_dir`: where a model that was
    pretrained here is kept, if not where the run had it.
    """
    if not (path / "manifest.json").is_file():
        raise UserMistake(f"{path} holds no run; name its directory, results_dir/runs/NAME")
    manifest = read_manifest(path / "manifest.json", format=FORMAT)
    config = from_plain(manifest["config"])
    config = replace(config, cache_dir=str(cache_dir)) if cache_dir else config
    set_up_torch(config)
    check_classes(config)
    source = instantiate(config.model, _convert_="all")
    here = Path(config.cache_dir)
    if source.record(here)["model_fingerprint"] != manifest["model_fingerprint"]:
        raise UserMistake(
            f"model.name={config.model.get('name')!r} is not the model that {path.name} trained; restore it"
        )
    if not (path / "checkpoint" / STAGE).is_file():
        raise UserMistake(f"{path} has no checkpoint of a finished stage; run it")
    kept = read_checkpoint(path / "checkpoint" / STAGE, run=manifest["run"])
    method = make_method(config)
    model = wrap(config, method, load_model(config, source))
    load_trainable_state(model, kept.weights)
    method.load_state_dict(kept.state)
    view, *_ = method.views(model).values()
    with view:
        yield model, source.load_tokenizer(here).save_pretrained


def export_run(path: Path, out: Path, *, cache_dir: Path | None = None) -> bool:
    """Writes the model of the run at `path` to the new folder `out`; gives whether `out`/adapter is a PEFT adapter of the run's base model."""
    if out.exists() and any(out.iterdir()):
        raise UserMistake(f"{out} is not empty; name a new folder")
    with trained(path, cache_dir=cache_dir) as (model, save_tokenizer):
        export(model, out)
        save_tokenizer(out)
        has_adapter = (out / "adapter").is_dir() and not writes_into_base(model, path, cache_dir=cache_dir)
    if not has_adapter:
        shutil.rmtree(out / "adapter", ignore_errors=True)
    return has_adapter


def writes_into_base(model: Module, path: Path, *, cache_dir: Path | None) -> bool:
    """Whether the weights under LoRA layers are other ones than the base model's, or the adapter is no LoRA: it alone would be another model."""
    layers = {name: layer.get_base_layer() for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    config = from_plain(read_manifest(path / "manifest.json", format=FORMAT)["config"])
    config = replace(config, cache_dir=str(cache_dir)) if cache_dir else config
    untouched = load_model(config, instantiate(config.model, _convert_="all"))
    names = [name.removeprefix("base_model.model.") for name in layers]
    now = {name: layer.weight.cpu() for name, layer in zip(names, layers.values(), strict=True)}
    before = {name: untouched.get_submodule(name).weight.cpu() for name in names}
    return not layers or of_tensors(now) != of_tensors(before)
