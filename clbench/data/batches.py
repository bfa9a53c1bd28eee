"""Micro-batches: which rows are read together, and the tensors of one forward.

>>> row = lambda length: (Encoded(ids=(5,) * length, answer_start=1), 0, 1.0)
>>> [len(part) for part in cut_rows([row(300), row(20), row(310), row(25)], rows=4, tokens=1024)]
[2, 2]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from clbench.models.last_layer import filled
from clbench.types import IGNORED, Batch

FORWARD = 512
"""What one more forward costs, in tokens of padding (measured)."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example: `ids[:answer_start]` is the prompt (one BOS first), the rest the answer and EOS."""

    ids: tuple[int, ...]
    answer_start: int


Drawn = tuple[Encoded, int, float]
"""A row of a step: its ids, the index of its source, a weight."""


def cut_rows(drawn: Sequence[Drawn], *, rows: int, tokens: int | None) -> list[list[Drawn]]:
    """`drawn` in parts of at most `rows` rows; in their order if there is one part, by length if there are several.

    With `tokens` a part has at most so many, padding counted, unless one row has more; parts are then those that cost least, padding and
    `FORWARD` for each part. Without, as few as there can be.
    """
    ordered = sorted(drawn, key=lambda row: len(row[0].ids))
    if tokens is None:
        parts = [ordered[first : first + rows] for first in range(0, len(ordered), rows)]
    else:
        bounds = cheapest_bounds([len(encoded.ids) for encoded, _, _ in ordered], rows=rows, tokens=tokens)
        parts = [ordered[first:last] for first, last in bounds]
    return parts if len(parts) > 1 else [list(drawn)] if drawn else []


def cheapest_bounds(lengths: Sequence[int], *, rows: int, tokens: int) -> list[tuple[int, int]]:
    """First and last + 1 of each part of rows of ascending `lengths`, of all ways to cut them the one of least cost (dynamic programme)."""
    cost, begins = [0], [0]
    for last in range(1, len(lengths) + 1):
        longest = lengths[last - 1]
        most = max(1, min(rows, tokens // longest))
        ways = ((cost[first] + (last - first) * longest + FORWARD, first) for first in range(max(0, last - most), last))
        least, begin = min(ways)
        cost.append(least)
        begins.append(begin)
    bounds, last = [], len(lengths)
    while last:
        bounds.append((begins[last], last))
        last = begins[last]
    return bounds[::-1]


def collated(rows: Sequence[Drawn], *, pad: int, device: torch.device, source_tokens: tuple[int, ...]) -> Batch:
    """One micro-batch, padded on the right with `pad`; a row's weight is that of each of its answer tokens."""
    shape = (len(rows), max(len(encoded.ids) for encoded, _, _ in rows))
    input_ids = np.full(shape, pad)
    labels = np.full(shape, IGNORED)
    attention_mask = np.zeros(shape, dtype=np.int64)
    for index, (encoded, _, _) in enumerate(rows):
        start, end = encoded.answer_start, len(encoded.ids)
        input_ids[index, :end] = encoded.ids
        attention_mask[index, :end] = 1
        labels[index, start:end] = encoded.ids[start:]
    rows_N, places_N = np.nonzero(labels[:, 1:] != IGNORED)
    read, answers = filled(rows_N, places_N, rows=len(rows))
    return Batch(
        input_ids=torch.from_numpy(input_ids).to(device),
        attention_mask=torch.from_numpy(attention_mask).to(device),
        labels=torch.from_numpy(labels).to(device),
        weights=torch.tensor([weight for _, _, weight in rows]).to(device),
        sources=torch.tensor([source for _, source, _ in rows]).to(device),
        source_tokens=source_tokens,
        read=torch.from_numpy(read).to(device),
        answers=torch.from_numpy(answers).to(device),
    )
