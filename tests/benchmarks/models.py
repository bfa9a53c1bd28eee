"""Random Llamas, a real model or its shape, and a tokenizer with one token per word, the same for every benchmark."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

REAL = Path(__file__).resolve().parents[2] / "conf" / "model" / "gemma3_270m.yaml"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to race with: what it is called, how it is made, the same each time, and how many token ids it embeds."""

    name: str
    make: Callable[[], PreTrainedModel]
    vocabulary: int


def llama(vocabulary: int) -> Subject:
    """A random Llama of four layers."""
    return Subject(name=f"vocabulary {vocabulary}", make=partial(random_llama, vocabulary), vocabulary=vocabulary)


def gemma() -> Subject:
    """Gemma-3-270M in float32 from the folder in CLBENCH_MODEL, or without that its shape with random weights."""
    folder = os.environ.get("CLBENCH_MODEL")
    config = AutoConfig.for_model(**OmegaConf.to_container(OmegaConf.load(REAL).architecture))

    def random() -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()

    if not folder:
        return Subject(name="shape of Gemma-3-270M", make=random, vocabulary=config.vocab_size)
    read = partial(AutoModelForCausalLM.from_pretrained, folder, dtype=torch.float32)
    return Subject(name="Gemma-3-270M", make=read, vocabulary=config.vocab_size)


def random_llama(
    vocabulary: int, *, hidden: int = 256, layers: int = 4, positions: int = 2048, spread: float = 0.02
) -> LlamaForCausalLM:
    """A Llama with random weights of that standard deviation, the same for the same numbers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=positions,
        initializer_range=spread,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def words(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word: w3, w4, ..."""
    ids = {"<s>": 0, "</s>": 1, "<pad>": 2} | {f"w{index}": index for index in range(3, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
