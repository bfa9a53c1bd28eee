"""Examples to token ids, and token ids to batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from clbench.data.batches import Encoded, collated, cut_rows
from clbench.types import Batch, Example, UserMistake


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, in hexadecimal, of everything that decides a text's ids."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(f"{tokenizer.backend_tokenizer.to_str()}{special}".encode()).hexdigest()


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
    ) -> None:
        self.tokenizer = tokenizer
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
