"""A model under examination: log-likelihoods of continuations, greedy answers, distributions of the next token.

Requests are grouped so that equal work is done once: a context is read once for all its one-token continuations, rows of like length share a
batch, and the vocabulary is projected at scored positions only. All scores are in nats, in float32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from transformers import StoppingCriteriaList

from clbench.data import Encoder, clip_left
from clbench.loss import causal_lm, hidden_states, project

Ids = tuple[int, ...]
T, R = TypeVar("T"), TypeVar("R")


class Student:
    """`model` with its tokenizer; `tokens_per_batch` bounds rows times padded length of one forward."""

    def __init__(self, model: Module, encoder: Encoder, *, tokens_per_batch: int = 4096) -> None:
        self.model = model
        self.encoder = encoder
        self.tokens_per_batch = tokens_per_batch
        self.tokens_scored = 0

    @torch.inference_mode()
    def log_likelihoods(self, requests: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        """For each (context ids, continuation ids): log p(continuation | context) in nats, and whether greedy decoding gives it."""
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for batch in self._batches(self._grouped(requests)):
            self._score(batch, requests, results)
        return results

    def _grouped(self, requests: Sequence[tuple[Ids, Ids]]) -> list[tuple[Ids, list[int]]]:
        """The rows to read, each with the requests that it answers."""
        grouped: dict[Ids, list[int]] = defaultdict(list)
        for index, (context, continuation) in enumerate(requests):
            assert context and continuation, (context, continuation)
            # One-token continuations of a context share its row; others get one each.
            key = context if len(continuation) == 1 else (*context, *continuation[:-1], -1 - index)
            grouped[key].append(index)
        return [(self._row(requests[members[0]]), members) for members in grouped.values()]

    def _row(self, request: tuple[Ids, Ids]) -> Ids:
        """What the model reads to score the request: all but the last token, cut from the context's left to the longest it can read."""
        context, continuation = request
        return (*clip_left(context, self.encoder.max_length + 1 - len(continuation)), *continuation[:-1])

    def _batches(self, rows: list[tuple[Ids, list[int]]]) -> Iterator[list[tuple[Ids, list[int]]]]:
        batch: list[tuple[Ids, list[int]]] = []
        for row in sorted(rows, key=lambda row: -len(row[0])):
            longest = len(batch[0][0]) if batch else len(row[0])
            if batch and longest * (len(batch) + 1) > self.tokens_per_batch:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _score(
        self, batch: list[tuple[Ids, list[int]]], requests: Sequence[tuple[Ids, Ids]], results: list[tuple[float, bool]]
    ) -> None:
        input_ids, attention_mask = self._pad([ids for ids, _ in batch])
        (hidden_BTH,) = hidden_states(self.model, input_ids=input_ids, attention_mask=attention_mask)
        spans = [len(requests[members[0]][1]) for _, members in batch]
        rows = torch.tensor([row for row, span in enumerate(spans) for _ in range(span)], device=hidden_BTH.device)
        places = torch.tensor(
            [len(ids) - span + offset for (ids, _), span in zip(batch, spans, strict=True) for offset in range(span)],
            device=hidden_BTH.device,
        )
        log_probs_NV = torch.log_softmax(project(self.model, hidden_BTH[rows, places]), dim=-1)
        greedy = log_probs_NV.argmax(-1).tolist()
        first = 0
        for (_, members), span in zip(batch, spans, strict=True):
            for index in members:
                target = requests[index][1]
                picked = log_probs_NV[first : first + span].gather(
                    1, torch.tensor(target, device=log_probs_NV.device)[:, None]
                )
                results[index] = (float(picked.sum()), greedy[first : first + span] == list(target))
            first += span

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
        rows = [(clip_left(prompt, room), [index]) for index, prompt in enumerate(prompts)]
        answers = [""] * len(prompts)
        for batch in self._batches(rows):
            written = self.write([ids for ids, _ in batch], max_new_tokens=max_new_tokens)
            for (_, (index,)), ids in zip(batch, written, strict=True):
                answers[index] = self.encoder.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return answers

    @torch.inference_mode()
    def write(
        self, rows: Sequence[Ids], *, max_new_tokens: int, stopping: StoppingCriteriaList | None = None
    ) -> list[list[int]]:
        """Greedy continuations of one batch, padded on the left; a row that has ended is filled up with PAD."""
        tokenizer = self.encoder.tokenizer
        input_ids, attention_mask = self._pad(rows, left=True)
        written = causal_lm(self.model).generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=stopping,
        )[:, input_ids.shape[1] :]
        self.tokens_scored += written.numel()
        return written.tolist()

    @torch.inference_mode()
    def next_log_probs(self, contexts: Sequence[Ids]) -> Tensor:
        """Log-probabilities in nats of every token of the vocabulary after each context, [contexts, vocabulary], in their order."""
        found: list[Tensor | None] = [None] * len(contexts)
        for batch in self._batches([(ids, [index]) for index, ids in enumerate(contexts)]):
            input_ids, attention_mask = self._pad([ids for ids, _ in batch])
            (hidden_BTH,) = hidden_states(self.model, input_ids=input_ids, attention_mask=attention_mask)
            last = attention_mask.sum(-1) - 1
            rows = torch.arange(len(batch), device=last.device)
            log_probs_NV = torch.log_softmax(project(self.model, hidden_BTH[rows, last]), dim=-1)
            for (_, (index,)), row in zip(batch, log_probs_NV, strict=True):
                found[index] = row
        return torch.stack([row for row in found if row is not None])

    def _pad(self, rows: Sequence[Ids], *, left: bool = False) -> tuple[Tensor, Tensor]:
        length = max(len(ids) for ids in rows)
        input_ids = torch.full((len(rows), length), self.encoder.tokenizer.pad_token_id)
        attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
        for row, ids in enumerate(rows):
            where = slice(length - len(ids), length) if left else slice(0, len(ids))
            input_ids[row, where] = torch.tensor(ids)
            attention_mask[row, where] = 1
        self.tokens_scored += int(attention_mask.sum())
        return input_ids.to(self.encoder.device), attention_mask.to(self.encoder.device)
