"""Models of the hub, or of a local folder."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from clbench.types import UserMistake

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
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype)
    except OSError as error:
        raise not_loaded(name, error) from error
    # Answers are the likeliest tokens: penalties and samples that a model asks for are left out, its EOS ids stay.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model.eval(), tokenizer


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or hub id, with the special tokens that it lacks taken from its EOS."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, padding_side="right")
    except OSError as error:
        raise not_loaded(name, error) from error
    if tokenizer.eos_token is None:
        raise UserMistake(f"model.name={name!r} has a tokenizer without an end-of-text token; choose another model")
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def not_loaded(name: str, error: OSError) -> UserMistake:
    """The one line for a model that cannot be had."""
    reason = str(error).splitlines()[0]
    return UserMistake(
        f"model.name={name!r} could not be loaded ({reason}); name a local folder, or choose another model"
    )
