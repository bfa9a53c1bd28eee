"""A model under examination: log-likelihoods of continuations, greedy answers, distributions of the next token.

Equal work is done once: what requests have in common is read once (`packing`), the vocabulary is projected at scored positions only and a
slice of them at a time, so that no [batch, length, vocabulary] tensor ever exists. All scores are in nats, in float32.

Shape suffixes: B rows, T tokens of a row, S tokens it sees, H hidden, N scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from clbench.data.encoder import Encoder, clip_left
from clbench.examine.generation import decode
from clbench.examine.packing import Ids, Packed, Read, beginnings
from clbench.examine.reading import Reader, branches
from clbench.models.architecture import causal_lm, sliding_window
from clbench.models.loss import project, rows_at_once

T, R = TypeVar("T"), TypeVar("R")
WRITTEN = 16
"""How many times more tokens a batch holds when answers are written."""
TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 16384}
"""What keeps a device busy and, on the CPU, in its caches (measured)."""


class Student:
    """`model` with its tokenizer; `tokens_per_batch` bounds rows times padded length of one forward (None: what suits the device).

    Without `branching` every request is read by itself, for models that read no trees of tokens and for checks.
    """

    def __init__(
        self,
        model: Module,
        encoder: Encoder,
        *,
        tokens_per_batch: int | None = None,
        branching: bool = True,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.tokens_per_batch = tokens_per_batch or TOKENS_PER_BATCH[encoder.device.type]
        self.branching = branching
        self.tokens_scored = 0

    @torch.inference_mode()
    def log_likelihoods(
        self, requests: Sequence[tuple[Ids, Ids]], *, max_length: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each (context ids, continuation ids): log p(continuation | context) in nats, and whether greedy decoding gives it.

        `max_length` bounds what is read of a request, in tokens (None: the encoder's bound).
        """
        sums = np.zeros(len(requests))
        greedy = np.ones(len(requests), dtype=bool)
        for packed, states_NH in self._states(self.reads(requests, max_length or self.encoder.max_length)):
            spans = [len(requests[index][1]) for index in packed.members]
            owners = np.repeat(packed.members, spans)
            targets = np.array([token for index in packed.members for token in requests[index][1]])
            picked, best = self._scores(states_NH, packed.places, targets)
            np.add.at(sums, owners, picked)
            np.logical_and.at(greedy, owners, best == targets)
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    def reads(self, requests: Sequence[tuple[Ids, Ids]], max_length: int) -> list[Read]:
        """What the model reads for each request: all but the last token, cut from the context's left to `max_length`."""
        reads = []
        for context, continuation in requests:
            assert context and continuation, (context, continuation)
            clipped = clip_left(context, max_length + 1 - len(continuation))
            reads.append(Read((*clipped, *continuation[:-1]), len(clipped) - 1))
        return reads

    def share(self, work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T], *, by: Sequence[Ids]) -> list[R]:
        """The results of `work` for all items, in their order. One process does it all; where there are more, equal keys of `by` stay together."""
        return list(work(items))

    @property
    def positions(self) -> int:
        """The longest input that the model can read, in tokens."""
        return causal_lm(self.model).config.max_position_embeddings

    def generate(self, prompts: Sequence[Ids], *, max_new_tokens: int) -> list[str]:
        """Greedy continuation of each prompt until EOS or `max_new_tokens`, as text without special tokens."""
        room = min(self.encoder.max_length, self.positions - max_new_tokens)
        rows = [clip_left(prompt, room) for prompt in prompts]
        written = self.write(rows, max_new_tokens=max_new_tokens)
        return [self.encoder.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]

    @torch.inference_mode()
    def write(
        self,
        prompts: Sequence[Ids],
        *,
        max_new_tokens: int,
        has_ended: Callable[[list[list[int]]], list[bool]] | None = None,
    ) -> list[list[int]]:
        """Greedy continuations in token ids, each until EOS (left out), until `has_ended` says so of what it wrote, or to `max_new_tokens`."""
        written: list[list[int]] = [[]] * len(prompts)
        for shared, batch in self._written_together(prompts, max_new_tokens):
            answers = decode(
                self.model,
                [prompts[index] for index in batch],
                shared=shared,
                max_new_tokens=max_new_tokens,
                end=self.encoder.tokenizer.eos_token_id,
                pad=self.encoder.tokenizer.pad_token_id,
                device=self.encoder.device,
                tokens_per_batch=self.tokens_per_batch,
                has_ended=has_ended,
            )
            self.tokens_scored += shared
            for index, answer in zip(batch, answers, strict=True):
                written[index] = answer
                self.tokens_scored += len(prompts[index]) - shared + len(answer)
        return written

    def _written_together(self, prompts: Sequence[Ids], max_new_tokens: int) -> Iterator[tuple[int, list[int]]]:
        """Batches of like length, the longest first, each with the length of the beginning that its prompts share."""
        window = sliding_window(self.model)
        longest = max(map(len, prompts), default=0) + max_new_tokens
        # Transformers counts a sliding window in places, and what fills rows up after a shared beginning takes places.
        whole = window is not None and longest > window
        for shared, indices in [(0, list(range(len(prompts))))] if whole else beginnings(prompts):
            order = sorted(indices, key=lambda index: -len(prompts[index]))
            while order:
                # A step writes one token a row, so it takes many rows to fill it.
                count = max(1, WRITTEN * self.tokens_per_batch // (len(prompts[order[0]]) + max_new_tokens))
                yield shared, order[:count]
                order = order[count:]

    @torch.inference_mode()
    def next_log_probs(self, contexts: Sequence[Ids]) -> Tensor:
        """Log-probabilities in nats of every token of the vocabulary after each context, [contexts, vocabulary], in their order."""
        found: list[Tensor | None] = [None] * len(contexts)
        for packed, states_NH in self._states([Read(ids, len(ids) - 1) for ids in contexts]):
            log_probs_NV = torch.log_softmax(project(self.model, states_NH[torch.from_numpy(packed.places)]), dim=-1)
            for index, row in zip(packed.members, log_probs_NV, strict=True):
                found[index] = row
        return torch.stack([row for row in found if row is not None])

    def _scores(self, states_NH: Tensor, places: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per target its log-probability at its place in nats, and the likeliest token there."""
        chunk = rows_at_once(self.model, states_NH)
        order = np.argsort(places, kind="stable")
        bounds = np.searchsorted(places[order], np.arange(0, len(states_NH) + chunk, chunk))
        picked, best = np.empty(len(targets)), np.empty(len(targets), dtype=np.int64)
        for number, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            start, asked = number * chunk, order[first:last]
            logits_NV = project(self.model, states_NH[start : start + chunk])
            at = torch.from_numpy(places[asked] - start).to(logits_NV.device)
            target = torch.from_numpy(targets[asked]).to(logits_NV.device)
            best_N = logits_NV.argmax(-1)
            highest_N1 = logits_NV.gather(1, best_N[:, None])
            # In place: fresh memory for each temporary of a slice takes as long as the sum.
            logits_NV.sub_(highest_N1)
            relative = logits_NV[at, target]
            picked[asked] = (relative - logits_NV.exp_().sum(-1).log()[at]).cpu().numpy()
            best[asked] = best_N[at].cpu().numpy()
        return picked, best

    def _states(self, reads: Sequence[Read]) -> Iterator[tuple[Packed, Tensor]]:
        """Per forward the last hidden states [N, H] at its wanted places."""
        for packed, states_NH in self._reader().states(reads):
            self.tokens_scored += packed.tokens
            yield packed, states_NH

    def _reader(self) -> Reader:
        device = self.encoder.device
        return Reader(
            model=self.model,
            device=device,
            tokens_per_batch=self.tokens_per_batch,
            branching=self.branching and branches(self.model, device),
        )
