"""Language models of many kinds, tiny and random: what a run scores, writes, trains on and adapts equals plain transformers.

Plain is one sequence at a time, without a cache of keys and values, without padding, adapters not folded.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from clbench import experiment
from clbench.build import build
from clbench.config import composition
from clbench.data.encoder import Encoder
from clbench.examine.student import Student
from clbench.examine.together import reads_together
from clbench.examine.update import Update
from clbench.models.folding import export, folded
from clbench.models.limits import NO_LIMIT, check_length, positions
from clbench.models.loss import answer_loss, causal_lm, pack
from clbench.models.outputs import project, states, written
from clbench.models.pretrained import Pretrained, prepared
from clbench.models.tiny import word_tokenizer
from clbench.models.weights import trainable
from clbench.protocols import Stream
from clbench.types import Example, UserMistake
from tasks import world, world_words
from tests.conftest import small
from tests.test_data import Words

torch.set_num_threads(1)
VOCABULARY = 64
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 8.0, **ROPE}
MODELS = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, **ROPE}},
    "llama-dynamic": {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 8.0, **ROPE}},
    "mistral": {"sliding_window": 12},
    "qwen2": {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": EXPERTS,
    "mixtral": EXPERTS,
    "gemma2": {"sliding_window": 12, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 12, "query_pre_attn_scalar": 8},
    "phi3": {},
    "phi3-longrope": {"original_max_position_embeddings": 16, "rope_parameters": LONG},
    "olmo2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 12},
    "gpt2": {},
    "falcon": {"head_dim": None, "new_decoder_architecture": False},
    "falcon-alibi": {"head_dim": None, "alibi": True},
    "bloom": {},
    "gpt_oss": {"sliding_window": 12, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "deepseek_v3": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8, "num_key_value_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "cohere2": {"sliding_window": 12, "logit_scale": 0.3, "layer_types": ["sliding_attention", "full_attention"]},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 2, "expand": 2, "chunk_size": 8},
    "rwkv": {"context_length": 128, "attention_hidden_size": 32},
    "jamba": EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 8},
    "qwen3_next": EXPERTS | {"shared_expert_intermediate_size": 24, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 16, "interleave_moe_layer_step": 2},
    "starcoder2": {},
}  # fmt: skip


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Where all-linear is refused, why, and what is adapted instead.
UNLIKE = {
    "mamba": ("past its layers dt_proj", ["in_proj", "x_proj"]),
    "mamba2": ("incompatible with Mamba", ["in_proj"]),
    "falcon_h1": ("incompatible with Mamba", [*ATTENTION, "in_proj", "down_proj"]),
    "jamba": ("past its layers dt_proj", [*ATTENTION, "in_proj", "x_proj"]),
    "llama4_text": ("past its layers router", ATTENTION),
    "deepseek_v3": ("fused experts", ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"]),
    "qwen3_next": ("fused experts", [*ATTENTION, "in_proj_qkvz", "out_proj"]),
}


SHORT = (
    "stream.limit=1",
    "stream.train_rows=8",
    "stream.test_rows=4",
    "stream.too_long=drop",
    "train.max_length=64",
    "tracking.progress=false",
)


def tiny(name: str, **changed):
    settings = {key: value for key, value in (SMALL | MODELS[name] | changed).items() if value is not None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.partition("-")[0], **settings)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.2 / parameter.std().clamp_min(1e-3)) if parameter.std() > 0 else None
    return prepared(model)


def plain_log_probs(model, ids):
    """Log-probabilities after each token, [tokens, vocabulary], of one sequence."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


def requests():
    """(context, continuation) pairs: short, long, several one-token choices, a long beginning that many share."""
    rng = torch.Generator().manual_seed(1)

    def draw(count):
        return tuple(torch.randint(3, VOCABULARY, (count,), generator=rng).tolist())

    asked = [((1, *draw(context)), draw(length)) for context, length in ((3, 2), (9, 4), (5, 1), (18, 3), (40, 6))]
    beginning = (1, *draw(40))
    asked += [((*beginning, *draw(count)), draw(2)) for count in (1, 4, 9)]
    return asked + [(asked[2][0], (token,)) for token in range(10, 14)] + [(asked[3][0], (token,)) for token in (7, 9)]


def prompts():
    rng = torch.Generator().manual_seed(2)
    beginning = torch.randint(3, VOCABULARY, (36,), generator=rng).tolist()
    ends = [torch.randint(3, VOCABULARY, (1 + count % 7,), generator=rng).tolist() for count in range(20)]
    alone = [torch.randint(3, VOCABULARY, (count,), generator=rng).tolist() for count in (2, 8, 14)]
    return [(1, *beginning, *end) for end in ends] + [(1, *ids) for ids in alone]


def examples():
    rng = torch.Generator().manual_seed(3)
    lengths = ((4, 2), (20, 3), (9, 1), (38, 5))

    def text(count):
        return " ".join(f"w{number}" for number in torch.randint(48, (count,), generator=rng).tolist())

    return [Example(id=str(i), prompt=text(n), answer=text(m)) for i, (n, m) in enumerate(lengths)]


def run_encoder(model):
    """The encoder as a run has it."""
    encoder = Encoder(Words(), max_length=64)
    encoder.together = reads_together(model, encoder)
    return encoder


def plain_loss(model, encoder):
    """Mean negative log-likelihood in nats of the answers' tokens, from one forward a row."""
    nll, count = 0.0, 0
    for example in examples():
        row = encoder.example(example)
        log_probs = plain_log_probs(model, row.ids)
        nll -= sum(float(log_probs[place - 1, row.ids[place]]) for place in range(row.answer_start, len(row.ids)))
        count += len(row.ids) - row.answer_start
    return nll / count


def run_loss(model, encoder):
    """The loss of a step on the same rows."""
    parts = encoder.micro_batches([(example, 0, 1.0) for example in examples()], rows=len(examples()))
    with torch.inference_mode():
        return sum(float(answer_loss(model, part)) for part in parts)


def check_scores(model, encoder, *, plain=None):
    """Scores of `model` as a run makes them against plain forwards of `plain`."""
    asked = requests()
    scored = [Student(model, encoder, tokens=tokens).log_likelihoods(asked) for tokens in (None, 60)]
    for (context, continuation), *found in zip(asked, *scored, strict=True):
        log_probs = plain_log_probs(plain or model, [*context, *continuation[:-1]])[len(context) - 1 :]
        for value, greedy in found:
            expected = sum(float(row[token]) for row, token in zip(log_probs, continuation, strict=True))
            assert value == pytest.approx(expected, abs=1e-4 * len(continuation))
            assert greedy == all(int(row.argmax()) == token for row, token in zip(log_probs, continuation, strict=True))


def check_writing(model, encoder, *, plain=None, tokens=4):
    asked = prompts()
    for prompt, answer in zip(asked, Student(model, encoder).write(asked, max_new_tokens=tokens), strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + tokens:
            ids.append(int(plain_log_probs(plain or model, ids)[-1].argmax()))
            if ids[-1] == 2:
                break
        assert answer == [token for token in ids[len(prompt) :] if token != 2]


@cache
def method_settings(name: str) -> dict:
    composition.register_schema()
    with initialize_config_dir(str(composition.CONF_DIR), version_base="1.3"):
        tree = compose("config", overrides=small(name))
    return OmegaConf.to_container(tree.method, resolve=True)


def adapted(model, name: str, targets="all-linear", **changed):
    """`model` with the method's adapters, as its yaml has them but for what is `changed`, at random values."""
    settings = {key: value for key, value in method_settings(name).items() if key != "name"} | changed
    if "lora" in settings:
        settings["lora"] = settings["lora"] | {"targets": targets}
    else:
        settings["targets"] = targets
    wrapped = instantiate(settings, _convert_="all").wrap(model).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for tensor in trainable(wrapped).values():
            tensor.add_(torch.randn(tensor.shape) * 0.1)
    return wrapped


# In `make test` one model of each kind that was once wrong; the others in `make test-slow`.
QUICK = (
    "llama-dynamic",
    "mistral",
    "gemma3_text",
    "phi3-longrope",
    "opt",
    "gpt2",
    "gpt_neo",
    "gpt_oss",
    "lfm2",
    "granite",
    "mpt",
    "llama4_text",
)
QUICKLY_ADAPTED = ("llama-tied", "gpt2", "falcon", "lfm2")


def named(*quick: str) -> list[Any]:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize("name", named(*QUICK))
def test_scores_answers_and_losses_are_those_of_plain_forwards(name):
    model = tiny(name)
    encoder = run_encoder(model)
    check_scores(model, encoder)
    check_writing(model, encoder)
    assert run_loss(model, encoder) == pytest.approx(plain_loss(model, encoder), abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_all_grow_by_a_quarter_have_moved_by_a_quarter(name):
    model, probe = tiny(name), Update(name="update")
    student, stream = Student(model, Encoder(Words(), max_length=64)), Stream(name="", order="", stages=())
    probe.begin(student)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | Conv1D)]
    with torch.no_grad():
        for weight in {layer.weight for layer in layers}:  # a tied one once
            weight.mul_(1.25)
    (score,) = probe.measure(student, stream, 0)
    assert score.value == pytest.approx(0.25, rel=1e-4)
    assert score.n == len(layers) - sum(type(layer).__name__ == "Llama4Router" for layer in layers)


# Those whose heads read more than hidden states, or divide, cap or scale logits.
@pytest.mark.parametrize(
    "name", named("rwkv", "falcon_h1", "llama4_text", "gemma2", "cohere2", "granite", "opt", "gpt2")
)
def test_hidden_states_become_the_logits_of_the_models_own_head(name):
    model = tiny(name)
    check_logits(model, run_encoder(model))


def check_logits(model, encoder):
    packed = pack(encoder.collate(examples()[:1]))
    expected = plain_log_probs(model, packed.ids.tolist())[packed.places]
    with torch.inference_mode():
        found = project(model, states(model, packed)[packed.places]).log_softmax(-1)
    assert len(found) > 2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# Those that lost what came before, and one each of the others that keep it: all keys, a window of them, by distance.
@pytest.mark.parametrize(
    "name", named("llama-dynamic", "phi3-longrope", "lfm2", "mamba", "rwkv", "jamba", "gpt2", "mistral", "bloom")
)
def test_a_row_is_drawn_from_all_that_is_written_before(name):
    model, length = tiny(name), 24  # windows are 12 and 16
    rows = written(model, rows=3, length=length, draws=torch.Generator().manual_seed(5))
    draws, plain = torch.Generator().manual_seed(5), torch.full((3, 1), 1)
    for _ in range(length):
        last = torch.stack([plain_log_probs(model, ids)[-1] for ids in plain.tolist()])
        plain = torch.cat([plain, torch.multinomial(last.exp(), 1, generator=draws)], 1)
    assert torch.equal(rows, plain)


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_sequences_longer_than_an_attention_window_share_rows_and_beginnings(name):
    check_scores(tiny(name), Encoder(Words(), max_length=64, together=True))


@pytest.mark.parametrize("method", ["seq", "clora", "curlora", "secura"])
@pytest.mark.parametrize("name", named(*QUICKLY_ADAPTED))
def test_adapters_act_alike_folded_or_not(name, method):
    untouched = tiny(name)
    _, targets = UNLIKE.get(name, ("", "all-linear"))
    model = adapted(tiny(name), method, targets)
    encoder = run_encoder(causal_lm(model))
    expected = plain_loss(model, encoder)
    assert abs(expected - plain_loss(untouched, encoder)) > 1e-3
    assert run_loss(model, encoder) == pytest.approx(expected, abs=1e-4)
    with folded(model):
        check_scores(model, encoder, plain=adapted(tiny(name), method, targets))
        check_writing(model, encoder, plain=adapted(tiny(name), method, targets))
        assert run_loss(model, encoder) == pytest.approx(expected, abs=1e-4)
    assert run_loss(model, encoder) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", UNLIKE)
def test_layers_that_cannot_be_adapted_are_refused_in_one_line(name):
    why, _ = UNLIKE[name]
    with pytest.raises(UserMistake, match=why) as refused:
        adapted(tiny(name), "seq")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "lacks"), [("phi3", "q_proj"), ("opt", "o_proj"), ("gpt2", "q_proj"), ("mixtral", "gate_proj")]
)
def test_a_method_as_it_stands_is_refused_in_one_line_on_a_model_that_lacks_its_layers(name, lacks):
    with pytest.raises(UserMistake, match=f"'{lacks}' is in no layer's name; choose .* or all-linear") as refused:
        adapted(tiny(name), "seq", method_settings("seq")["lora"]["targets"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", ["seq", "dora", "curlora", "secura", "secura_m2"])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_weight_that_two_layers_read_is_adapted_in_one_of_them_only(method, target):
    if target == "embed_tokens" and method not in ("seq", "dora"):
        with pytest.raises(UserMistake, match="Embedding"):
            adapted(tiny("llama-tied"), method, [target])
        return
    if method == "secura":
        with pytest.raises(UserMistake, match="lm_head"):
            adapted(tiny("llama-tied"), method, [target])
        return
    model, plain = (adapted(tiny("llama-tied"), method, [target, "q_proj"]) for _ in range(2))
    encoder = run_encoder(causal_lm(model))
    with folded(model):
        check_scores(model, encoder, plain=plain)
    before = plain_log_probs(plain, (1, 5, 6))
    assert torch.equal(plain_log_probs(model, (1, 5, 6)), before)
    with pytest.raises(UserMistake, match=target):
        export(model, Path("nowhere"))


@pytest.mark.parametrize("method", ["seq_merge", "olora", "merge_average", "secura"])
def test_methods_that_merge_refuse_a_weight_that_two_layers_read(method):
    with pytest.raises(UserMistake, match="lm_head"):
        adapted(tiny("llama-tied"), method, ["q_proj", "lm_head"])
    adapted(tiny("llama"), method, ["q_proj", "lm_head"])


@pytest.mark.parametrize("targets", [["attn.c_proj"], ["c_attn", "mlp.c_fc"]])
@pytest.mark.parametrize("method", ["seq_merge", "olora", "merge_average"])
def test_weights_kept_in_out_are_merged_like_any_other(method, targets):
    settings = {key: value for key, value in method_settings(method).items() if key != "name"}
    settings["lora"] = settings["lora"] | {"targets": targets}
    merging = instantiate(settings, _convert_="all")
    model = merging.wrap(tiny("gpt2")).eval()
    torch.manual_seed(4)
    for tensor in trainable(model).values():
        tensor.detach().add_(torch.randn(tensor.shape) * 0.1)
    ids = torch.arange(3, 30)[None]
    with torch.inference_mode():
        sequential = model(ids).logits
    merging.consolidate(model)
    (_, weights), *_ = merging.views(model).items()
    with weights, torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, sequential, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["clora_svd_major", "clora_svd_minor", "secura", "secura_m2", "l2", "ewc", "ilora"])
def test_weights_kept_in_out_train_tensors_that_can_be_flattened(method):
    assert all(tensor.is_contiguous() for tensor in trainable(adapted(tiny("gpt2"), method)).values())


def test_singular_vectors_of_a_weight_kept_in_out_are_those_of_its_layers_matrix():
    settings = {key: value for key, value in method_settings("clora_svd_major").items() if key != "name"}
    method = instantiate(settings | {"k": 2}, lora={"targets": ["c_fc"]}, _convert_="all")
    model = tiny("gpt2")
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().T  # [out, in]
    method.wrap(model)
    name = next(name for name in method.bases if "h.0" in name and "lora_A" in name)
    _, _, vectors = torch.linalg.svd(weight)
    torch.testing.assert_close((vectors[:2] @ method.bases[name]).abs(), torch.eye(2), atol=1e-4, rtol=0)


def words() -> PreTrainedTokenizerFast:
    return word_tokenizer([f"w{number}" for number in range(48)])


def folder(path: Path, model, tokenizer=None) -> str:
    """A model's folder as users have it."""
    model.save_pretrained(path)
    (tokenizer or words()).save_pretrained(path)
    return str(path)


def refused(name: str) -> str:
    """The one line with which a folder is refused, before its weights are read."""
    with pytest.raises(UserMistake) as mistake:
        Pretrained(label="x", name=name).load_tokenizer(Path())
    assert "\n" not in str(mistake.value) and len(str(mistake.value)) < 400, str(mistake.value)
    return str(mistake.value)


def test_a_folder_is_refused_in_one_line_before_its_weights_are_read(tmp_path):
    t5 = AutoConfig.for_model("t5", vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    t5.save_pretrained(tmp_path / "t5")
    words().save_pretrained(tmp_path / "t5")
    assert "is a t5" in refused(str(tmp_path / "t5"))
    AutoConfig.for_model("cpmant").save_pretrained(tmp_path / "cpmant")
    words().save_pretrained(tmp_path / "cpmant")
    assert "takes no inputs_embeds" in refused(str(tmp_path / "cpmant"))
    assert "states sliding_window=8, which a llama ignores" in refused(
        folder(tmp_path / "window", tiny("llama", sliding_window=8))
    )
    unknown = folder(tmp_path / "unknown", tiny("llama"))
    stated = json.loads((tmp_path / "unknown" / "config.json").read_text())
    (tmp_path / "unknown" / "config.json").write_text(json.dumps(stated | {"model_type": "frobnicate"}))
    assert "frobnicate" in refused(unknown)
    piece = folder(tmp_path / "piece", tiny("llama"))
    (tmp_path / "piece" / "tokenizer.json").unlink()
    (tmp_path / "piece" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "piece" / "tokenizer.model").write_bytes(b"no sentences")
    assert "tiktoken" in refused(piece)


def test_ids_beyond_the_embedding_are_refused_unless_only_a_special_tokens_spelling_gives_them(tmp_path):
    tokenizer = words()
    tokenizer.add_special_tokens({"pad_token": "<more>"})
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert (len(tokenizer), tokenizer.pad_token_id) == (54, 52)
    sizes = {"vocab_size": 53}
    name = folder(tmp_path / "fits", tiny("llama", **sizes), tokenizer)
    assert Pretrained(label="x", name=name).load_tokenizer(Path()).pad_token_id == 52
    name = folder(tmp_path / "pad", tiny("llama", vocab_size=52), tokenizer)
    assert "'<more>' has the id 52" in refused(name)
    name = folder(tmp_path / "word", tiny("llama", vocab_size=50), words())
    assert "has the id 50" in refused(name)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "bloom"])
def test_the_models_own_dropout_is_off_and_said_once(name, tmp_path, caplog):
    model = tiny(name, vocab_size=53)
    with caplog.at_level("INFO"):
        loaded, tokenizer = Pretrained(label="x", name=folder(tmp_path, model)).load(tmp_path)
    said = [record.message for record in caplog.records if "dropout is off" in record.message]
    assert len(said) == (name in ("gpt2", "opt"))  # 0.1 in their configurations
    batch = Encoder(tokenizer, max_length=64).collate(examples())
    with torch.inference_mode():
        assert float(answer_loss(loaded.train(), batch)) == float(answer_loss(loaded.eval(), batch))


def test_what_is_longer_than_the_models_positions_is_refused_in_one_line():
    for name in ("gpt2", "opt"):
        model = tiny(name)
        assert positions(model.config) == 128
        with pytest.raises(UserMistake, match="train.max_length=129"):
            check_length(129, positions=128)
        check_length(128, positions=128)
        student = Student(model, Encoder(Words(), max_length=64))
        long = [((1, *range(3, 60), *range(3, 60), *range(3, 30)), (7,))]
        with pytest.raises(UserMistake, match="128 positions"):
            student.log_likelihoods(long, max_length=1000)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.max_length=129"], "train.max_length=129, but the model has 128 positions"),
        (["train.max_length=64", "probe.probes.perplexity.window=300"], r"a probe reads \d+ tokens at once"),
        (["train.max_length=64", "method.lora.targets=[q_proj]"], r"'q_proj' is in no layer's name; choose .*c_attn"),
        (["train.max_length=64", "method=self_replay", "method.length=128"], "128 tokens and BOS .* has 128 positions"),
        (["train.max_length=64", "prompt=chat"], "prompt=chat, but the model's tokenizer has no chat template"),
    ],
)
def test_what_does_not_suit_the_model_is_refused_before_its_weights_are_read(overrides, said, tmp_path, monkeypatch):
    check_refused(overrides, said, tmp_path, monkeypatch)


def test_a_model_that_knows_no_beginning_of_a_text_is_to_write_none(tmp_path, monkeypatch):
    given, said = ["method=self_replay", "train.max_length=64"], "names no bos_token_id to write from"
    check_refused(given, said, tmp_path, monkeypatch, bos_token_id=None)


def check_refused(overrides, said, tmp_path, monkeypatch, **stated):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))

    def long_texts(**unused: object) -> list[str]:
        return [" ".join(["of"] * 200)]

    monkeypatch.setattr(world, "heldout_texts", long_texts)
    tokenizer = word_tokenizer(world_words.VOCABULARY)
    model = tiny("gpt2", vocab_size=len(tokenizer))
    name = folder(tmp_path / "model", model, tokenizer)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | stated))
    paths = [f"results_dir={tmp_path}", f"cache_dir={tmp_path}", "stream.too_long=drop"]
    config = composition.compose([f"model.name={name}", "+model.world_seed=0", *paths, *overrides])
    with pytest.raises(UserMistake, match=said):
        build(config)


@pytest.mark.parametrize(("name", "method"), [("mamba", "curlora"), ("llama4_text", "seq")])
def test_layers_that_are_computed_past_are_refused_before_the_model_is_examined(name, method, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "measure_untouched", lambda *_, **__: pytest.fail("the model was examined"))
    tokenizer = word_tokenizer(world_words.VOCABULARY)
    model = folder(tmp_path / "model", tiny(name, vocab_size=len(tokenizer)), tokenizer)
    targets = {"seq": "method.lora.targets", "curlora": "method.targets"}[method]
    asked = [f"model.name={model}", "+model.world_seed=0", *small(method), f"{targets}=all-linear"]
    config = composition.compose([*asked, f"results_dir={tmp_path}", f"cache_dir={tmp_path}", *SHORT])
    with pytest.raises(UserMistake, match=UNLIKE[name][0]):
        experiment.run(config)


def test_the_longest_input_is_found_under_any_name_and_in_nested_configurations():
    assert positions(tiny("mpt").config) == positions(tiny("rwkv").config) == 128
    assert positions(tiny("mamba2", max_position_embeddings=None).config) == NO_LIMIT
    assert positions(tiny("bloom", max_position_embeddings=None).config) == NO_LIMIT
    assert positions(tiny("llama-dynamic").config) == 16 * 8 and positions(tiny("llama-yarn").config) == 128
    text = {**SMALL, "sliding_window": 12, "query_pre_attn_scalar": 8}
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=sight | {"image_size": 28, "patch_size": 14}
    )
    torch.manual_seed(0)
    nested = prepared(AutoModelForCausalLM.from_config(config).float())
    encoder = run_encoder(nested)
    assert positions(nested.config) == 128
    check_logits(nested, encoder)
    check_scores(nested, encoder)
    check_writing(nested, encoder, tokens=2)
    assert run_loss(nested, encoder) == pytest.approx(plain_loss(nested, encoder), abs=1e-4)
