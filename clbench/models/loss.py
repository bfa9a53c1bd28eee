"""Reading a batch, and the loss on its answers.

The rows of a batch are read as one row, one after another and without padding: transformers keeps tokens apart whose positions begin anew.
Logits come from the model's own head, which may scale or cap them, and only where the next token is an answer's.

Shape suffixes: B rows, T positions, N answer tokens, M attended tokens, H hidden, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from clbench.types import IGNORED, Batch


def causal_lm(model: Module) -> Module:
    """The Hugging Face causal language model inside its adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a model made of a batch, its rows one after another.

    `logits` [N, V] and `labels` [N]: before each answer token, and the token; `rows` [M] and `answer_rows` [N]: which row a token is of;
    `hidden_states`: every layer's [M, H], embeddings first, where asked for, else ().
    """

    logits: Tensor
    labels: Tensor
    rows: Tensor
    answer_rows: Tensor
    hidden_states: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a batch as one, without padding.

    `ids`, `rows` [M]: its tokens, and which row each is of; `positions`: what tells the model where rows begin; `places`, `labels` [N]: the tokens
    after which an answer's token comes, and those.
    """

    ids: Tensor
    rows: Tensor
    positions: dict[str, Tensor]
    places: Tensor
    labels: Tensor


def end_to_end(batch: Batch) -> Rows:
    """The attended tokens of a batch, row after row."""
    attended_BT = batch.attention_mask.bool()
    rows_BT = torch.arange(len(attended_BT), device=attended_BT.device)[:, None].expand_as(attended_BT)
    positions_BT = torch.arange(attended_BT.shape[1], device=attended_BT.device).expand_as(attended_BT)
    labels_M = batch.labels[attended_BT]
    # No row begins with an answer, so a label's predecessor is always of its own row.
    places_N = (labels_M[1:] != IGNORED).nonzero()[:, 0]
    return Rows(
        ids=batch.input_ids[attended_BT],
        rows=rows_BT[attended_BT],
        positions={"position_ids": positions_BT[attended_BT][None]} if len(attended_BT) > 1 else {},
        places=places_N,
        labels=labels_M[places_N + 1],
    )


def read(model: Module, batch: Batch, *, hidden_states: bool = False) -> Reading:
    """One forward of all rows of `batch`."""
    rows = end_to_end(batch)
    output = causal_lm(model)(
        input_ids=rows.ids[None],
        use_cache=False,
        logits_to_keep=rows.places,
        output_hidden_states=hidden_states,
        **rows.positions,
    )
    return Reading(
        logits=output.logits[0],
        labels=rows.labels,
        rows=rows.rows,
        answer_rows=rows.rows[rows.places],
        hidden_states=tuple(layer[0] for layer in output.hidden_states) if hidden_states else (),
    )


def weighted_nll(reading: Reading, batch: Batch) -> Tensor:
    """This batch's share of the mean negative log-likelihood of the step, in nats per answer token."""
    nll_N = F.cross_entropy(reading.logits.float(), reading.labels, reduction="none")
    return (nll_N * batch.weights[reading.answer_rows]).sum()


def answer_loss(model: Module, batch: Batch) -> Tensor:
    """As `weighted_nll`, from one forward of the batch."""
    return weighted_nll(read(model, batch), batch)


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
