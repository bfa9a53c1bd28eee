"""Models of the hub, or of a local folder."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from clbench.models.limits import check_tokens, positions, rope_settings, settings
from clbench.types import UserMistake

UNLOADABLE = (OSError, ValueError, ImportError)
"""What transformers raises for folders that it cannot read, kinds of model that it does not know, and packages that a tokenizer lacks."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model of the hub, or one in a local folder: `name` and `revision` as transformers takes them.

    `architecture` repeats what decides its size, as fields of its transformers configuration, so that its cost can be counted without it.
    """

    label: str
    name: str
    revision: str | None = None
    architecture: Mapping[str, Any] = field(default_factory=dict)

    def fingerprint(self) -> str:
        return sha256(["pretrained", self.name, self.revision])

    def load(
        self, cache_dir: Path, *, dtype: torch.dtype = torch.float32
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """The model in `dtype` on the CPU, in eval mode, and its tokenizer. Hugging Face keeps a download in its own cache, not in `cache_dir`."""
        return load(self.name, revision=self.revision, dtype=dtype)

    def configuration(self, cache_dir: Path) -> PretrainedConfig:
        """The model's configuration, from `architecture` alone."""
        if "model_type" not in self.architecture:
            raise UserMistake(f"model {self.label!r} states no architecture with a model_type; add it in conf/model")
        return AutoConfig.for_model(**self.architecture)

    def positions(self, cache_dir: Path) -> int:
        """The longest input in tokens, as the model's own configuration has it."""
        return positions(configuration(self.name, revision=self.revision))

    def load_tokenizer(self, cache_dir: Path) -> PreTrainedTokenizerFast:
        return load_tokenizer(self.name, revision=self.revision)


def sha256(value: object) -> str:
    """SHA-256, in hexadecimal, of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def load(
    name: str, *, revision: str | None = None, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model (in `dtype`, on the CPU, in eval mode) and tokenizer of a folder or hub id; raises UserMistake where there is none."""
    tokenizer = load_tokenizer(name, revision=revision)
    try:
        config = without_dropout(configuration(name, revision=revision))
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype, config=config)
    except UNLOADABLE as error:
        raise not_loaded(name, error) from error
    return prepared(model), tokenizer


def configuration(name: str, *, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a folder or hub id; raises UserMistake where it is no causal language model's."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except UNLOADABLE as error:
        raise not_loaded(name, error) from error
    if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserMistake(
            f"model.name={name!r} is a {config.model_type}, no decoder that continues text; name a causal language model"
        )
    return config


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


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or hub id, with the special tokens that it lacks taken from its EOS."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, padding_side="right")
    except UNLOADABLE as error:
        raise not_loaded(name, error) from error
    if tokenizer.eos_token is None:
        raise UserMistake(f"model.name={name!r} has a tokenizer without an end-of-text token; choose another model")
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_tokens(configuration(name, revision=revision), tokenizer)
    return tokenizer


def not_loaded(name: str, error: Exception) -> UserMistake:
    """The one line for a model that cannot be had."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UserMistake(
        f"model.name={name!r} could not be loaded ({reason}); name a local folder, or choose another model"
    )
