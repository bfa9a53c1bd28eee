"""What a run trained, as an ordinary checkpoint of Hugging Face, and as a PEFT adapter where it is one.

The model is the method's first view after the run's last finished stage: what the leaderboard's row of that method was measured on.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.utils import instantiate
from peft.tuners.lora import LoraLayer
from torch.nn import Module
from transformers import PreTrainedTokenizerFast

from clbench.build import check_classes, load_model, make_method, set_up_torch, wrap
from clbench.config import EngineConfig, from_plain
from clbench.hashes import of_tensor
from clbench.models.folding import export
from clbench.models.loss import causal_lm
from clbench.models.weights import load_trainable_state
from clbench.record.ledger import STAGE, read_checkpoint, read_manifest
from clbench.record.manifest import FORMAT
from clbench.types import UserMistake


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run's model and its tokenizer; `is_adapter`: whether it is nothing but LoRA on the weights of the run's base model."""

    model: Module
    tokenizer: PreTrainedTokenizerFast
    is_adapter: bool


@contextmanager
def trained(path: Path, *, cache_dir: Path | None = None) -> Iterator[Trained]:
    """What the run recorded at `path` trained, inside as its first view has it, in one process whatever the run had.

    Raises UserMistake where the run has no finished stage, or its model or tokenizer is another one now. `cache_dir`: where a model that was
    pretrained here is kept, if not where the run had it.
    """
    if not (path / "manifest.json").is_file():
        raise UserMistake(f"{path} holds no run; name its directory, results_dir/runs/NAME")
    manifest = read_manifest(path / "manifest.json", format=FORMAT)
    config = from_plain(manifest["config"])
    here = cache_dir or Path(config.cache_dir)
    config = replace(config, cache_dir=str(here), engine=EngineConfig(dtype=config.engine.dtype))
    set_up_torch(config)
    check_classes(config)
    source = instantiate(config.model, _convert_="all")
    if source.record(here)["model_fingerprint"] != manifest["model_fingerprint"]:
        raise UserMistake(
            f"model.name={config.model.get('name')!r} is not the model that {path.name} trained; restore it"
        )
    if not (path / "checkpoint" / STAGE).is_file():
        raise UserMistake(f"{path} has no checkpoint of a finished stage; run it")
    kept = read_checkpoint(path / "checkpoint" / STAGE, run=manifest["run"])
    method, model = make_method(config), load_model(config, source)
    untouched = {name: of_tensor(parameter.cpu()) for name, parameter in model.named_parameters()}
    model = wrap(config, method, model)
    load_trainable_state(model, kept.weights)
    method.load_state_dict(kept.state)
    view, *_ = method.views(model).values()
    with view:
        # Where a method writes into weights, its adapter alone would be another model.
        layers = {name: layer for name, layer in causal_lm(model).named_modules() if isinstance(layer, LoraLayer)}
        own = {f"{name}.weight": of_tensor(layer.get_base_layer().weight.cpu()) for name, layer in layers.items()}
        is_adapter = bool(own) and own.items() <= untouched.items()
        yield Trained(model=model, tokenizer=source.load_tokenizer(here), is_adapter=is_adapter)


def export_run(path: Path, out: Path, *, cache_dir: Path | None = None) -> bool:
    """Writes the model of the run at `path` to the new folder `out`; gives whether `out`/adapter is a PEFT adapter of the run's base model."""
    if out.exists() and any(out.iterdir()):
        raise UserMistake(f"{out} is not empty; name a new folder")
    with trained(path, cache_dir=cache_dir) as found:
        export(found.model, out)
        found.tokenizer.save_pretrained(out)
        if not found.is_adapter:
            shutil.rmtree(out / "adapter", ignore_errors=True)
        return found.is_adapter
