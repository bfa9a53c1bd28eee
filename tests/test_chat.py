"""Prompts in a chat template: transformers' own tokens in training and examination, and lm-eval's own requests in the probes."""

import json
from dataclasses import replace

import pytest
from tokenizers import AddedToken

from clbench.config.composition import compose
from clbench.data.chat import asked
from clbench.data.encoder import Encoder
from clbench.examine.canaries import check_stream
from clbench.examine.canaries.own_model import check_model
from clbench.examine.student import Student
from clbench.experiment import run
from clbench.models.folding import folded
from clbench.models.tiny import bpe_tokenizer, fresh_llama, word_tokenizer
from clbench.record.runs import read_runs
from clbench.types import Example, UserMistake
from tasks.world_words import VOCABULARY
from tests.conftest import QUIET, TINY_STREAM
from tests.test_canaries import LINES, colours, numbers, stream_of
from tests.test_tokens import KINDS, tokenizer_like

# As the tokenizers of Qwen, Llama-3, Llama-2 and Vicuna have them: with and without BOS, with a system's message, with a space before an answer, and
# without any special token.
TEMPLATES = {
    "chatml": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "headers": "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
    "inst": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% elif m.role == 'user' %}"
    "{{ bos_token }}[INST] {{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
    "words": "\n  {% set here = 1 %}\n It is {{ strftime_now('%Y') }}. {% for m in messages %}{{ 'USER' if m.role == 'user' else 'ASSISTANT' }}: {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
}
MARKS = ("<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>")


def chatting(template: str, tokenizer=None):
    tokenizer = tokenizer or bpe_tokenizer(LINES, 300)
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS], special_tokens=True)
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def own_ids(tokenizer, question, *answer):
    """What transformers gives, of a template that says the year of clbench's fixed day."""
    messages = [{"role": "user", "content": question}, *({"role": "assistant", "content": one} for one in answer)]
    settings = {"add_generation_prompt": not answer, "return_dict": False}
    template = tokenizer.chat_template.replace("strftime_now('%Y')", "2024")
    return tuple(tokenizer.apply_chat_template(messages, chat_template=template, **settings))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("question", ["Does the dog bark?", "Text: a man\nAnswer:"])
def test_a_prompt_has_the_tokens_of_the_tokenizers_own_template_and_the_answer_follows_it(kind, template, question):
    tokenizer = chatting(template, tokenizer_like(kind))
    encoder = Encoder(tokenizer, max_length=200, chat=True)
    prompt, whole = own_ids(tokenizer, question), own_ids(tokenizer, question, "the old man.")
    encoded = encoder.example(Example(id="0", prompt=question, answer="the old man."))
    assert encoded.ids[: encoded.answer_start] == encoder.prompt(question) == prompt
    answer = encoded.ids[encoded.answer_start : -1]
    assert encoded.ids[-1] == tokenizer.eos_token_id and answer == encoder.answer("the old man.")
    if template != "words":  # whose own space the tokenizer may merge with the answer
        assert whole[: len(prompt) + len(answer)] == (*prompt, *answer)
    assert prompt[: len(encoder.begin)] == encoder.begin and prompt[len(prompt) - len(encoder.end) :] == encoder.end
    assert encoder.begin and encoder.end and len(encoder.begin) + len(encoder.end) < len(prompt)
    assert prompt.count(tokenizer.bos_token_id) == asked(tokenizer, question).count(tokenizer.bos_token)


@pytest.mark.parametrize("cut", ["left", "middle"])
def test_a_long_question_is_cut_inside_its_message(cut):
    tokenizer = chatting("chatml")
    encoder = Encoder(tokenizer, max_length=80, cut=cut, chat=True)
    example = Example(id="0", prompt=" ".join(LINES[:30]), answer="red")
    ids = encoder.example(example).ids
    assert len(ids) == 80 < len(encoder.prompt(example.prompt))
    assert ids[: len(encoder.begin)] == encoder.begin
    end = len(ids) - len(encoder.answer("red")) - 1
    assert ids[end - len(encoder.end) : end] == encoder.end
    assert not Encoder(tokenizer, max_length=encoder.frame + 1, chat=True).fits("red")
    shortest = encoder.frame + len(encoder.answer("red")) + 1
    bare = Encoder(tokenizer, max_length=shortest, cut=cut, chat=True).example(example).ids
    assert bare[: encoder.frame] == (*encoder.begin, *encoder.end)


def test_running_text_stays_as_it_is():
    tokenizer = chatting("headers")
    encoder = Encoder(tokenizer, max_length=80, chat=True)
    assert encoder.prompt("") == (tokenizer.bos_token_id,)
    assert encoder.text("the dog") == Encoder(tokenizer, max_length=80).text("the dog")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template; choose prompt=plain"),
        ("{{ raise_exception('not me') }}", r"cannot be used \(not me\)"),
    ],
)
def test_a_tokenizer_without_a_template_that_can_be_used_is_refused_in_one_line(template, said):
    tokenizer = bpe_tokenizer(LINES, 300)
    tokenizer.chat_template = template
    with pytest.raises(UserMistake, match=said) as refused:
        Encoder(tokenizer, max_length=80, chat=True)
    assert "\n" not in str(refused.value)


class Doubled(Encoder):
    """A second BOS, as comes of tokenizing a rendered chat like any text."""

    def prompt(self, prompt):
        return (self.tokenizer.bos_token_id, *super().prompt(prompt))


class Unasked(Encoder):
    """Another template in training than in examination."""

    def example(self, example):
        return super().example(replace(example, prompt=f"{example.prompt} Think."))


class Raw(Encoder):
    """The question as it stands, in training and examination alike."""

    def prompt(self, prompt):
        return (*self.begin, *self.text(prompt))


@pytest.mark.parametrize("template", ["chatml", "headers"])
@pytest.mark.parametrize(
    ("kind", "failed"),
    [(Encoder, set()), (Doubled, {"bos", "template"}), (Unasked, {"prompt", "template"}), (Raw, {"template"})],
)
@pytest.mark.parametrize("task", [colours, numbers])
def test_another_prompt_than_the_templates_is_noticed(template, kind, failed, task):
    encoder = kind(chatting(template), max_length=128, chat=True)
    found = check_stream(stream_of(task(), encoder=encoder, rows=24), encoder, rows=16)
    wrong = {one.name for one in found if not one.passed}
    assert "template" in {one.name for one in found} and wrong == failed, [one for one in found if not one.passed]


def test_plain_prompts_have_no_canary_about_a_template():
    encoder = Encoder(bpe_tokenizer(LINES, 300), max_length=128)
    assert "template" not in {one.name for one in check_stream(stream_of(colours(), encoder=encoder), encoder, rows=4)}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_fast_way_of_reading_chats_equals_plain_forwards(template):
    encoder = Encoder(chatting(template), max_length=128, chat=True)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = fresh_llama(encoder.tokenizer, architecture=size | {"initializer_range": 0.2}, seed=0).eval()
    stream = stream_of(colours(), numbers(), encoder=encoder, rows=8)
    gaps = check_model(Student(model, encoder), stream, folded=folded(model))
    assert {gap.name for gap in gaps if gap.failed} == set(), gaps


def test_a_run_in_a_chat_says_so_and_shares_no_score_with_a_plain_one(tmp_path):
    tokenizer = chatting("headers", word_tokenizer(VOCABULARY))
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    fresh_llama(tokenizer, architecture=size, seed=0).save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    places = (f"results_dir={tmp_path / 'results'}", f"cache_dir={tmp_path}", "train.max_length=64")
    given = [f"model.name={tmp_path / 'mine'}", "+model.world_seed=0", *TINY_STREAM, *QUIET, *places]
    paths = [run(compose([*given, f"prompt={prompt}"])) for prompt in ("plain", "chat")]
    plain, chat = (json.loads((path / "manifest.json").read_text()) for path in paths)
    assert (plain["model"], chat["model"]) == ("mine", "mine+chat") and chat["config"]["prompt"] == "chat"
    assert plain["untouched_measured_by"] == plain["run"] != chat["run"] == chat["untouched_measured_by"]
    names = {one["name"] for one in chat["canaries"]["results"]}
    assert names - {one["name"] for one in plain["canaries"]["results"]} == {"template"}
    assert not chat["canaries"]["failed"]
    assert {*read_runs(tmp_path / "results").runs["problem"]} == {""}
