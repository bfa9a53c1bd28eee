"""What a run trained, as an ordinary checkpoint of Hugging Face, and as a PEFT adapter where it is one.

The model is a view of the method's after a finished stage, by default the first view after the last stage: what the leaderboard's row of that
method was measured on.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def trained(
    path: Path, *, stage: int | None = None, cache_dir: Path | None = None
) -> Iterator[tuple[Module, PreTrainedTokenizerFast, str]]:
    """The model that the run recorded at `path` trained, inside as a view of its method has it: RUN@VIEW names one, RUN is the first; its tokenizer;
    and why it is not one LoRA on the weights of a model that has a name, "" where it is.

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
        layers = {name: layer for name, layer in causal_lm(model).named_modules() if isinstance(layer, LoraLayer)}
        weights = {f"{name}.weight": layer.get_base_layer().get_parameter("weight") for name, layer in layers.items()}
        own = {name: of_tensor(weight.cpu()) for name, weight in weights.items()}
        # Where a method writes into weights, its adapter alone would be another model.
        is_lora = bool(own) and own.items() <= untouched.items()
        no_adapter = "" if is_lora else "what was trained is more, or other, than one LoRA"
        if base := run.manifest.get("model_adapter_of"):
            no_adapter = f"the run began from an adapter, so its own would not be for {base} alone"
        yield model, run.source.load_tokenizer(Path(run.config.cache_dir)), no_adapter


def export_run(path: Path, out: Path, *, stage: int | None = None, cache_dir: Path | None = None) -> str:
    """Writes that model to the new folder `out`, and to `out`/adapter as a PEFT adapter of the run's base model; gives why not that, else ""."""
    if out.exists() and any(out.iterdir()):
        raise UserMistake(f"{out} is not empty; name a new folder")
    with trained(path, stage=stage, cache_dir=cache_dir) as (model, tokenizer, no_adapter):
        export(model, out)
        tokenizer.save_pretrained(out)
        if no_adapter:
            shutil.rmtree(out / "adapter", ignore_errors=True)
        return no_adapter
