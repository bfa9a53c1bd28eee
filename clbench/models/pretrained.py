"""Models of the hub, or of a local folder."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from safetensors import SafetensorError
from torch.nn import Module
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CpmAntConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.peft_utils import find_adapter_config_file

from clbench.hashes import of_folder, of_json, weights_in
from clbench.models.limits import check_objects, check_tokens, rope_settings, settings
from clbench.models.loss import causal_lm
from clbench.models.sharding import is_sharded, stored
from clbench.types import UserMistake

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
UNLOADABLE = (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError)
"""What libraries raise for folders and files that they cannot read, kinds of model that they do not know, and packages that a tokenizer lacks."""
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.tiktoken", "*.jinja", "*.py"]
"""What is downloaded of a model: no pickles."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model of the hub, or one in a local folder: `name` and `revision` as transformers takes them. A PEFT adapter is merged into its base.

    `architecture` repeats what decides its size, as fields of its transformers configuration, so that its cost can be counted without it.
    `targets` is what the yamls of methods take their layers from, where it is given; `world_seed` names the embedded world that the model was
    pretrained on, if any. `trust_remote_code` lets Python files that lie beside the weights run; weights are read from safetensors alone.
    """

    label: str
    name: str
    revision: str | None = None
    architecture: Mapping[str, Any] = field(default_factory=dict)
    targets: list[str] | str | None = None
    world_seed: int | None = None
    trust_remote_code: bool = False

    def record(self, cache_dir: Path) -> dict[str, str]:
        """For the manifest: `model_fingerprint`, the hash of the weights, configuration and tokenizer that are there now; of an adapter also that
        of its base, whose name is `model_adapter_of`."""
        base, folder = self.base(), self.folder()
        with refusing(self.name):
            own = of_folder(folder)
        if base is None:
            return {"model_fingerprint": own}
        both = of_json([own, base.record(cache_dir)["model_fingerprint"]])
        return {"model_fingerprint": both, "model_adapter_of": base.name}

    def load(
        self, cache_dir: Path, *, dtype: torch.dtype = torch.float32
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """The model in `dtype` on the CPU, in eval mode, and its tokenizer. Hugging Face keeps a download in its own cache, not in `cache_dir`."""
        if self.trust_remote_code:
            log.warning("model.trust_remote_code=true: Python code that lies beside the weights of %s runs", self.name)
        tokenizer, model = self.load_tokenizer(cache_dir), self.weights(cache_dir, dtype=dtype)
        infinite = [key for key, parameter in model.named_parameters() if not stored(parameter).isfinite().all()]
        if infinite:
            raise UserMistake(
                f"model.name={self.name!r} has numbers that are not finite in {first_of(infinite)}; choose another model"
            )
        return prepared(model), tokenizer

    def configuration(self, cache_dir: Path) -> PretrainedConfig:
        """What lies beside the weights, of an adapter its base's; raises UserMistake where it is no causal language model's."""
        base = self.base()
        if base is not None:
            return base.configuration(cache_dir)
        with refusing(self.name):
            config = AutoConfig.from_pretrained(
                self.name, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        known = self.trust_remote_code or type(config) in AutoModelForCausalLM._model_mapping
        if config.is_encoder_decoder or not known:
            raise UserMistake(
                f"model.name={self.name!r} is a {config.model_type}, no decoder that continues text; name a causal language model"
            )
        if type(config) is CpmAntConfig:  # kl_base and others project hidden states through inputs_embeds
            raise UserMistake(
                f"model.name={self.name!r} is a cpmant, whose forward takes no inputs_embeds; name another model"
            )
        text: Any = config.get_text_config()
        window = text.to_dict().get("sliding_window")
        if window and "sliding_window" not in type(text)().to_dict():
            raise UserMistake(
                f"model.name={self.name!r} states sliding_window={window}, which a {text.model_type} ignores in a forward and obeys in its cache; "
                "take it out of config.json, or name another model"
            )
        return config

    def sizes(self, cache_dir: Path) -> PretrainedConfig:
        """From `architecture` alone, where it is stated."""
        stated = "model_type" in self.architecture
        return AutoConfig.for_model(**self.architecture) if stated else self.configuration(cache_dir)

    def load_tokenizer(self, cache_dir: Path) -> PreTrainedTokenizerFast:
        """The tokenizer, with the special tokens that it lacks taken from its EOS; of an adapter without one its base's."""
        base = self.base()
        if base is not None and not any(self.folder().glob("tokenizer*")):
            return base.load_tokenizer(cache_dir)
        with refusing(self.name), reading("its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(
                self.name, revision=self.revision, padding_side="right", trust_remote_code=self.trust_remote_code
            )
        if tokenizer.eos_token is None:
            raise UserMistake(
                f"model.name={self.name!r} has a tokenizer without an end-of-text token; choose another model"
            )
        if tokenizer.bos_token is None:
            tokenizer.bos_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        check_tokens(self.configuration(cache_dir), tokenizer)
        return tokenizer

    def base(self) -> Self | None:
        """The model that the PEFT adapter `name` is for, None where `name` is a whole model; raises UserMistake where it is both."""
        check_objects(Path(self.name))
        with refusing(self.name):
            path = find_adapter_config_file(self.name, revision=self.revision)
            if path is None:
                return None
            if Path(self.name).is_dir() and (Path(self.name) / "config.json").is_file():
                raise UserMistake(
                    f"model.name={self.name!r} holds both a whole model (config.json) and an adapter (adapter_config.json); "
                    "move one of them elsewhere"
                )
            adapter = PeftConfig.from_pretrained(str(Path(path).parent))
        if not adapter.base_model_name_or_path:
            raise UserMistake(
                f"model.name={self.name!r} is an adapter that names no base; add base_model_name_or_path to it"
            )
        return replace(self, name=adapter.base_model_name_or_path, revision=adapter.revision)

    def folder(self) -> Path:
        """Where the weights are: the local folder, or that of the download; raises UserMistake where there is no safetensors file."""
        with refusing(self.name):
            folder = Path(self.name)
            if not folder.is_dir():
                folder = Path(
                    snapshot_download(self.name, revision=self.revision, allow_patterns=WANTED, ignore_patterns="*/*")
                )
            if not weights_in(folder):
                pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
                what = f"{', '.join(sorted(pickles))}, which may run code when read," if pickles else "no weights"
                raise UserMistake(
                    f"model.name={self.name!r} has {what} and no model.safetensors; convert it with save_pretrained, or choose another model"
                )
        return folder

    def weights(self, cache_dir: Path, *, dtype: torch.dtype) -> PreTrainedModel:
        """The model, an adapter merged into its base; raises UserMistake where a weight is missing or misfits."""
        base, folder = self.base(), self.folder()
        if base is not None:
            log.info("%s is an adapter: it is merged into %s", self.name, base.name)
            return merged(base.weights(cache_dir, dtype=dtype), folder)
        local = replace(self, name=str(folder), revision=None)
        config = without_dropout(local.configuration(cache_dir))
        with refusing(self.name), reading("its configuration"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=self.trust_remote_code,
            )
        model, found = loaded
        check_complete(
            self.name, lacks=found["missing_keys"], others=found["unexpected_keys"], misfits=found["mismatched_keys"]
        )
        return model


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Raises UserMistake, in one line, where what is done inside cannot read the model `name`."""
    try:
        yield
    except UNLOADABLE as error:
        if isinstance(error, UserMistake):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserMistake(
            f"model.name={name!r} could not be loaded ({reason}); name a local folder, or choose another model"
        ) from error


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Raises ValueError where `what`, files that a library reads inside, holds a value of the wrong kind."""
    try:
        yield
    except Exception as error:
        # tokenizers has no narrower kind than Exception itself; transformers runs into such a value.
        if type(error) not in (Exception, TypeError, AttributeError):
            raise
        raise ValueError(f"{what}: {error}") from error


def merged(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The base with the adapter of a folder added to its weights; raises UserMistake where they do not belong together."""
    if any(map(is_sharded, base.parameters())):
        raise UserMistake(
            f"model.name={str(folder)!r} is an adapter, which engine.shard_base=true cannot merge; merge it beforehand"
        )
    with refusing(str(folder)):
        adapter = PeftConfig.from_pretrained(str(folder))
        model = get_peft_model(base, adapter)
        if not isinstance(model.base_model, BaseTuner):
            raise UserMistake(
                f"model.name={str(folder)!r} is an adapter of the kind {adapter.peft_type}, which cannot be merged; name one of LoRA"
            )
        found = model.load_adapter(str(folder), "default", use_safetensors=True)
        check_complete(str(folder), lacks=found.missing_keys, others=found.unexpected_keys, misfits=())
        return causal_lm(model.merge_and_unload(safe_merge=True).requires_grad_(True))


def check_complete(
    name: str, *, lacks: Iterable[str], others: Iterable[str], misfits: Iterable[tuple[Any, ...]]
) -> None:
    """Raises UserMistake where weights and configuration do not belong together: what is missing would be drawn at random."""
    shapes = [f"{key} ({list(there)} instead of {list(wanted)})" for key, there, wanted in misfits]
    faults = {"missing": lacks, "unknown": others, "of another shape": shapes}
    said = "; ".join(f"{what}: {first_of(keys)}" for what, keys in faults.items() if keys)
    if said:
        raise UserMistake(
            f"model.name={name!r} has weights that are not those of its configuration ({said}); restore the folder"
        )


def first_of(keys: Iterable[str]) -> str:
    """The first three of some names, and how many more there are."""
    ordered = sorted(keys)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """`config` with its own dropout off, said in a line of the log: a method states the dropout that it wants (`method.lora.dropout`)."""
    text = config.get_text_config()
    found = {
        key: value for key, value in text.to_dict().items() if "drop" in key and isinstance(value, float) and value
    }
    if found:
        stated = ", ".join(f"{key} {value}" for key, value in found.items())
        log.info("the model's own dropout is off in training: its configuration states %s", stated)
        text.update(dict.fromkeys(found, 0.0))
    return config


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    """A model as a run uses it: what it gives for a sequence depends on no other sequence, and not on settings for sampling."""
    # Answers are the likeliest tokens: penalties and samples that a model asks for are left out, its EOS ids stay.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    if any(rope.get("rope_type") == "dynamic" for rope in rope_settings(settings(model))):
        for module in model.modules():
            if "original_inv_freq" in dict(module.named_buffers(recurse=False)):
                module.register_forward_pre_hook(unstretched)
    return model.eval()


def unstretched(rotary: Module, inputs: object) -> None:
    """Forgets the longest sequence that a dynamic rotary embedding has seen, by which it would read the next one."""
    rotary.max_seq_len_cached = rotary.original_max_seq_len
    rotary.inv_freq = rotary.original_inv_freq
