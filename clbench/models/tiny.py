"""Tiny models that are made here from a recipe and kept."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from clbench.config.checks import writing
from clbench.data.sampling import seeded
from clbench.hashes import of_folder, of_json
from clbench.models.pretrained import Pretrained, log
from clbench.models.pretraining import pretrain
from clbench.types import UserMistake

BOS, EOS, PAD, UNKNOWN = SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<unk>")


@runtime_checkable
class Corpus(Protocol):
    """Text that a recipe's model is pretrained on."""

    def texts(self) -> Sequence[str]:
        """The texts, in the order they are read."""
        ...

    def vocabulary(self) -> Sequence[str]:
        """All words of a word-level tokenizer; empty where the corpus has no such list."""
        ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A tiny Llama that is pretrained here the first time it is asked for and read from `cache_dir` afterwards.

    `world_seed` is for the tasks that ask about the same world (0 where there is none). `tokenizer` is "words" (the corpus's
    vocabulary, split at spaces) or "bpe" (byte-level, `vocabulary_size` tokens, trained on the corpus). `architecture` holds
    fields of LlamaConfig. `length` is the pretraining window in tokens. `note` is said whenever the model is used.
    """

    label: str
    corpus: Corpus
    tokenizer: Literal["words", "bpe"]
    architecture: dict[str, bool | PositiveInt | PositiveFloat]
    steps: NonNegativeInt
    batch_size: PositiveInt
    length: PositiveInt
    lr: PositiveFloat
    seed: int
    world_seed: int = 0
    vocabulary_size: NonNegativeInt = 0
    note: str = ""

    def __post_init__(self) -> None:
        known = {one.name for one in fields(LlamaConfig)}
        for name in self.architecture.keys() - known:
            raise UserMistake(f"model.architecture.{name} is no field of transformers' LlamaConfig (conf/model)")
        try:
            LlamaConfig(**cast(Mapping[str, Any], self.architecture))
        except StrictDataclassError as error:
            raise UserMistake(f"model.architecture is not that of a Llama: {' '.join(str(error).split())}") from error

    def settings(self) -> dict[str, Any]:
        """Everything that determines the weights, as JSON values; the corpus by the SHA-256 of its text and vocabulary."""
        corpus = of_json([*self.corpus.vocabulary(), "", *self.corpus.texts()])
        return {key: value for key, value in asdict(self).items() if key not in ("label", "note")} | {"corpus": corpus}

    @cached_property
    def settings_hash(self) -> str:
        """The hash of everything that determines the weights. It takes a second, as the corpus is made for it."""
        return of_json([self.settings()])

    def record(self, cache_dir: Path) -> dict[str, str]:
        """The hash of the weights, configuration and tokenizer, for the manifest."""
        return self.made(cache_dir).record(cache_dir)

    def made(self, cache_dir: Path) -> Pretrained:
        """The model as it is kept in `cache_dir`; it is pretrained where that lacks it."""
        folder = cache_dir / "models" / f"{self.label}-{self.settings_hash[:12]}"
        # Of several processes that need the same model one makes it, the others wait for it.
        with writing(folder), locked(folder.with_suffix(".lock")):
            for left_by_a_kill in folder.parent.glob(f".{folder.name}-*"):
                remove(left_by_a_kill)
            if folder.exists() and not is_whole(folder):
                log.warning("%s is not what was made: it is made again", folder)
                remove(folder)
            if not folder.exists():
                log.info("pretraining %s, once; it will be kept in %s", self.label, folder)
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
                    model = Path(unfinished) / "model"
                    self.make(model)
                    os.rename(model, folder)
        return Pretrained(label=self.label, name=str(folder))

    def load(
        self, cache_dir: Path, *, dtype: torch.dtype = torch.float32
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """The model in `dtype` on the CPU, in eval mode, and its tokenizer."""
        if self.note:
            log.warning("%s: %s", self.label, self.note)
        return self.made(cache_dir).load(cache_dir, dtype=dtype)

    def configuration(self, cache_dir: Path) -> PretrainedConfig:
        """That of the model that is, or will be, in `cache_dir`: it is not made for it."""
        return llama_config(self.fresh_tokenizer(), self.architecture)

    def sizes(self, cache_dir: Path) -> PretrainedConfig:
        return self.configuration(cache_dir)

    def load_tokenizer(self, cache_dir: Path) -> PreTrainedTokenizerFast:
        return self.made(cache_dir).load_tokenizer(cache_dir)

    def fresh_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer as it is made."""
        if self.tokenizer == "words":
            return word_tokenizer(self.corpus.vocabulary())
        return bpe_tokenizer(self.corpus.texts(), self.vocabulary_size)

    def make(self, folder: Path) -> None:
        """Pretrains the model and writes it, its tokenizer and recipe.json to `folder`."""
        texts, tokenizer = self.corpus.texts(), self.fresh_tokenizer()
        marked = [f"{BOS}{text}{EOS}" for text in texts]
        model = fresh_llama(tokenizer, architecture=self.architecture, seed=self.seed)
        loss = pretrain(
            model,
            tokenizer(marked, add_special_tokens=False, return_attention_mask=False)["input_ids"],
            label=self.label,
            pad=tokenizer.get_vocab()[PAD],
            steps=self.steps,
            batch_size=self.batch_size,
            length=self.length,
            lr=self.lr,
            seed=self.seed,
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        record = {**self.settings(), "last_loss": loss, "sha256": of_folder(folder)}
        (folder / "recipe.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time is inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_whole(folder: Path) -> bool:
    """Whether a model's folder is as it was made."""
    try:
        return json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["sha256"] == of_folder(folder)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False


def remove(path: Path) -> None:
    """Removes a folder, or what lies in its place."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def word_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word of `vocabulary`, split at spaces."""
    words = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *vocabulary))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast_tokenizer(tokenizer)


def bpe_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `size` tokens trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [BOS, EOS, PAD]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return fast_tokenizer(tokenizer)


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """`tokenizer` as transformers keeps it."""
    unknown = UNKNOWN if tokenizer.token_to_id(UNKNOWN) is not None else None
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=unknown, padding_side="right"
    )
    fast.add_bos_token = True  # as every text is pretrained on with one
    return fast


def llama_config(tokenizer: PreTrainedTokenizerBase, architecture: Mapping[str, Any]) -> LlamaConfig:
    """A Llama of that architecture for a tokenizer's ids."""
    ids: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaConfig(**ids, **architecture)


def fresh_llama(tokenizer: PreTrainedTokenizerBase, *, architecture: Mapping[str, Any], seed: int) -> LlamaForCausalLM:
    """An untrained Llama whose weights depend on `seed` alone."""
    with seeded(seed, "initial weights"):
        return LlamaForCausalLM(llama_config(tokenizer, architecture))
