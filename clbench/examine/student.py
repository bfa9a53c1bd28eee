"""A model under examination: log-likelihoods of continuations, greedy answers, distributions of the next token.

A context is read once, with its continuations behind it and blind to each other, and many contexts share a forward (`packing`); what many of
them begin with is read once and kept as keys and values. Logits come from the model's own head and only where something is scored. A model
for which this is not exact (`together`) reads one sequence at a time. All scores are in nats, in float32.

Shape suffixes: T tokens of a row, S tokens it sees, N scored positions, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from clbench.data.encoder import Encoder, clip_left
from clbench.examine.packing import Read, Row, groups, row_of
from clbench.models.limits import check_read, is_stretched, positions, settings
from clbench.models.loss import causal_lm
from clbench.train.ranks import Ranks
from clbench.types import Ids

TOKENS = {"cpu": 384, "cuda": 4096}
"""Tokens of a forward that keep a device busy and, on the CPU, in its caches (measured)."""
LOGITS = {"cpu": 2**22, "cuda": 2**29}
"""Most logits of a forward: 16 MiB and 2 GiB in float32. One context, or ROWS, may be more."""
ROWS = 128
"""Places at which any forward may be scored: fewer are no work beside fetching the output embedding of a large vocabulary (measured)."""
WRITTEN = 32
"""How many times more tokens a batch holds when answers are written, as a step writes one token a row."""
HasEnded = Callable[[list[list[int]]], list[bool]]
"""Of the tokens that each row has written so far: whether the row is done."""
Request = tuple[Ids, Ids, Sequence[int]]
"""A context, its continuation, and the places of that at which whole distributions are wanted."""
Report = Callable[[str, str, int, int], None]
"""Hears of a probe and a task how many requests are answered, and of how many."""


class Student:
    """`model` with its tokenizer; `tokens` bounds the tokens of a forward (None: what suits the device).

    `tokens_scored` counts the tokens that were read and written. `report` hears of every forward; of ranks, each hears of its own part.
    """

    def __init__(
        self,
        model: Module,
        encoder: Encoder,
        *,
        tokens: int | None = None,
        ranks: Ranks | None = None,
        report: Report = lambda *_: None,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.ranks = ranks or Ranks()
        self.tokens = tokens or TOKENS[encoder.device.type]
        self.tokens_scored = 0
        self._report = report
        self._about = ("", "")

    def about(self, probe: str, task: str) -> None:
        """What is asked from here on belongs to this task of a probe."""
        self._about = (probe, task)

    @property
    def positions(self) -> int:
        """The longest input that the model can read, in tokens."""
        return positions(causal_lm(self.model).config)

    def log_likelihoods(
        self, requests: Sequence[tuple[Ids, Ids]], *, max_length: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each (context ids, continuation ids): log p(continuation | context) in nats, and whether greedy decoding gives it.

        The context is cut from its left until all but the last token fit into `max_length` tokens; None: as in training, to
        train.max_length.
        """
        read = self.read([(*request, ()) for request in requests], max_length=max_length)
        return [(value, is_greedy) for value, is_greedy, _ in read]

    @torch.inference_mode()
    def read(self, requests: Sequence[Request], *, max_length: int | None = None) -> list[tuple[float, bool, Tensor]]:
        """As `log_likelihoods`, and log-probabilities in nats of all tokens that could stand at places of a continuation, [places, V] on the CPU.

        Raises FloatingPointError where the model's numbers are not finite: a greedy answer would still be some answer.
        """
        longest, clip = (max_length, clip_left) if max_length else (self.encoder.max_length, self.encoder.clipped)
        score = partial(self._read, longest=longest, clip=clip)
        found = self.ranks.shared(score, requests, by=[context for context, *_ in requests])
        # On every rank alike, after all have what any has read.
        if not all(math.isfinite(value) for value, *_ in found):
            raise FloatingPointError("a log-likelihood of the examination is not finite")
        return found

    def _read(
        self, requests: Sequence[Request], *, longest: int, clip: Callable[[Ids, int], Ids]
    ) -> list[tuple[float, bool, Tensor]]:
        asked: dict[tuple[Ids, int, int], list[int]] = {}
        tokens: Counter[Ids] = Counter()
        apart = is_stretched(self.model)  # there a context's own logits depend on how long the whole is
        for index, (context, continuation, _) in enumerate(requests):
            assert context and continuation, (context, continuation)
            context = clip(context, longest + 1 - len(continuation))
            # The first windows of all texts follow the same context, BOS: a forward holds some of them.
            key = (context, tokens[context] // self.tokens, len(continuation) if apart else 0)
            asked.setdefault(key, []).append(index)
            tokens[context] += len(continuation)
        owners = list(asked.values())
        reads = [
            Read(context, tuple(requests[index][1][:-1] for index in members))
            for (context, *_), members in asked.items()
        ]
        found: dict[int, tuple[float, bool, Tensor]] = {}
        done = 0
        for numbers, logits_NV in self._forwards(reads):
            places, targets, members, whole, start = [], [], [], [], 0
            for number in numbers:
                first, start = start, start + 1
                for index in owners[number]:
                    _, continuation, wanted = requests[index]
                    at = [first, *range(start, start + len(continuation) - 1)]
                    places += at
                    whole.append(logits_NV[[at[place] for place in wanted]].log_softmax(-1).cpu())
                    targets += continuation
                    members.append(index)
                    start += len(continuation) - 1
            picked, greedy = scored(logits_NV, places, targets)
            lengths = [len(requests[index][1]) for index in members]
            parts = zip(members, picked.split(lengths), greedy.split(lengths), whole, strict=True)
            for index, values, flags, rows_NV in parts:
                found[index] = float(values.sum()), bool(flags.all()), rows_NV
            done += len(numbers)
            self._report(*self._about, done, len(reads))
        return [found[index] for index in range(len(requests))]

    def generate(self, prompts: Sequence[Ids], *, max_new_tokens: int) -> list[str]:
        """Greedy continuation of each prompt until EOS or `max_new_tokens`, as text without special tokens."""
        # Training answers fit train.max_length, which fits the positions, and what is written is no longer than they.
        room = min(self.encoder.max_length, self.positions - max_new_tokens)
        assert room >= 1, (max_new_tokens, self.positions)
        written = self.write([self.encoder.clipped(prompt, room) for prompt in prompts], max_new_tokens=max_new_tokens)
        return [str(self.encoder.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in written]

    def write(
        self, prompts: Sequence[Ids], *, max_new_tokens: int, has_ended: HasEnded | None = None
    ) -> list[list[int]]:
        """Greedy continuations in token ids, each until EOS (left out), until `has_ended` says so of what it wrote, or to `max_new_tokens`."""
        write = partial(self._write, max_new_tokens=max_new_tokens, has_ended=has_ended)
        return self.ranks.shared(write, prompts, by=prompts)

    def _write(self, prompts: Sequence[Ids], *, max_new_tokens: int, has_ended: HasEnded | None) -> list[list[int]]:
        """By the model's own `generate`, in batches of like lengths, padded on the left."""
        model, pad = causal_lm(self.model), self.encoder.pad
        ends = {self.encoder.eos, *eos_ids(model)}
        generation = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(ends),
            pad_token_id=pad,
            use_cache=not is_stretched(model),
        )
        written: dict[int, list[int]] = {}
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        while order:
            self._report(*self._about, len(written), len(prompts))  # a batch may take longer than a reader waits
            width = len(prompts[order[0]])
            count = max(1, WRITTEN * self.tokens // (width + max_new_tokens)) if self.encoder.together else 1
            batch, order = order[:count], order[count:]
            rows = [torch.tensor(prompts[number], device=model.device) for number in batch]
            output_BT = cast(Any, model).generate(  # which transformers declares beside its models
                pad_sequence(rows, True, pad, "left"),
                attention_mask=pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left"),
                generation_config=generation,
                stopping_criteria=[stopping(has_ended, width)] if has_ended else [],
            )
            for number, ids in zip(batch, output_BT[:, width:].tolist(), strict=True):
                length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
                written[number] = ids[:length]
                self.tokens_scored += len(prompts[number]) + length
            self._report(*self._about, len(written), len(prompts))
        return [written[number] for number in range(len(prompts))]

    def _forwards(self, reads: Sequence[Read]) -> Iterator[tuple[list[int], Tensor]]:
        """Per forward the reads in it and logits [N, V] in float32: of each read those after its context, then those of its branches."""
        longest = max((read.longest for read in reads), default=0)
        check_read(longest, positions=self.positions)
        if not self.encoder.together:
            for number, read in enumerate(reads):
                yield [number], self._alone(read)
            return
        for shared, members in groups([read.context for read in reads]):
            cache = DynamicCache() if shared else None
            if shared:
                self._logits(row_of([Read(reads[members[0]].context[:shared])]), cache)
            for row in self._rows(reads, members, shared=shared):
                yield row, self._logits(row_of([reads[number] for number in row], shared=shared), cache)
                if cache is not None:
                    cache.crop(shared - cache.get_seq_length())

    def _rows(self, reads: Sequence[Read], members: Sequence[int], *, shared: int) -> Iterator[list[int]]:
        """The members of a group, in parts that one forward holds."""
        most = max(ROWS, LOGITS[self.encoder.device.type] // settings(self.model)["vocab_size"])
        row: list[int] = []
        tokens = wanted = 0
        for number in members:
            own = reads[number].tokens - shared
            if row and (tokens + own > self.tokens or wanted + reads[number].scored > most):
                yield row
                row, tokens, wanted = [], 0, 0
            row.append(number)
            tokens += own
            wanted += reads[number].scored
        yield row

    def _alone(self, read: Read) -> Tensor:
        """As of one row, each of the read's sequences by itself."""
        parts: list[Tensor] = []
        for branch in read.branches:
            logits_NV = self._logits(row_of([Read(read.context, (branch,))]))
            parts.append(logits_NV[1:] if parts else logits_NV)
        return torch.cat(parts)

    def _logits(self, row: Row, cache: DynamicCache | None = None) -> Tensor:
        """Logits [N, V] in float32 at the row's places, after what `cache` holds; the row's keys and values are added to it."""
        model, device = causal_lm(self.model), self.encoder.device
        self.tokens_scored += len(row.ids)
        apart = {}
        if row.sees_TS is not None:
            positions_T = row.positions.to(device)
            mask = mask_of(model, row.sees_TS.to(device), positions_T)
            apart = {"attention_mask": mask, "position_ids": positions_T[None]}
        output = model(
            input_ids=row.ids[None].to(device),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=row.places.to(device),
            **apart,
        )
        return output.logits[0].float()


def eos_ids(model: PreTrainedModel) -> list[int]:
    """The tokens that end what the model writes, by its own settings."""
    stated = model.generation_config.eos_token_id
    return stated if isinstance(stated, list) else [] if stated is None else [stated]


def stopping(has_ended: HasEnded, width: int) -> Callable[..., Tensor]:
    """A stopping criterion of `generate`: which rows are done, by what they wrote after `width` tokens."""
    return lambda ids_BT, _, **__: torch.tensor(has_ended(ids_BT[:, width:].tolist()), device=ids_BT.device)


def mask_of(model: PreTrainedModel, sees_TS: Tensor, positions_T: Tensor) -> Tensor | dict[str, Tensor]:
    """The mask of attention, [1, 1, T, S], in the form that transformers gives it: one for all layers, or one for each kind of layer.

    A sliding window counts positions in the sequence; what precedes the row's own tokens is the common beginning.
    """
    config = settings(model)
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    near_TS = sees_TS
    if window:
        beginning = torch.arange(sees_TS.shape[1] - len(positions_T), device=positions_T.device)
        near_TS = sees_TS & (positions_T[:, None] - torch.cat([beginning, positions_T]) < window)
    masks = {"full_attention": sees_TS, "sliding_attention": near_TS}
    if kinds:
        return {kind: masking(model, masks[kind]) for kind in set(kinds)}
    return masking(model, near_TS)


def masking(model: PreTrainedModel, sees_TS: Tensor) -> Tensor:
    """[1, 1, T, S]: bool for torch's attention, as transformers has it; else what is added to logits, the least number for what is not seen."""
    if model.config._attn_implementation == "sdpa":
        return sees_TS[None, None]
    dtype = model.dtype
    mask_TS = torch.zeros(sees_TS.shape, dtype=dtype, device=sees_TS.device)
    return mask_TS.masked_fill_(~sees_TS, torch.finfo(dtype).min)[None, None]


def scored(logits_NV: Tensor, places: Sequence[int], targets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Per target its log-probability at its place in nats, and whether it is the likeliest token there; on the CPU."""
    best_N = logits_NV.argmax(-1)
    highest_N1 = logits_NV.gather(1, best_N[:, None])
    at, target = (torch.tensor(numbers, device=logits_NV.device) for numbers in (places, targets))
    picked = logits_NV[at, target] - highest_N1[at, 0]
    # In place: fresh memory for each temporary of a large vocabulary takes as long as the sum.
    total_N = logits_NV.sub_(highest_N1).exp_().sum(-1).log()
    return (picked - total_N[at]).double().cpu(), (best_N[at] == target).cpu()
