"""Models made from a recipe: made once, ordinary Hugging Face folders, known by what determines their weights."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from clbench.build import load_model, placed
from clbench.config.composition import compose
from clbench.data.encoder import Encoder
from clbench.examine.student import Student
from clbench.models.limits import has_one_key_head
from clbench.models.pretrained import Pretrained
from clbench.models.pretraining import orders, packed, pretrain, warm_cosine
from clbench.models.tiny import Recipe, fresh_llama, word_tokenizer
from clbench.types import UserMistake


@dataclasses.dataclass(frozen=True)
class Text:
    """A corpus of two sentences."""

    lines: int = 40

    def texts(self):
        return ["the cat sleeps", "a dog runs home"] * (self.lines // 2)

    def vocabulary(self):
        return tuple("the cat sleeps a dog runs home".split())


def recipe(**changed) -> Recipe:
    fields = {
        "label": "toy",
        "corpus": Text(),
        "tokenizer": "words",
        "architecture": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
        "steps": 3,
        "batch_size": 2,
        "length": 8,
        "lr": 1e-2,
        "seed": 0,
    }
    return Recipe(**(fields | changed))


def test_a_recipe_is_pretrained_once_and_is_an_ordinary_folder(tmp_path, monkeypatch):
    model, tokenizer = recipe().load(tmp_path)
    (folder,) = [path for path in (tmp_path / "models").iterdir() if path.is_dir()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.json"} <= {
        path.name for path in folder.iterdir()
    }
    monkeypatch.setattr("clbench.models.tiny.pretrain", lambda *_, **__: pytest.fail("pretrained twice"))
    again, _ = recipe().load(tmp_path)
    ids = torch.tensor([tokenizer("the dog")["input_ids"]])
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for other in (again, plain):
        assert torch.equal(model(ids).logits, other(ids).logits)
    plain_ids = AutoTokenizer.from_pretrained(folder)("a cat")["input_ids"]
    assert tokenizer("a cat")["input_ids"] == plain_ids and plain_ids[0] == tokenizer.bos_token_id


def test_pretraining_by_two_threads_is_pretraining_on_whole_batches(tmp_path):
    # Windows of 8 hold one or two sentences, so that the halves of a batch have different numbers of targets.
    settings = {"steps": 6, "batch_size": 5, "length": 8, "lr": 1e-2, "seed": 0}
    made, whole = (
        fresh_llama(word_tokenizer(Text().vocabulary()), architecture=recipe().architecture, seed=0) for _ in "ab"
    )
    texts, pad = [[1, 4, 5, 2], [1, 6, 7, 8, 9, 4, 2], [1, 4, 2]] * 9, 3
    last = pretrain(made, texts, label="toy", pad=pad, **settings)
    pieces = packed(texts, length=8, pad=pad)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0.01)
    batches = orders(len(pieces), batch_size=5, seed=0)
    for step in range(6):
        batch = pieces[next(batches)]
        logits = whole(input_ids=batch).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), ignore_index=pad)
        optimizer.param_groups[0]["lr"] = 1e-2 * warm_cosine(step, steps=6)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        optimizer.step()
    assert last == pytest.approx(loss.item(), rel=1e-5)
    for one, other in zip(made.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_equal_recipes_give_equal_weights(tmp_path):
    first, _ = recipe().load(tmp_path / "a")
    second, _ = recipe().load(tmp_path / "b")
    other, _ = recipe(seed=1).load(tmp_path / "c")
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("changed", [{"steps": 4}, {"seed": 1}, {"lr": 2e-2}, {"corpus": Text(lines=42)}])
def test_whatever_determines_the_weights_is_in_the_fingerprint(changed):
    assert recipe(**changed).settings_hash != recipe().settings_hash
    assert recipe(label="other").settings_hash == recipe().settings_hash


def test_a_bpe_tokenizer_reads_and_writes_any_text(tmp_path):
    _, tokenizer = recipe(tokenizer="bpe", vocabulary_size=300).load(tmp_path)
    text = "Größe 东 42!"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text
    assert tokenizer.bos_token and tokenizer.eos_token and tokenizer.pad_token


@pytest.mark.parametrize("kind", [{}, {"tokenizer": "bpe", "vocabulary_size": 300}])
def test_the_configuration_is_known_before_the_model_is_made(kind, tmp_path):
    stated = recipe(**kind).configuration(tmp_path).to_dict()
    assert not [*tmp_path.iterdir()]
    of_weights = {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "_name_or_path": None}
    kept = recipe(**kind).made(tmp_path).configuration(tmp_path).to_dict()
    assert {key: value for key, value in kept.items() if key not in of_weights} == {
        key: value for key, value in stated.items() if key not in of_weights
    }


def test_windows_hold_whole_texts_and_cut_only_longer_ones():
    assert packed([[1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [11]], length=4, pad=0).tolist() == [
        [1, 2, 3, 0],
        [4, 5, 0, 0],
        [6, 7, 8, 9],
        [10, 11, 0, 0],
    ]


def test_a_model_that_is_not_there_is_a_mistake(tmp_path):
    with pytest.raises(UserMistake, match="nonesuch"):
        Pretrained(label="x", name=str(tmp_path / "nonesuch")).load(Path(tmp_path))


def test_a_models_own_settings_leave_answers_the_likeliest_tokens_and_end_them(tmp_path):
    model, tokenizer = recipe(architecture=recipe().architecture | {"initializer_range": 0.5}).load(tmp_path)
    (folder,) = [path for path in (tmp_path / "models").iterdir() if path.is_dir()]
    ids = [tokenizer.bos_token_id, *tokenizer("the dog")["input_ids"]]
    likeliest = list(ids)
    for _ in range(6):
        likeliest.append(int(model(torch.tensor([likeliest])).logits[0, -1].argmax()))
    written = likeliest[len(ids) :]
    assert tokenizer.eos_token_id not in written
    another_end = next(token for token in written if token != written[0])
    settings = {"repetition_penalty": 5.0, "do_sample": True, "temperature": 9.0}
    for ends, expected in (
        (None, written),
        ([tokenizer.eos_token_id, another_end], written[: written.index(another_end)]),
    ):
        GenerationConfig(**settings, eos_token_id=ends).save_pretrained(folder)
        loaded, _ = Pretrained(label="x", name=str(folder)).load(tmp_path)
        student = Student(loaded, Encoder(tokenizer, max_length=16))
        assert student.write([tuple(ids)], max_new_tokens=6) == [expected]


def test_a_bfloat16_base_keeps_the_frequencies_of_its_rotary_embeddings(overrides):
    config = compose([*overrides, "engine.dtype=bfloat16"])
    model = load_model(config, instantiate(config.model, _convert_="all"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    frequencies = model.model.rotary_emb.inv_freq
    width = model.config.hidden_size // model.config.num_attention_heads
    expected = torch.tensor([10000 ** (-2 * pair / width) for pair in range(width // 2)])
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("heads", "device", "attention"), [(1, "cuda", "eager"), (2, "cuda", "sdpa"), (1, "cpu", "sdpa")]
)
def test_one_head_of_keys_keeps_off_the_kernel_of_cuda_that_gives_wrong_numbers(monkeypatch, heads, device, attention):
    stated = {
        "vocab_size": 9,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = AutoConfig.for_model("llama", **stated, num_key_value_heads=heads)
    model = AutoModelForCausalLM.from_config(config)
    monkeypatch.setattr(model, "to", lambda _: model)  # there may be no CUDA device
    assert placed(model, torch.device(device)).config._attn_implementation == attention


@pytest.mark.parametrize(
    ("kind", "settings", "is_one"), [("gpt_bigcode", {"multi_query": True}, True), ("gpt2", {}, False)]
)
def test_one_head_of_keys_is_seen_by_whatever_name_the_configuration_has_for_it(monkeypatch, kind, settings, is_one):
    stated = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **stated, **settings))
    assert has_one_key_head(model) == is_one
    monkeypatch.setattr(model, "to", lambda _: model)
    assert (placed(model, torch.device("cuda")).config._attn_implementation == "eager") == is_one
