"""The loss on answers, with the vocabulary projected only where an answer is.

Prompts are most of a batch and their logits are never used: taking the projection at answer positions only saves most of its
time and the [rows, length, vocabulary] tensor. Works for every Hugging Face causal language model whose logits are its output
embedding of the decoder's last hidden state, possibly soft-capped or scaled (Llama, Qwen2, Mistral, Gemma2, GPT-2, ...).

Shape suffixes: B rows, T positions, N scored positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn import functional as F

from clbench.models.architecture import causal_lm, is_sharded, soft_cap
from clbench.models.last_layer import hidden_at, states_at
from clbench.types import Batch

LOGITS = 2**23
"""Most logits in memory at a time on the CPU (32 MiB in float32)."""
ACCELERATOR_LOGITS = 2**27
"""And on an accelerator, which needs more to be busy (512 MiB)."""


def project(model: Module, hidden_NH: Tensor) -> Tensor:
    """Logits [..., vocabulary] of last hidden states, in float32."""
    logits = causal_lm(model).get_output_embeddings()(hidden_NH).float()
    cap = soft_cap(model)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def hidden_states(
    model: Module, *, input_ids: Tensor, attention_mask: Tensor, all_layers: bool = False
) -> tuple[Tensor, ...]:
    """Hidden states [B, T, H] of the decoder: every layer's (embeddings first) or only the last, which is always final.

    Rows are padded on the right, where no token of theirs looks, so that attention needs no mask but the causal one. States there mean nothing.
    """
    decoder = causal_lm(model).get_decoder()
    output = decoder(input_ids=input_ids, use_cache=False, output_hidden_states=all_layers)
    return output.hidden_states if all_layers else (output.last_hidden_state,)


def token_nll(model: Module, hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
    """Negative log-likelihood in nats of each token [N], a slice of the logits in memory at a time unless the output embedding trains."""
    inner = causal_lm(model)
    if any(parameter.requires_grad for parameter in inner.get_output_embeddings().parameters()):
        return F.cross_entropy(project(model, hidden_NH), labels_N, reduction="none")
    slices = math.ceil(len(labels_N) / rows_at_once(model, hidden_NH))
    return _FrozenHeadNll.apply(hidden_NH, labels_N, model, slices)


def rows_at_once(model: Module, hidden_NH: Tensor) -> int:
    """How many hidden states may be projected onto the vocabulary at a time."""
    limit = LOGITS if hidden_NH.device.type == "cpu" else ACCELERATOR_LOGITS
    return max(1, limit // causal_lm(model).config.vocab_size)


class _FrozenHeadNll(torch.autograd.Function):
    """Cross-entropy a slice at a time. A token's depends on its own hidden state alone, so its gradient is taken at once and the logits let go."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, labels_N: Tensor, model: Module, slices: int) -> Tensor:
        """[N], in nats."""
        nll, gradients = [], []
        project_slice = _projection(model, rows=math.ceil(len(hidden_NH) / slices))
        for part_NH, part_N in zip(hidden_NH.chunk(slices), labels_N.chunk(slices), strict=True):
            logits_NV, gradient_of = project_slice(part_NH)
            nll.append(nll_(logits_NV, part_N))
            if hidden_NH.requires_grad:
                gradients.append(gradient_of(logits_NV))
        ctx.save_for_backward(*gradients)
        return torch.cat(nll)

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None, None, None]:
        """The kept gradients, each times what comes from above."""
        gradient_NH = torch.cat(ctx.saved_tensors)
        return (gradient_N[:, None] * gradient_NH).to(gradient_NH.dtype), None, None, None


Projected = tuple[Tensor, Callable[[Tensor], Tensor]]
"""Logits in float32, outside autograd, and what makes of their gradient that of the hidden states."""


def _projection(model: Module, *, rows: int) -> Callable[[Tensor], Projected]:
    """What projects slices of up to `rows` hidden states, one after another: each may take the memory of the one before."""
    head = causal_lm(model).get_output_embeddings()
    plain = type(head) is Linear and head.bias is None and soft_cap(model) is None
    # A sharded weight is whole only while its module runs.
    if not plain or head.weight.dtype != torch.float32 or is_sharded(head.weight):
        return partial(_through_module, model)
    weight_VH = head.weight.detach()
    memory_NV = weight_VH.new_empty(rows, len(weight_VH))

    def product(hidden_NH: Tensor) -> Projected:
        logits_NV = torch.mm(hidden_NH, weight_VH.T, out=memory_NV[: len(hidden_NH)])
        return logits_NV, lambda gradient_NV: gradient_NV @ weight_VH

    return product


def _through_module(model: Module, hidden_NH: Tensor) -> Projected:
    with torch.enable_grad():
        leaf_NH = hidden_NH.detach().requires_grad_()
        logits_NV = project(model, leaf_NH)
    return logits_NV.detach(), lambda gradient_NV: torch.autograd.grad(logits_NV, leaf_NH, gradient_NV)[0]


def nll_(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Negative log-likelihoods in nats [N]; in place of the logits, their gradient: the probabilities, less one at the label.

    >>> logits_NV = torch.tensor([[1.0, 1.0]])
    >>> nll_(logits_NV, torch.tensor([1])), logits_NV
    (tensor([0.6931]), tensor([[ 0.5000, -0.5000]]))
    """
    labels_N1 = labels_N[:, None]
    highest_N1, labelled_N1 = logits_NV.amax(1, keepdim=True), logits_NV.gather(1, labels_N1)
    total_N1 = logits_NV.sub_(highest_N1).exp_().sum(1, keepdim=True)
    logits_NV.div_(total_N1).scatter_add_(1, labels_N1, -torch.ones_like(total_N1))
    return (total_N1.log() + highest_N1 - labelled_N1)[:, 0]


def answer_loss(model: Module, batch: Batch) -> Tensor:
    """This batch's share of the mean negative log-likelihood of the step, in nats per answer token."""
    decoder = causal_lm(model).get_decoder()
    hidden_BWH = hidden_at(decoder, batch.read, input_ids=batch.input_ids, use_cache=False)
    return _weighted_nll(model, hidden_BWH.flatten(0, 1)[batch.answers], batch)


def weighted_nll(model: Module, hidden_BTH: Tensor, batch: Batch) -> Tensor:
    """As `answer_loss`, from last hidden states already computed."""
    return _weighted_nll(model, states_at(hidden_BTH, batch.read).flatten(0, 1)[batch.answers], batch)


def _weighted_nll(model: Module, hidden_NH: Tensor, batch: Batch) -> Tensor:
    labels_BW = batch.labels.gather(1, batch.read + 1)
    nll_N = token_nll(model, hidden_NH, labels_BW.flatten()[batch.answers])
    return (nll_N * batch.weights[batch.answers // batch.read.shape[1]]).sum()
