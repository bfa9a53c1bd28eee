"""Rows, token ids and batches: from a dataset's name to the tensors of one optimizer step.

Rows come from `data_dir/<name>/<split>.jsonl` when `data_dir` is set, else from the hub at a stated revision: the same columns either
way. Every random draw of the project takes its generator from here, named by (seed, purpose, stage), so that it depends neither
on what was drawn before nor on how many processes run.

>>> import torch
>>> draws = [torch.rand((), generator=generator(0, "order", stage)) for stage in (1, 1, 2)]
>>> bool(draws[0] == draws[1]), bool(draws[0] == draws[2])
(True, False)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from clbench.batches import Encoded, collated, cut_rows
from clbench.tokens import read_tokens, write_tokens
from clbench.types import Batch, Example, Source, UserMistake


def generator(seed: int, purpose: str, stage: int = 0) -> torch.Generator:
    """A CPU random generator that depends only on its three names."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{stage}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Where a dataset's rows are: `name` is its folder under `data_dir`, the rest its address on the hub.

    `splits` maps our split names to the hub's; a split that is not listed has the same name on both sides. `data_files` names the one file
    of each of our splits in a hub repository that holds many datasets (Super-NaturalInstructions: a file per task and split).
    """

    name: str
    hub: str
    config: str | None = None
    revision: str | None = None
    splits: dict[str, str] = field(default_factory=dict)
    data_files: dict[str, str] = field(default_factory=dict)


def load_rows(spec: DatasetSpec, *, split: str, data_dir: str | None) -> list[dict[str, Any]]:
    """The rows of one split, in file order; raises UserMistake when they cannot be had."""
    return list(indexed_rows(spec, split=split, data_dir=data_dir).values())


def indexed_rows(spec: DatasetSpec, *, split: str, data_dir: str | None) -> dict[int, dict[str, Any]]:
    """The rows of one split by their index in it; a bundle, which holds only rows that are used, remembers their index on the hub."""
    if data_dir is None:
        return dict(enumerate(_hub_rows(spec, split)))
    path = Path(data_dir) / spec.name / f"{split}.jsonl"
    if not path.is_file():
        raise UserMistake(
            f"data_dir={data_dir!r} has no {spec.name}/{split}.jsonl, which {spec.hub!r} needs; point data_dir at it"
        )
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    indices = path.with_suffix(".index.json")
    return dict(zip(json.loads(indices.read_text()) if indices.is_file() else range(len(rows)), rows, strict=True))


def _hub_rows(spec: DatasetSpec, split: str) -> list[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        if spec.data_files:
            files = {split: spec.data_files[spec.splits.get(split, split)]}
            rows = load_dataset(spec.hub, data_files=files, split=split, revision=spec.revision)
        else:
            rows = load_dataset(spec.hub, spec.config, split=spec.splits.get(split, split), revision=spec.revision)
    except (OSError, DatasetNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise UserMistake(
            f"dataset {spec.hub!r} could not be loaded from the hub ({reason}); offline, set data_dir=DIR with DIR/{spec.name}/{split}.jsonl"
        ) from error
    return [dict(row) for row in rows]


def fingerprint(rows: Sequence[Any]) -> str:
    """SHA-256, in hexadecimal, of rows that JSON can write (dataclasses by their fields)."""
    digest = hashlib.sha256()
    for row in rows:
        plain = row if isinstance(row, (dict, list, str)) else vars(row)
        digest.update(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, in hexadecimal, of everything that decides a text's ids."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(f"{tokenizer.backend_tokenizer.to_str()}{special}".encode()).hexdigest()


def token_key(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> str:
    """Names the tokenised form of `examples`: rows, template, tokenizer and longest input all change it."""
    names = (fingerprint(examples), tokenizer_fingerprint(tokenizer), max_length)
    return hashlib.sha256("/".join(map(str, names)).encode()).hexdigest()[:24]


class Encoder:
    """Turns examples into token ids, each once, and ids into batches.

    The prompt and the answer are tokenised apart, so a prompt has the same ids in training and in examination. The answer is set off by
    one space. When the whole is longer than `max_length`, the prompt loses tokens from its left, after the BOS; the answer never does
    (UserMistake where it alone is too long).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        device: torch.device | str = "cpu",
        token_dirs: Sequence[Path] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.token_dirs = tuple(token_dirs)
        self.max_length = max_length
        self.device = torch.device(device)
        self._encoded: dict[tuple[str, str], Encoded] = {}
        self._prompts: dict[str, tuple[int, ...]] = {}
        self._answers: dict[str, tuple[int, ...]] = {}

    def text(self, text: str) -> list[int]:
        """Token ids of bare text, without special tokens; one that is spelled out in the text (`<s>` in a program) is plain characters."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def prompt(self, prompt: str) -> tuple[int, ...]:
        """BOS and the prompt's token ids, untruncated."""
        if prompt not in self._prompts:
            self._prompts[prompt] = (self.tokenizer.bos_token_id, *self.text(prompt))
        return self._prompts[prompt]

    def answer(self, answer: str) -> tuple[int, ...]:
        """The answer's token ids as they follow a prompt, without EOS."""
        if answer not in self._answers:
            self._answers[answer] = tuple(self.text(" " + answer))
        return self._answers[answer]

    def example(self, example: Example) -> Encoded:
        """The example's ids with EOS at the end, cut from the prompt's left to `max_length`."""
        key = (example.prompt, example.answer)
        if key not in self._encoded:
            answer = (*self.answer(example.answer), self.tokenizer.eos_token_id)
            if len(answer) + 1 > self.max_length:
                raise UserMistake(
                    f"the answer of {example.id} has {len(answer)} tokens; train.max_length={self.max_length} must hold it and a prompt"
                )
            prompt = clip_left(self.prompt(example.prompt), self.max_length - len(answer))
            self._encoded[key] = Encoded(ids=(*prompt, *answer), answer_start=len(prompt))
        return self._encoded[key]

    def preload(self, examples: Sequence[Example]) -> None:
        """Takes the ids of `examples` from the first of `token_dirs` that has them; else tokenises, and keeps them in the last."""
        if not self.token_dirs:
            return
        name = f"{token_key(examples, self.tokenizer, max_length=self.max_length)}.safetensors"
        kept = next((folder / name for folder in self.token_dirs if (folder / name).is_file()), None)
        if kept is None:
            write_tokens(self.token_dirs[-1] / name, [self.example(example) for example in examples])
            return
        for example, encoded in zip(examples, read_tokens(kept), strict=True):
            self._encoded[example.prompt, example.answer] = encoded

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One batch of `examples` in which every answer token weighs the same."""
        return self.micro_batches(((example, 0, 1.0) for example in examples), rows=len(examples))[0]

    def micro_batches(
        self,
        global_batch: Iterable[tuple[Example, int, float]],
        *,
        rows: int,
        tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> list[Batch]:
        """Splits this rank's part of one step's (example, source, weight of its source) into batches of at most `rows` rows.

        `tokens` bounds rows times padded length of a batch of more than one row.

        An answer token's weight is its source's normalised weight over the answer tokens of that source in the whole step, over all
        ranks, so the split changes no gradient. Rows of similar length go together. Every rank gets as many batches, as sharded weights
        need equal numbers of forwards: where rows run out, one row of weight 0 stands in.
        """
        drawn = [(self.example(example), source, weight) for example, source, weight in global_batch]
        sources = max(source for _, source, _ in drawn) + 1
        answers, attended, weights = [0] * sources, [0] * sources, [0.0] * sources
        for encoded, source, weight in drawn:
            answers[source] += len(encoded.ids) - encoded.answer_start
            attended[source] += len(encoded.ids)
            weights[source] = weight
        total = sum(weights)
        parts = [cut_rows(drawn[first::world_size], rows=rows, tokens=tokens) for first in range(world_size)]
        share = [weights[source] / total / answers[source] if answers[source] else 0.0 for source in range(sources)]
        own = [[(encoded, source, share[source]) for encoded, source, _ in part] for part in parts[rank]]
        encoded, source, _ = drawn[0]
        own += [[(encoded, source, 0.0)]] * (max(map(len, parts)) - len(own))
        pad, seen = self.tokenizer.pad_token_id, tuple(attended)
        return [collated(part, pad=pad, device=self.device, source_tokens=seen) for part in own]


def clip_left(ids: tuple[int, ...], length: int) -> tuple[int, ...]:
    """`ids` cut to `length` by dropping what follows the first (BOS)."""
    assert length >= 1, length
    return ids if len(ids) <= length else (ids[0], *ids[len(ids) - length + 1 :])


def draw(
    sources: Sequence[Source], *, batch_size: int, step: int, seed: int, stage: int
) -> list[tuple[Example, int, float]]:
    """The global batch of one optimizer step: (example, index of its source, weight of its source).

    The first source is passed in a fresh order every epoch; each further one is drawn with replacement, uniformly. The draw depends on
    (seed, stage, step) alone, never on world size or on earlier calls.
    """
    rows: list[tuple[Example, int, float]] = []
    for index, source in enumerate(sources):
        count = round(source.share * batch_size)
        if not source.examples or count == 0:
            continue
        if index == 0:
            picked = epoch_indices(len(source.examples), start=step * count, count=count, seed=seed, stage=stage)
        else:
            rng = generator(seed, f"draw/{index}/{step}", stage)
            picked = torch.randint(len(source.examples), (count,), generator=rng).tolist()
        rows += [(source.examples[i], index, source.weight) for i in picked]
    return rows


def epoch_indices(size: int, *, start: int, count: int, seed: int, stage: int) -> list[int]:
    """`count` positions from `start` on in the endless concatenation of one permutation of `size` per epoch."""
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(start + len(indices), size)
        indices += epoch_order(size, epoch, seed, stage)[offset : offset + count - len(indices)]
    return indices


@lru_cache(maxsize=2)
def epoch_order(size: int, epoch: int, seed: int, stage: int) -> tuple[int, ...]:
    """The permutation of `size` in one epoch of a stage; asked for by every step of it, and by one that crosses into the next."""
    return tuple(torch.randperm(size, generator=generator(seed, f"order/{epoch}", stage)).tolist())
