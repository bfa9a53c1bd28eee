"""Reading a batch, and the loss on its answers.

The rows of a batch are read as one row, one after another and without padding: transformers keeps tokens apart whose positions begin anew.
Logits come from the model's own head, which may scale or cap them, and only where the next token is an answer's.

Shape suffixes: B rows, T positions, N answer tokens, M attended tokens, H hidden, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F
from transformers import PreTrainedModel

from clbench.types import IGNORED, Batch


def causal_lm(model: Module) -> PreTrainedModel:
    """The Hugging Face causal language model inside its adapters."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The rows of a batch as one, without padding.

    `ids` [M] are its tokens, `rows` [M] says which row of the batch each is of, and `positions` tells the model where rows begin; `labels` [N] are
    the answer tokens, and `places` [N] where the token before each of them stands.
    """

    ids: Tensor
    rows: Tensor
    positions: dict[str, Tensor]
    places: Tensor
    labels: Tensor


def pack(batch: Batch) -> Packed:
    """The attended tokens of a batch, row after row."""
    attended_BT = batch.attention_mask.bool()
    rows_BT = torch.arange(len(attended_BT), device=attended_BT.device)[:, None].expand_as(attended_BT)
    positions_BT = torch.arange(attended_BT.shape[1], device=attended_BT.device).expand_as(attended_BT)
    labels_M = batch.labels[attended_BT]
    # No row begins with an answer, so a label's predecessor is always of its own row.
    places_N = (labels_M[1:] != IGNORED).nonzero()[:, 0]
    return Packed(
        ids=batch.input_ids[attended_BT],
        rows=rows_BT[attended_BT],
        positions={"position_ids": positions_BT[attended_BT][None]} if len(attended_BT) > 1 else {},
        places=places_N,
        labels=labels_M[places_N + 1],
    )


def read(model: Module, packed: Packed, *, hidden_states: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One forward: the logits [N, V] before each answer token and, where asked for, every layer's hidden states [M, H], embeddings first."""
    output = causal_lm(model)(
        input_ids=packed.ids[None],
        use_cache=False,
        logits_to_keep=packed.places,
        output_hidden_states=hidden_states,
        **packed.positions,
    )
    return output.logits[0], tuple(layer[0] for layer in output.hidden_states) if hidden_states else ()


def weighted_nll(logits_NV: Tensor, packed: Packed, batch: Batch) -> Tensor:
    """This batch's share of the mean negative log-likelihood of the step, in nats per answer token."""
    nll_N = F.cross_entropy(logits_NV.float(), packed.labels, reduction="none")
    return (nll_N * batch.weights[packed.rows[packed.places]]).sum()


def answer_loss(model: Module, batch: Batch) -> Tensor:
    """As `weighted_nll`, from one forward of the batch."""
    packed = pack(batch)
    logits_NV, _ = read(model, packed)
    return weighted_nll(logits_NV, packed, batch)


def rows_of(batch: Batch, picked: Tensor) -> Batch:
    """The rows `picked` (int64 indices) of a batch."""
    return replace(
        batch,
        input_ids=batch.input_ids[picked],
        attention_mask=batch.attention_mask[picked],
        labels=batch.labels[picked],
        weights=batch.weights[picked],
        sources=batch.sources[picked],
    )


def indices_of(batch: Batch, source: int) -> Tensor:
    """Indices of the rows of one source; where there are none the first row's, as every rank makes the same forwards: it is then to be masked."""
    rows = torch.nonzero(batch.sources == source)[:, 0]
    return rows if len(rows) else torch.zeros_like(batch.sources[:1])
