"""Tensors without storage (torch's meta device): counting the bytes that they would take, and answering for the numbers they do not have."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

META = torch.device("meta")


class Held(TorchDispatchMode):
    """Counts the bytes of all storages on the meta device from their making to their end; `peak` is the most at once since `mark`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation and counts what it made."""
        result = func(*args, **(kwargs or {}))
        self.count(leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor))
        return result

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Takes in tensors, each storage once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if tensor.device == META and key not in self._storages:
                self._storages[key] = weakref.ref(storage, self._ended(key, storage.nbytes()))
                self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _ended(self, key: int, size: int) -> Callable[[weakref.ref], None]:
        def forget(_: weakref.ref) -> None:
            del self._storages[key]
            self.live -= size

        return forget

    def mark(self) -> None:
        """Peaks count from here."""
        self.peak = self.live


class Shapes(TorchFunctionMode):
    """Answers where the code asks for numbers: a number is 1, a condition false (so prompts to write on count as padded), a draw has a shape.

    Of a [rows, length] tensor as many entries are not zero as rows have answer tokens, of any other all. Attention is one operation that
    keeps no [length, length] scores, as on a GPU.
    """

    def __init__(self, *, answer_length: int) -> None:
        super().__init__()
        self.answer_length = answer_length
        one = lambda tensor: torch.ones((), dtype=tensor.dtype).item()  # noqa: E731
        self._answers: dict[Any, Callable] = {
            Tensor.item: one,
            Tensor.__float__: lambda tensor: 1.0,
            Tensor.__int__: lambda tensor: 1,
            Tensor.__index__: lambda tensor: 1,
            Tensor.__bool__: lambda tensor: False,
            Tensor.all: lambda tensor: torch.ones(
                (), dtype=torch.bool
            ),  # transformers asks whether rows are one sequence each: they are
            Tensor.cpu: lambda tensor: tensor,
            Tensor.numpy: lambda tensor: torch.empty(0).numpy(),
            torch.nonzero: self._nonzero,
            F.scaled_dot_product_attention: attention,
        }

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answers, or lets torch answer."""
        kwargs = kwargs or {}
        if func is torch.randn and "generator" in kwargs:
            return torch.randn(*args, device=META)
        is_meta = bool(args) and isinstance(args[0], Tensor) and args[0].device == META
        if is_meta and func in self._answers:
            return self._answers[func](*args, **kwargs)
        if is_meta and func is Tensor.to and "cpu" in (*args, *kwargs.values()):
            return args[0].clone()
        return func(*args, **kwargs)

    def _nonzero(self, tensor: Tensor, *, as_tuple: bool = False) -> Tensor | tuple[Tensor, ...]:
        count = len(tensor) * self.answer_length if tensor.dim() == 2 else tensor.numel()
        columns = tuple(torch.empty(count, dtype=torch.int64, device=META) for _ in tensor.shape)
        return columns if as_tuple else torch.stack(columns, -1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention by a fused kernel, with its backward pass; a mask of booleans becomes one to be added, as torch does."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
