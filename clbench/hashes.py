"""What shows that weights are the same or whole: SHA-256, in hexadecimal, of tensors and of the folders that models are kept in.

>>> of_tensors({"b": torch.ones(2), "a": torch.zeros(1)}) == of_tensors({"a": torch.zeros(1), "b": torch.ones(2)})
True
>>> of_tensors({"a": torch.zeros(2, 1)}) == of_tensors({"a": torch.zeros(1, 2)})
False
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

BESIDE = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TOKENIZERS = ("tokenizer*", "vocab*", "merges*", "chat_template*", "*.model", "*.tiktoken", "*.py")
"""The files beside a model's weights that decide what it says."""


def of_json(value: object) -> str:
    """Of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def of_tensor(tensor: Tensor) -> str:
    """Of a tensor on the CPU: its type, shape and numbers."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of tensors on the CPU by name, in whatever order. Several are read at a time: hashing frees Python's lock."""
    with ThreadPoolExecutor(4) as pool:
        return of_json(dict(zip(tensors, pool.map(of_tensor, tensors.values()), strict=True)))


def of_folder(folder: Path) -> str:
    """Of a model's folder: its tensors, however they are spread over files, its configuration and its tokenizer."""
    files = {path for pattern in (*BESIDE, *TOKENIZERS) for path in folder.glob(pattern) if path.is_file()}
    small = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    with ThreadPoolExecutor(4) as pool:
        return of_json([small, dict(sorted(one for part in pool.map(_of_file, weights_in(folder)) for one in part))])


def weights_in(folder: Path) -> list[Path]:
    """The files that hold a model's or an adapter's weights: those of its index, or the one of the usual name."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors", "adapter_model.safetensors"}
    if index.is_file():
        names |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return sorted(folder / name for name in names if (folder / name).is_file())


def _of_file(path: Path) -> list[tuple[str, str]]:
    """The hash of each tensor of a safetensors file, by name; one is in memory at a time."""
    with safe_open(path, framework="pt") as file:
        return [(name, of_tensor(file.get_tensor(name))) for name in file.keys()]  # noqa: SIM118 (not a dict)
