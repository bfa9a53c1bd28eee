"""What a model puts out: how far its predictions are from another's, the KL divergence over the whole vocabulary, and text that it writes.

For the divergence both predictions are kept as hidden states. Logits are made of them by the model's own head, which may scale or cap them, a slice
of tokens at a time and once more in the backward pass, so that no tensor of [tokens, vocabulary] outlives its slice. Processes that hold slices of
the base (engine.shard_base) make one forward of the head together and with it one tensor of all wanted tokens.

Shape suffixes: M attended tokens of a batch, N answer tokens, P some tokens, H hidden, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from clbench.models.limits import is_kept_as_keys, positions, settings
from clbench.models.loss import Packed, causal_lm
from clbench.models.sharding import gathering, is_sharded
from clbench.types import UserMistake

SLICE = 2**24
"""Logits that are made at once, of either model: 64 MiB in float32."""
AT_ONCE = 64
"""Rows that are written side by side."""
Reference = Callable[[], AbstractContextManager[None]]
"""Opens a context in which forwards are those of the model that is compared with, without gradient."""


@dataclass
class _Output(BaseModelOutput):
    """The layers' output. What else heads pass on of it has a name in each architecture, and is nothing."""

    def __getattr__(self, name: str) -> None:
        return None


class _Hidden(Module):
    """Stands where a model's `layers` stand, and gives the hidden states that it is given; what a head may read of the layers besides is theirs."""

    def __init__(self, layers: Module) -> None:
        super().__init__()
        self._layers = (layers,)  # no part of it

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layers[0], name)

    def forward(self, *unused: object, inputs_embeds: Tensor, **others: object) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)

    @property
    def decoder(self) -> Module:
        """What OPT's head asks for its layers."""
        return self


def layers_of(model: PreTrainedModel) -> str:
    """The name under which a model holds what its head reads the output of; transformers says another of Llama 4."""
    return model.base_model_prefix if hasattr(model, model.base_model_prefix) else "model"


def states(model: Module, packed: Packed) -> Tensor:
    """What the model's layers make of some rows, [M, H]: the input of its head."""
    model = causal_lm(model)
    layers = model.get_submodule(layers_of(model))
    return layers(input_ids=packed.ids[None], use_cache=False, **packed.positions).last_hidden_state[0]


def project(model: Module, hidden_PH: Tensor) -> Tensor:
    """Logits [P, V] in float32 of hidden states, as the model itself makes them."""
    model = causal_lm(model)
    head, name = copy.copy(model), layers_of(model)
    head.__dict__["_modules"] = {**dict(model.named_children()), name: _Hidden(model.get_submodule(name))}
    return head(inputs_embeds=hidden_PH[None], use_cache=False).logits[0].float()


def nll(model: Module, hidden_MH: Tensor, packed: Packed, weights_N: Tensor) -> Tensor:
    """Weighted sum of the negative log-likelihoods of the answer tokens, in nats; only those with a weight are projected, and one at least."""
    wanted = weights_N.nonzero()[:, 0] if weights_N.any() else torch.arange(1, device=weights_N.device)
    logits_PV = project(model, hidden_MH[packed.places[wanted]])
    return (F.cross_entropy(logits_PV, packed.labels[wanted], reduction="none") * weights_N[wanted]).sum()


def divergence(
    model: Module,
    hidden_PH: Tensor,
    reference_PH: Tensor,
    weights_P: Tensor,
    *,
    reference: Reference,
    temperature: float = 1.0,
) -> Tensor:
    """sum_p weight_p T^2 KL( softmax(z_ref / T) || softmax(z / T) ) in nats, of tokens' hidden states; weight 0 is no work.

    T^2 keeps the gradient's size independent of T (arXiv 1503.02531, section 2).
    """
    wanted = weights_P.nonzero()[:, 0]
    size = max(1, SLICE // settings(model)["vocab_size"])
    if any(is_sharded(parameter) for parameter in model.parameters()):
        # Ranks gather the head's weights together, so each of them makes one forward of it, whatever its tokens.
        wanted, size = (wanted, len(wanted)) if len(wanted) else (torch.zeros_like(weights_P[:1], dtype=torch.int64), 1)

    def of_slice(hidden_PH: Tensor, reference_PH: Tensor, weights_P: Tensor) -> Tensor:
        with reference():
            reference_PV = (project(model, reference_PH) / temperature).log_softmax(-1)
        log_probs_PV = (project(model, hidden_PH) / temperature).log_softmax(-1)
        kl_P = F.kl_div(log_probs_PV, reference_PV, reduction="none", log_target=True).sum(-1)
        return temperature**2 * (kl_P * weights_P).sum()

    total = hidden_PH.sum() * 0
    for places in wanted.split(size):
        of_these = hidden_PH[places], reference_PH[places], weights_P[places]
        total = total + checkpoint(of_slice, *of_these, use_reentrant=False)
    return total


@contextmanager
def untouched(model: Module) -> Iterator[None]:
    """Forwards inside are those of the model without its adapters, without dropout or gradient."""
    assert isinstance(model, PeftModel), type(model)
    was_training = model.training
    with torch.no_grad(), model.disable_adapter():
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)


@torch.inference_mode()
def written(model: Module, *, rows: int, length: int, draws: torch.Generator) -> Tensor:
    """int64 [rows, 1 + length] on the CPU: BOS and what `model` draws after it, token by token, at temperature 1; it does not stop at EOS.

    Raises UserMistake where the model's configuration names no BOS, or it reads no rows of that length. A model without storage, of which only the
    layers are looked at, writes zeros.
    """
    begin, longest = settings(model).get("bos_token_id"), positions(causal_lm(model).config)
    if begin is None:
        raise UserMistake("the model's configuration names no bos_token_id to write from; use method=self_replay_text")
    if length >= longest:
        raise UserMistake(f"a row of {length} tokens and BOS is to be written, but the model has {longest} positions")
    if model.device.type == "meta":
        return torch.zeros((rows, 1 + length), dtype=torch.int64, device="cpu")
    parts, cached = [], is_kept_as_keys(model)
    with gathering(model.eval()):
        for first in range(0, rows, AT_ONCE):
            ids, cache = torch.full((min(AT_ONCE, rows - first), 1), begin), DynamicCache() if cached else None
            for _ in range(length):
                read = (ids[:, -1:] if cached else ids).to(causal_lm(model).device)
                output = model(input_ids=read, past_key_values=cache, use_cache=cached, logits_to_keep=1)
                logits = output.logits[:, -1]
                ids = torch.cat([ids, torch.multinomial(logits.float().cpu().softmax(-1), 1, generator=draws)], 1)
            parts.append(ids)
    return torch.cat(parts)
