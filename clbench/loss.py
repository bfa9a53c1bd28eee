"""The loss on answers, with the vocabulary projected only where an answer is.

Prompts are most of a batch and their logits are never used: taking the projection at answer positions only saves most of its
time and the [rows, length, vocabulary] tensor. Works for every Hugging Face causal language model whose logits are its output
embedding of the decoder's last hidden state, possibly soft-capped or scaled (Llama, Qwen2, Mistral, Gemma2, GPT-2, ...).

Shape suffixes: B rows, T positions, N scored positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from clbench.data import IGNORED
from clbench.types import Batch


def causal_lm(model: Module) -> Module:
    """The Hugging Face causal language model inside its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def project(model: Module, hidden_NH: Tensor) -> Tensor:
    """Logits [..., vocabulary] of last hidden states, in float32."""
    inner = causal_lm(model)
    logits = inner.get_output_embeddings()(hidden_NH).float()
    cap = getattr(inner.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def hidden_states(
    model: Module, *, input_ids: Tensor, attention_mask: Tensor, all_layers: bool = False
) -> tuple[Tensor, ...]:
    """Hidden states [B, T, H] of the decoder: every layer's (embeddings first) or only the last, which is always final."""
    output = causal_lm(model).get_decoder()(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, output_hidden_states=all_layers
    )
    return output.hidden_states if all_layers else (output.last_hidden_state,)


def answer_nll(model: Module, hidden_BTH: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood in nats of every answer token [N], and the row of each [N]."""
    rows, positions = torch.nonzero(labels_BT[:, 1:] != IGNORED, as_tuple=True)
    logits_NV = project(model, hidden_BTH[rows, positions])
    return F.cross_entropy(logits_NV, labels_BT[rows, positions + 1], reduction="none"), rows


def answer_loss(model: Module, batch: Batch) -> Tensor:
    """This batch's share of the mean negative log-likelihood of the step, in nats per answer token."""
    (last_BTH,) = hidden_states(model, input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return weighted_nll(model, last_BTH, batch)


def weighted_nll(model: Module, hidden_BTH: Tensor, batch: Batch) -> Tensor:
    """As `answer_loss`, from last hidden states already computed."""
    nll_N, rows_N = answer_nll(model, hidden_BTH, batch.labels)
    return (nll_N * batch.weights[rows_N]).sum()
