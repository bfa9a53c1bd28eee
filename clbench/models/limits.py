"""What a model's folder and configuration say of what it can read, and the weights that stand in it twice."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.nn import Module
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from clbench.hashes import BESIDE
from clbench.models.loss import causal_lm
from clbench.types import UserMistake

LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length", "n_ctx")
"""What configurations call the longest input."""
TOKENIZER = "tokenizer.json"
READ_BY = ("tokenizer_config.json", TOKENIZER, "*.index.json")
"""Beside hashes.BESIDE, the files that say how a folder's weights and texts are read."""
NO_LIMIT = 2**31
"""Positions of a model that has no longest input (Mamba, Bloom)."""
STRETCHED = {"dynamic", "longrope"}
"""Kinds of rotary embedding that depend on the longest position of a forward: rows, and what is cached of earlier tokens, change each other."""
ATTENTION = {"full_attention", "sliding_attention"}
"""Kinds of layer whose tokens a mask keeps apart."""


def check_objects(folder: Path) -> None:
    """Raises UserMistake where a file that says how a model is read holds no JSON object, which libraries ignore, or end at with a traceback."""
    for path in sorted({path for pattern in (*BESIDE, *READ_BY) for path in folder.glob(pattern)}):
        try:
            text = path.read_text(encoding="utf-8")
            # The tokenizer's own file is long, and read by a library that refuses a broken one.
            is_object = text.lstrip().startswith("{") if path.name == TOKENIZER else isinstance(json.loads(text), dict)
        except (OSError, ValueError):
            is_object = False
        if not is_object:
            raise UserMistake(
                f"model.name={str(folder)!r}: {path.name} holds no JSON object; restore it, or choose another model"
            )


def settings(model: Module) -> dict[str, Any]:
    """The configuration of the model's language part, as plain values."""
    return causal_lm(model).config.get_text_config().to_dict()


def rope_settings(stated: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those of every kind of rotary embedding that a configuration has."""
    rope = stated.get("rope_parameters") or {}
    return [rope, *(inner for inner in rope.values() if isinstance(inner, dict))]


def is_stretched(model: Module) -> bool:
    """Whether the model's rotary positions are scaled by the longest row of a batch."""
    return any(rope.get("rope_type") in STRETCHED for rope in rope_settings(settings(model)))


def is_kept_as_keys(model: Module) -> bool:
    """Whether keys and values are all that the model keeps of earlier tokens, and later ones change none of them; convolutions and states run on."""
    kinds = settings(model).get("layer_types") or ()
    return not causal_lm(model)._is_stateful and not is_stretched(model) and ATTENTION.issuperset(kinds)


def has_one_key_head(model: Module) -> bool:
    """Whether, somewhere in the model, all heads of attention share one head of keys and values (multi-query attention)."""
    stated = settings(model)
    heads = stated.get("num_attention_heads", stated.get("n_head", 1))
    return heads > 1 and any(vars(module).get("num_key_value_groups") == heads for module in model.modules())


def positions(config: PretrainedConfig) -> int:
    """The longest input in tokens, NO_LIMIT where the configuration states none; dynamic rotary embeddings reach `factor` times further."""
    found = config.get_text_config().to_dict()
    longest = next((int(found[name]) for name in LENGTHS if found.get(name)), NO_LIMIT)
    factors = [rope.get("factor", 1.0) for rope in rope_settings(found) if rope.get("rope_type") == "dynamic"]
    return int(longest * max(factors, default=1.0))


def check_tokens(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserMistake where the tokenizer gives ids that the model does not embed.

    A special token that only its own spelling gives may be beyond (Gemma-3 has an image's): texts of ours never give it.
    """
    rows, own = config.get_text_config().vocab_size, (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    spelled = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - set(own)
    beyond = {
        token: number for token, number in tokenizer.get_vocab().items() if number >= rows and token not in spelled
    }
    if beyond:
        token, number = min(beyond.items(), key=lambda item: item[1])
        raise UserMistake(
            f"the tokenizer's token {token!r} has the id {number}, but the model embeds {rows} ids; "
            "name another model, or give this one's folder the tokenizer that belongs to it (model.name)"
        )


def check_length(max_length: int, *, positions: int) -> None:
    """Raises UserMistake where training would read more than the model has positions for."""
    if max_length > positions:
        raise UserMistake(
            f"train.max_length={max_length}, but the model has {positions} positions; set train.max_length={positions} at most"
        )


def check_read(tokens: int, *, positions: int) -> None:
    """Raises UserMistake where a probe reads more than the model has positions for."""
    if tokens > positions:
        raise UserMistake(
            f"a probe reads {tokens} tokens at once, the model has {positions} positions; "
            "shorten the probe's window (conf/probe) or train.max_length"
        )


def shared_weights(model: Module) -> frozenset[int]:
    """The parameters that several layers hold, such as an output embedding tied to the input's, by identity."""
    held = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return frozenset(number for number, count in held.items() if count > 1)


def check_unshared(model: Module, names: Iterable[str]) -> None:
    """Raises UserMistake where the weight inside the adapted layer of a name is another layer's, too: merged into, it would change both."""
    shared = shared_weights(model)
    for name in names:
        if any(id(parameter) in shared for parameter in model.get_submodule(name).parameters()):
            raise UserMistake(
                f"this method merges into weights, but that of {name} is another layer's, too (tied); take it out of the targets (conf/method)"
            )
