"""The doctor against runs, real models and numbers worked out by hand."""

import json
import re
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from transformers import AutoConfig, AutoModelForCausalLM

from clbench import doctor
from clbench.build import DTYPES, make_method, make_tasks
from clbench.config.composition import CONF_DIR, compose
from clbench.data.encoder import Encoder
from clbench.doctor import (
    CARD,
    Tokens,
    card,
    count_tokens,
    datasets_page,
    memory,
    methods,
    sketch,
    trainable_rows,
    work,
)
from clbench.experiment import run
from clbench.models.loss import causal_lm
from clbench.models.weights import count_parameters
from clbench.types import UserMistake
from tests.conftest import small

LLAMA = AutoConfig.for_model(
    "llama",
    vocab_size=100,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
# Embedding and head of 100 * 16; a layer q 16*16, k and v 8*16 each, o 16*16, three of 16*24, two norms of 16; a last norm.
PARAMETERS = 2 * 1600 + 3 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 24 + 2 * 16) + 16
METHODS = methods()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_yaml_has_a_whole_card(method):
    assert list(card(METHODS[method]["_target_"])) == list(CARD)


def test_a_variant_has_its_parents_module_and_its_own_keys():
    assert METHODS["ewc_online"]["_target_"] == METHODS["ewc"]["_target_"] == "baselines.ewc.Ewc"
    assert METHODS["ewc"]["decay"] is None and METHODS["ewc_online"]["decay"] == 0.9
    assert METHODS["ewc"]["lora"] == METHODS["seq"]["lora"]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_read_from_its_yaml_is_what_hydra_composes(method):
    assert METHODS[method] == compose([f"method={method}"]).method


def test_the_page_of_datasets_is_that_of_the_yamls():
    assert (CONF_DIR / "task" / "README.md").read_text(encoding="utf-8") == datasets_page() + "\n"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_wraps_a_model_without_storage_as_it_wraps_a_real_one(method, overrides):
    config = compose([*overrides, *small(method), "engine.dtype=bfloat16"])
    real = make_method(config).wrap(AutoModelForCausalLM.from_config(LLAMA, dtype=torch.bfloat16))
    _, found = sketch(config, LLAMA)
    looks = [
        [(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()] for model in (found, real)
    ]
    assert looks[0] == looks[1]
    assert {parameter.device.type for parameter in found.parameters()} == {"meta"}
    assert count_parameters(found)["parameters"] >= PARAMETERS


def test_full_training_trains_all_parameters_and_the_base_none(overrides):
    rows = dict(trainable_rows(compose(overrides), LLAMA))
    assert rows["seq_full"] == f"{PARAMETERS:,}" and rows["base"] == "0"
    # Rank 8 on q 16+16, k and v 16+8 each, o 16+16, three of 16+24, in each of three layers.
    assert rows["seq"] == f"{3 * 8 * (2 * 32 + 2 * 24 + 3 * 40):,}"


def test_settings_of_an_experiments_method_are_not_those_of_the_others(tmp_path):
    wide = AutoConfig.for_model("llama", vocab_size=100, hidden_size=128, intermediate_size=64, num_hidden_layers=2)
    config = compose(["+experiment=curlora3_mistral7b", "method.rank=4", f"results_dir={tmp_path}"])
    assert dict(trainable_rows(config, wide))["curlora"] == f"{2 * 3 * 64 * 64:,}"
    assert count_parameters(sketch(config, wide)[1])["trainable"] == 2 * 3 * 4 * 4


def test_a_model_that_a_method_does_not_suit_is_named_and_the_others_are_counted(overrides):
    rows = dict(trainable_rows(compose(overrides), AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2)))
    assert rows["seq"].startswith("not to be counted on this model")
    assert int(rows["seq_full"].replace(",", "")) > 0


@pytest.mark.parametrize(
    "method", ["seq", "er", "er_trace", "ewc", "ilora", "joint", "curlora", "secura", "clora", "seq_full"]
)
def test_parameters_tokens_and_operations_are_those_that_a_run_records(overrides, method):
    config = compose([*overrides, *small(method)])
    config.probe.probes = {"stream": config.probe.probes["stream"]}
    lines = (run(config) / "cost.jsonl").read_text().splitlines()
    costs = [json.loads(line) for line in lines]
    source = instantiate(config.model, _convert_="all")
    sizes = source.sizes(Path(config.cache_dir))
    encoder = Encoder(source.load_tokenizer(Path(config.cache_dir)), max_length=config.train.max_length)
    counts = count_parameters(sketch(config, sizes)[1])
    tokens = count_tokens(config, sizes, make_tasks(config), encoder)
    scored = sum(cost["tokens_scored"] for cost in costs)
    assert {cost["trainable_parameters"] for cost in costs} == {counts["trainable"]}
    assert tokens.trained == sum(cost["tokens_trained"] for cost in costs)
    assert tokens.replayed == sum(cost["tokens_replayed"] for cost in costs)
    assert (tokens.replayed > 0) == (method in ("er", "er_trace", "ilora"))
    # Beginnings that prompts share are read once, and what is written may end early.
    assert scored <= tokens.examined <= 2 * scored
    read = Tokens(trained=tokens.trained, replayed=tokens.replayed, examined=scored)
    assert list(work(read, counts, 1.0))[-1][2] == f"{sum(cost['flops'] for cost in costs):.2e}"


def test_hours_are_operations_over_speed():
    # (30 + 10) * (4 * 1000 + 2 * 100) and 5 * 2 * 1000 operations, at 100 an hour.
    rows = list(work(Tokens(trained=30, replayed=10, examined=5), {"parameters": 1000, "trainable": 100}, 100 / 3600))
    assert [row[1:] for row in rows] == [
        ("40", "1.68e+05", "1680.00"),
        ("5", "1.00e+04", "100.00"),
        ("45", "1.78e+05", "1780.00"),
    ]


def test_memory_of_each_zero_stage_is_the_formula(overrides):
    config = compose(
        [*overrides, "method=seq", "train.batch_size=16", "train.max_length=8", "train.micro_batch_size=2"]
    )
    _, model = sketch(config, LLAMA)
    trained = 3 * 8 * (2 * 32 + 2 * 24 + 3 * 40)
    # Beside the parameters the model has one buffer of rotary frequencies, 2 numbers, and its copy.
    held, state = 4 * (PARAMETERS + trained + 2 * 2), 4 * trained
    # 2 rows of 8 tokens; float32 keeps 40 and 16 bytes per hidden and inner number; 4 of the 16 tokens are answers.
    activations, logits = 16 * 3 * (40 * 16 + 16 * 24), 4 * 100 * 8
    assert memory(config, model, LLAMA, 4) == {
        "weights": [held, held, held, held / 4],
        "gradients": [state] * 4,
        "moments, masters": [2 * state, 0.75 * state, 0.75 * state, 0.75 * state],
        "activations": [activations] * 4,
        "logits": [logits] * 4,
        "total": [
            held + 3 * state + activations + logits,
            *[held + 1.75 * state + activations + logits] * 2,
            held / 4 + 1.75 * state + activations + logits,
        ],
    }
    config.engine.activation_checkpointing = True
    again = 16 * (3 * 16 * 4 + 40 * 16 + 16 * 24)
    assert memory(config, model, LLAMA, 4)["activations"] == [again] * 4


@pytest.mark.parametrize(("method", "dtype"), [("seq", "float32"), ("seq", "bfloat16"), ("seq_full", "float32")])
def test_activations_are_near_what_autograd_keeps(overrides, method, dtype):
    config = compose([*overrides, f"method={method}", f"engine.dtype={dtype}"])
    sizes = AutoConfig.for_model("llama", vocab_size=32, hidden_size=256, intermediate_size=704, num_hidden_layers=2)
    model = make_method(config).wrap(AutoModelForCausalLM.from_config(sizes, dtype=DTYPES[dtype]))
    config.train.batch_size, config.train.micro_batch_size, config.train.max_length = 2, None, 64
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        causal_lm(model).get_decoder()(input_ids=torch.zeros(2, 64, dtype=torch.long), use_cache=False)
    measured = sum(size for _, size in kept.values())
    assert measured == pytest.approx(memory(config, sketch(config, sizes)[1], sizes, 1)["activations"][0], rel=0.2)


def test_the_doctor_prints_every_table_for_a_number_of_processes_that_no_engine_states(overrides, capsys):
    doctor.main([*overrides, "method=ewc", "engine.processes=8", "gpu=a100", "utilisation=0.5"])
    printed = " ".join(capsys.readouterr().out.split())
    for text in (
        "world with ewc: ",
        "8 a100 at 50% of the peak",
        "Tokens are exact",
        "Probes of base knowledge and of text are not counted",
        "GB (an a100 has 80) ZeRO 0 ZeRO 1 ZeRO 2 ZeRO 3",
        "a formula, unmeasured",
        "Disk: a checkpoint takes",
        *(f" {method} " for method in METHODS),
    ):
        assert text in printed


def test_what_cannot_be_counted_without_the_model_or_rows_is_said(overrides, capsys, tmp_path):
    small = ("model.architecture.num_hidden_layers=1", "model.architecture.vocab_size=100", "stream.limit=2")
    doctor.main(["+experiment=seq16_qwen2_1b5", *small, f"cache_dir={tmp_path}", f"results_dir={tmp_path}"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "hours cannot be counted: model.name='Qwen/Qwen2-1.5B' could not be loaded" in printed
    assert "Memory of one GPU" in printed and "ZeRO 3" in printed


def test_the_doctor_reads_yamls_of_ones_own(overrides, tmp_path, capsys):
    rows = "".join(f'{{"text": "match {number}", "label": {number % 2}}}\n' for number in range(60))
    (tmp_path / "mine.jsonl").write_text(rows)
    (tmp_path / "conf" / "task").mkdir(parents=True)
    (tmp_path / "conf" / "task" / "mine.yaml").write_text(
        f'_target_: tasks.rows.Rows\nrows: {tmp_path}/mine.jsonl\nprompt: "{{text}}"\nanswer: label\nchoices: ["no", "yes"]\n'
    )
    doctor.main(["--config-dir", str(tmp_path / "conf"), *overrides, "stream.tasks=[mine]", "stream.name=mine"])
    printed = capsys.readouterr().out
    assert "ZeRO 3" in printed and "Tokens are exact" in printed, printed


def test_on_the_machine_at_hand_it_says_what_a_run_then_says_without_examining_again(
    overrides, tmp_path, capsys, caplog
):
    doctor.main([*overrides, "gpu=here"])
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"about \S+ \S+ to go on this machine: training .* examining (\S+ \S+) \(most of it", said), said
    path = run(compose(overrides))
    live = " ".join(caplog.text.split())
    # What the probes took is the very same measurement; the trial of training is another.
    examining = re.search(r"examining (\S+ \S+) ", said)[1]
    assert f"examining {examining} " in live, (examining, live)
    (first, *_) = (json.loads(line) for line in (path / "cost.jsonl").open())
    assert first["stage"] == 0 and first["seconds_probe"] > 0


def test_a_run_still_refuses_processes_without_an_engine_for_them(overrides):
    with pytest.raises(UserMistake, match="it is one process"):
        compose([*overrides, "engine.processes=8"])


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("gpu=abacus", "a100"),
        ("utilisation=2", "share"),
        ("gpu=here engine=deepspeed engine.zero_stage=3 engine.processes=2 engine.shard_base=true", "in one process"),
        ("engine.processes=two", "whole number"),
        ("method=nope", "secura"),
        ("+experiment=nope", "seq16_llama3"),
        ("train.rl=1", "train.rl"),
        ("", "say what to look at"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argument, named, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        doctor.main([*argument.split(), f"results_dir={tmp_path}", f"cache_dir={tmp_path}"] if argument else [])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("clbench: ") and said.count("\n") == 1
    assert named in said and "Config search path" not in said
