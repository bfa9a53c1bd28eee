"""Examples to token ids, and token ids to the batches of one optimizer step."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from clbench.data import chat as chats
from clbench.types import IGNORED, Batch, Example, Ids, UserMistake

SIGN = "?"
"""What prompts often end in, and is a token by itself."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example: `ids[:answer_start]` is the prompt, the rest the answer and EOS."""

    ids: Ids
    answer_start: int


Drawn = tuple[Encoded, int, float]
"""A row of a step: its ids, the index of its source, a weight."""


class Encoder:
    """Turns examples into token ids, each once, and ids into batches.

    The prompt and the answer are tokenised apart, so a prompt has the same ids in training and in examination. The answer is set off by
    one space. A prompt begins with BOS where the tokenizer puts one before a text by itself (Llama's does, Qwen's and GPT-2's do not): `begin`.
    When the whole is longer than `max_length`, the prompt loses tokens where `cut` says, but never that BOS; the answer never does
    (UserMistake where it alone is too long). Without `together` a batch has one row (`examine.together`).

    With `chat` a prompt is a message in the tokenizer's own template (`data.chat`), which says where BOS stands; `begin` and `end` are what the
    template puts around a message. The answer follows as the template sets it off, and ends with EOS. An empty prompt asks nothing and stays empty.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        cut: str = "left",
        device: torch.device | str = "cpu",
        together: bool = True,
        chat: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        special: Any = tokenizer  # transformers declares what it gives of special tokens as anything
        self.bos: int = special.bos_token_id
        self.eos: int = special.eos_token_id
        self.pad: int = special.pad_token_id
        self.max_length = max_length
        self.cut = cut
        self.device = torch.device(device)
        self.together = together
        self.chat = chat
        self._encoded: dict[tuple[str, str], Encoded] = {}
        self._ids: dict[tuple[object, ...], Ids] = {}
        first, *_ = tokenizer(SIGN, add_special_tokens=True, split_special_tokens=True)["input_ids"]
        self._first = (first,) if first == self.bos else ()
        self.begin: Ids = self._first
        self.end: Ids = ()
        self._before, self._spacing = SIGN, " "
        if chat:
            chats.check_template(tokenizer)
            self._before, self._spacing = chats.after_special(tokenizer, self.spelled(SIGN)), chats.spacing(tokenizer)
            # What differs is the message, and what a tokenizer makes one token of with its edge.
            alike = [self.own(chats.asked(tokenizer, text), special=False) for text in ("", SIGN, "A")]
            self.begin = tuple(commonprefix(alike))
            self.end = tuple(commonprefix([ids[len(self.begin) :][::-1] for ids in alike])[::-1])

    @property
    def frame(self) -> int:
        """The tokens of a prompt that are never cut; of one without any, one."""
        return len(self.begin) + len(self.end) or 1

    def spelled(self, prompt: str, answer: str | None = None) -> str:
        """The text that the model reads for a prompt, and where one is given its answer."""
        text = chats.asked(self.tokenizer, prompt) if self.chat and prompt else prompt
        return text if answer is None else f"{text}{self._spacing}{answer}"

    def text(self, text: str) -> Ids:
        """Token ids of bare text, without special tokens; one that is spelled out in the text (`<s>` in a program) is plain characters."""
        return self._read(text, add_special_tokens=False, split_special_tokens=True)

    def prompt(self, prompt: str) -> Ids:
        """The prompt's token ids, after `begin`, untruncated; of an empty one BOS in any case, as something must come before an answer."""
        if self.chat and prompt:
            return self.own(self.spelled(prompt), special=False)
        return (*self._first, *self.text(prompt)) or (self.bos,)

    def answer(self, answer: str) -> Ids:
        """The answer's token ids as they follow a prompt, without EOS."""
        # Behind a sign: at a text's beginning some tokenizers put a space of their own, which behind a prompt would be a second one.
        sign, follows = self.text(self._before), f"{self._spacing}{answer}"
        whole = self.text(f"{self._before}{follows}")
        return whole[len(sign) :] if whole[: len(sign)] == sign else self.text(follows)

    def fits(self, answer: str) -> bool:
        """Whether the answer has at most `max_length` tokens together with the frame before it and EOS."""
        # A token stands for a byte at least; the margin is for EOS and what marks the beginning. So a short text need not be read.
        most = self.max_length - self.frame
        return len(answer.encode()) + 7 <= most or len(self.answer(answer)) + 1 <= most

    def own(self, text: str, *, special: bool) -> Ids:
        """The text's ids as the tokenizer itself gives them, special tokens that the text spells as such; with `special` those that it adds, too."""
        return self._read(text, add_special_tokens=special)

    def _read(self, text: str, **settings: Any) -> Ids:
        """The text's ids by the tokenizer with these settings, which is asked once."""
        key = (text, *settings.items())
        if key not in self._ids:
            self._ids[key] = tuple(self.tokenizer(text, **settings)["input_ids"])
        return self._ids[key]

    def example(self, example: Example) -> Encoded:
        """The example's ids with EOS at the end, the prompt cut so that they are at most `max_length`."""
        if example.ids:
            return Encoded(ids=example.ids, answer_start=1)
        key = (example.prompt, example.answer)
        if key not in self._encoded:
            answer = (*self.answer(example.answer), self.eos)
            if len(answer) + self.frame > self.max_length:
                raise UserMistake(
                    f"the answer of {example.id} has {len(answer)} tokens; train.max_length={self.max_length} must hold it and a prompt"
                )
            prompt = self.clipped(self.prompt(example.prompt), self.max_length - len(answer))
            self._encoded[key] = Encoded(ids=(*prompt, *answer), answer_start=len(prompt))
        return self._encoded[key]

    def clipped(self, prompt: Ids, length: int) -> Ids:
        """A prompt's ids cut to `length`, as in training, so in examination; what a template puts around a message stays.

        On the left what follows BOS goes; in the middle what is between the two halves (as in LongBench, arXiv 2308.14508).
        """
        begin, end = len(self.begin), len(self.end)
        halves = max(min(max(length - length // 2, begin), length - end), 1)
        return clip_left(prompt, length, kept=halves if self.cut == "middle" else begin)

    def lost(self, example: Example) -> int:
        """How many tokens of the example's prompt are cut in training."""
        return len(self.prompt(example.prompt)) - self.example(example).answer_start

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One batch of `examples` in which every answer token weighs the same."""
        (batch,) = self.micro_batches([(example, 0, 1.0) for example in examples], rows=len(examples))
        return batch

    def micro_batches(
        self,
        global_batch: Iterable[tuple[Example, int, float]],
        *,
        rows: int,
        tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> list[Batch]:
        """Splits this rank's part of one step's (example, source, weight of its source) into batches of at most `rows` rows and `tokens` tokens.

        An answer token's weight is its source's normalised weight over the answer tokens of that source in the whole step, over all
        ranks, so the split changes no gradient. Every rank gets as many batches, as sharded weights need equal numbers of forwards:
        where rows run out, one row of weight 0 stands in.
        """
        drawn = [(self.example(example), source, weight) for example, source, weight in global_batch]
        weights = {source: weight for _, source, weight in drawn}
        answers, attended = Counter[int](), Counter[int]()
        for encoded, source, _ in drawn:
            answers[source] += len(encoded.ids) - encoded.answer_start
            attended[source] += len(encoded.ids)
        shares = {source: weight / sum(weights.values()) / answers[source] for source, weight in weights.items()}
        source_tokens = tuple(attended[source] for source in range(max(attended) + 1))
        weighted = [(encoded, source, shares[source]) for encoded, source, _ in drawn]
        rows = rows if self.together else 1
        parts = [split_rows(weighted[first::world_size], rows=rows, tokens=tokens) for first in range(world_size)]
        encoded, source, _ = drawn[0]
        parts[rank] += [[(encoded, source, 0.0)]] * (max(map(len, parts)) - len(parts[rank]))
        return [self._collated(part, source_tokens=source_tokens) for part in parts[rank]]

    def _collated(self, rows: Sequence[Drawn], *, source_tokens: tuple[int, ...]) -> Batch:
        ids = [torch.tensor(encoded.ids) for encoded, _, _ in rows]
        labels = [row.clone() for row in ids]
        for label, (encoded, _, _) in zip(labels, rows, strict=True):
            label[: encoded.answer_start] = IGNORED
        mask = [torch.ones_like(row) for row in ids]
        return Batch(
            input_ids=pad_sequence(ids, True, self.pad).to(self.device),
            attention_mask=pad_sequence(mask, True).to(self.device),
            labels=pad_sequence(labels, True, IGNORED).to(self.device),
            weights=torch.tensor([weight for _, _, weight in rows]).to(self.device),
            sources=torch.tensor([source for _, source, _ in rows]).to(self.device),
            source_tokens=source_tokens,
        )


def split_rows(drawn: Sequence[Drawn], *, rows: int, tokens: int | None) -> list[list[Drawn]]:
    """`drawn` in parts of at most `rows` rows and `tokens` tokens, a longer row being a part of its own; by length if there are several parts."""
    parts: list[list[Drawn]] = []
    held = 0
    for row in sorted(drawn, key=lambda row: len(row[0].ids)):
        length = len(row[0].ids)
        if not parts or len(parts[-1]) == rows or (tokens is not None and held + length > tokens):
            parts.append([])
            held = 0
        parts[-1].append(row)
        held += length
    return [list(drawn)] if len(parts) == 1 else parts


def clip_left(ids: Ids, length: int, *, kept: int = 1) -> Ids:
    """`ids` cut to `length` by dropping what follows the first `kept` (BOS)."""
    assert length >= 1, length
    kept = min(kept, length)
    return ids if len(ids) <= length else (*ids[:kept], *ids[len(ids) - length + kept :])
