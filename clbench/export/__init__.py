"""What a run trained, as an ordinary checkpoint of Hugging Face, and as a PEFT adapter where it is one.

The model is a view of the method's after a finished stage, by default the first view after the last stage: what the leaderboard's row of that
method was measured on.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peft.tuners.lora import LoraLayer
from torch.nn import Module
from transformers import PreTrainedTokenizerFast

from clbench.build import load_model
from clbench.experiment.afterwards import recorded, restored
from clbench.hashes import of_tensor
from clbench.models.folding import export
from clbench.models.loss import causal_lm
from clbench.types import UserMistake


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run's model and its tokenizer; `is_adapter`: whether it is nothing but LoRA on the weights of the run's base model."""

    model: Module
    tokenizer: PreTrainedTokenizerFast
    is_adapter: bool


@contextmanager
def trained(path: Path, *, stage: int | None = None, cache_dir: Path | None = None) -> Iterator[Trained]:
    """What the run recorded at `path` trained, inside as a view of its method has it: RUN@VIEW names one, RUN is the first.

    `stage`: which of the stages that are kept, None the last. `cache_dir` as `recorded` takes it.
    """
    name, _, view = path.name.partition("@")
    run = recorded(path.parent / name, cache_dir=cache_dir)
    model = load_model(run.config, run.source)
    untouched = {name: of_tensor(parameter.cpu()) for name, parameter in model.named_parameters()}
    method, model = restored(run, run.stages(stage)[-1], model)
    views = method.views(model)
    if view and view not in views:
        raise UserMistake(f"{name} has no view {view!r}; it has {', '.join(views)}")
    with views[view or next(iter(views))]:
        # Where a method writes into weights, its adapter alone would be another model.
        layers = {name: layer for name, layer in causal_lm(model).named_modules() if isinstance(layer, LoraLayer)}
        weights = {f"{name}.weight": layer.get_base_layer().get_parameter("weight") for name, layer in layers.items()}
        own = {name: of_tensor(weight.cpu()) for name, weight in weights.items()}
        is_adapter = bool(own) and own.items() <= untouched.items()
        tokenizer = run.source.load_tokenizer(Path(run.config.cache_dir))
        yield Trained(model=model, tokenizer=tokenizer, is_adapter=is_adapter)


def export_run(path: Path, out: Path, *, stage: int | None = None, cache_dir: Path | None = None) -> bool:
    """Writes that model to the new folder `out`; gives whether `out`/adapter is a PEFT adapter of the run's base model."""
    if out.exists() and any(out.iterdir()):
        raise UserMistake(f"{out} is not empty; name a new folder")
    with trained(path, stage=stage, cache_dir=cache_dir) as found:
        export(found.model, out)
        found.tokenizer.save_pretrained(out)
        if not found.is_adapter:
            shutil.rmtree(out / "adapter", ignore_errors=True)
        return found.is_adapter
