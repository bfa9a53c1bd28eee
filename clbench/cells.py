"""No examination twice: what a model answered is kept by content, so that equal weights asked equal questions are asked once.

The key of an answer is made of everything that decides it: the weights as they stand (adapters folded in), the architecture, the token ids
read, how many may be written, the precision, the device's kind, the libraries, and the text of our own files that compute it. What is kept
is what the model said, never a score, so a changed metric needs no new key. The untouched model is thus examined once for all methods, orders
and seeds, and the first stage of methods that train alike once; a run that is measured again after a kill finds its answers.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch.nn import Module

from clbench import architecture, generation, last_layer, loss, packing, reading, student, vllm_writer
from clbench.adapters import is_folded, ordinary_state
from clbench.architecture import causal_lm
from clbench.data import Encoder
from clbench.last_layer import is_callable_twice
from clbench.student import Ids, Student, Writer

COMPUTING = (architecture, generation, last_layer, loss, packing, reading, student, vllm_writer)
"""The files whose text decides an answer."""


class CachedStudent(Student):
    """A student whose answers to log-likelihoods and generation are kept in `cells`, for the model that `key` names.

    `tokens_scored` counts what an answer takes, kept or not, so that costs in tokens do not depend on what was examined before.
    """

    def __init__(self, model: Module, encoder: Encoder, *, cells: Path, key: str, writer: Writer | None = None) -> None:
        super().__init__(model, encoder, writer=writer)
        self.cells = cells
        self.key = key

    def log_likelihoods(self, requests: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        """As a student's."""
        asked = [
            (read.ids, read.first, continuation[-1])
            for read, (_, continuation) in zip(self.reads(requests), requests, strict=True)
        ]
        found = self._kept({"asked": asked}, lambda: super(CachedStudent, self).log_likelihoods(requests))
        return [(value, greedy) for value, greedy in found]

    def generate(self, prompts: Sequence[Ids], *, max_new_tokens: int) -> list[str]:
        """As a student's."""
        asked = {"prompts": list(prompts), "max_new_tokens": max_new_tokens, "max_length": self.encoder.max_length}
        asked["end"] = self.encoder.tokenizer.eos_token_id
        asked["words"] = hashlib.sha256(self.encoder.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        if self.writer is not None:
            asked["writer"] = self.writer.name
        return self._kept(asked, lambda: super(CachedStudent, self).generate(prompts, max_new_tokens=max_new_tokens))

    def _kept(self, asked: dict[str, Any], answer: Callable[[], list[Any]]) -> list[Any]:
        asked |= {
            "model": self.key,
            "tokens_per_batch": self.tokens_per_batch,
            "code": code(),
            "device": self.encoder.device.type,
            "last layer": is_callable_twice(causal_lm(self.model).get_decoder()),
        }
        asked |= {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        path = self.cells / name[:2] / f"{name[2:]}.json"
        if path.is_file():
            cell = json.loads(path.read_text(encoding="utf-8"))
        else:
            before = self.tokens_scored
            answers = answer()
            cell = {"answers": answers, "tokens": self.tokens_scored - before}
            self.tokens_scored = before
            write(path, json.dumps(cell))
        self.tokens_scored += cell["tokens"]
        return cell["answers"]


def write(path: Path, text: str) -> None:
    """Whole or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@cache
def code() -> str:
    """SHA-256, in hexadecimal, of the files that compute answers."""
    return hashlib.sha256("".join(map(source, COMPUTING)).encode()).hexdigest()


def source(module: ModuleType) -> str:
    """A module's text."""
    return inspect.getsource(module)


def model_key(model: Module) -> str | None:
    """SHA-256, in hexadecimal, of a model's weights and architecture; None where an adapter is at work that is not folded into a weight."""
    inner = causal_lm(model)
    if not is_folded(model):
        return None
    architecture = {**inner.config.to_dict(), "attention": inner.config._attn_implementation}
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True, default=str).encode())
    for name, tensor in sorted(ordinary_state(inner).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
