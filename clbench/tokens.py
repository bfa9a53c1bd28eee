"""Tokenised examples on disk, as three tensors: ids end to end, where each example ends, where its answer starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from clbench.batches import Encoded


def write_tokens(path: Path, encoded: Sequence[Encoded]) -> None:
    """Keeps encoded examples, whole or not at all, whoever else writes them."""
    tensors = {
        "ids": torch.tensor([token for row in encoded for token in row.ids], dtype=torch.int32),
        "ends": torch.tensor([len(row.ids) for row in encoded]).cumsum(0),
        "answer_starts": torch.tensor([row.answer_start for row in encoded]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary)
    temporary.replace(path)


def read_tokens(path: Path) -> list[Encoded]:
    """What `write_tokens` kept, read through a memory map."""
    tensors = load_file(path)
    ids, ends = tensors["ids"].tolist(), tensors["ends"].tolist()
    spans = zip([0, *ends], ends, tensors["answer_starts"].tolist(), strict=False)
    return [Encoded(ids=tuple(ids[first:last]), answer_start=start) for first, last, start in spans]
