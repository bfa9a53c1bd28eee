"""Answers that vLLM writes: with the weights under examination and no others; vLLM itself where it is installed, a stand-in elsewhere."""

import importlib.util
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from clbench.adapters import folded
from clbench.config import check, run_hash
from clbench.student import Student
from clbench.types import UserMistake
from clbench.vllm_writer import VllmWriter
from tests import test_methods as methods

NAMES = ["base", "seq", "ilora", "olora", "curlora", "secura", "seq_merge", "seq_full"]


class StandIn:
    """Keeps weights and a prefix cache as vLLM does, and writes with transformers: by the weights it had when it last saw the prompt."""

    def __init__(self, folder, settings):
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
        self.settings = settings
        self.cache = {}

    def collective_rpc(self, name, kwargs):
        assert name == "reload_weights"
        self.model.load_state_dict(dict(kwargs["weights_iterator"]))

    def reset_prefix_cache(self):
        self.cache.clear()
        return True

    @torch.no_grad()
    def generate(self, asked, greedy, use_tqdm):
        return [self.answer(tuple(each["prompt_token_ids"]), greedy) for each in asked]

    def answer(self, prompt, greedy):
        key = (prompt, greedy.max_tokens)
        if key not in self.cache:
            written = []
            while len(written) < greedy.max_tokens and not set(written) & set(greedy.stop_token_ids):
                logits = self.model(input_ids=torch.tensor([[*prompt, *written]])).logits[0, -1].float()
                written.append(int(logits.argmax()))
            self.cache[key] = SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=written)], prompt_logprobs=self.read(prompt)
            )
        return self.cache[key]

    def read(self, prompt):
        logprobs = self.model(input_ids=torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        return [None, *({t: SimpleNamespace(logprob=float(logprobs[i, t]))} for i, t in enumerate(prompt[1:]))]


@pytest.fixture
def stand_in(monkeypatch):
    started = []

    def llm(model, **settings):
        started.append(StandIn(model, settings))
        return started[-1]

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "vllm" or found(name, *rest))
    module = SimpleNamespace(LLM=llm, SamplingParams=SimpleNamespace, __version__="0")
    monkeypatch.setitem(sys.modules, "vllm", module)
    return started


def prompts(toy):
    return [toy.run.encoder.prompt(example.prompt) for example in toy.stage(1).train[:4]]


def check_answers(toy, writer):
    """vLLM's answers are ours before training, after it, and in every view."""
    seen = []
    for number in (0, 1, 2):
        if number and methods.trainable(toy.model):
            toy.train(number)
        toy.model.eval()
        for view, weights in toy.method.views(toy.model).items():
            with weights:
                for _ in ("afresh", "again"):
                    own, other = Student(toy.model, toy.run.encoder), Student(toy.model, toy.run.encoder, writer=writer)
                    expected = own.write(prompts(toy), max_new_tokens=6)
                    assert other.write(prompts(toy), max_new_tokens=6) == expected, (number, view)
                    assert other.tokens_scored == sum(map(len, prompts(toy))) + sum(map(len, expected))
                seen.append(expected)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_a_stand_in_for_vllm_writes_what_the_examined_weights_say(name, stand_in):
    toy = methods.lab(name, "engine.generation=vllm", "train.lr=0.05")
    before = methods.everything(toy.model)
    seen = check_answers(toy, VllmWriter({"enforce_eager": True}))
    assert (
        len(stand_in) == 1 and stand_in[0].settings["enforce_eager"] and stand_in[0].settings["load_format"] == "dummy"
    )
    if name == "base":
        assert all(torch.equal(now, before[key]) for key, now in methods.everything(toy.model).items())
    elif name not in ("curlora", "olora"):
        assert seen[0] != seen[-1], "training changed no answer, so nothing was shown"


@pytest.mark.parametrize("fault", ["kept weights", "kept cache"])
@pytest.mark.parametrize("lr", [1e-3, 0.05])
def test_weights_of_before_are_noticed(fault, lr, stand_in, monkeypatch):
    toy = methods.lab("seq_full", "engine.generation=vllm", f"train.lr={lr}")
    writer = VllmWriter({})
    Student(toy.model, toy.run.encoder, writer=writer).write(prompts(toy), max_new_tokens=3)
    toy.train(1)
    toy.model.eval()
    monkeypatch.setattr(
        StandIn, {"kept weights": "collective_rpc", "kept cache": "reset_prefix_cache"}[fault], lambda *_, **__: None
    )
    with pytest.raises(AssertionError):
        Student(toy.model, toy.run.encoder, writer=writer).write(prompts(toy), max_new_tokens=3)


def test_folded_models_are_written_as_they_are(stand_in):
    toy = methods.lab("seq", "engine.generation=vllm", "train.lr=0.05")
    toy.train(1)
    toy.model.eval()
    writer = VllmWriter({})
    alone = Student(toy.model, toy.run.encoder, writer=writer).write(prompts(toy), max_new_tokens=4)
    with folded(toy.model):
        assert Student(toy.model, toy.run.encoder, writer=writer).write(prompts(toy), max_new_tokens=4) == alone
        assert Student(toy.model, toy.run.encoder, writer=writer).write([], max_new_tokens=4) == []


def test_the_end_of_an_answer_is_left_out(stand_in, monkeypatch):
    toy = methods.lab("base", "engine.generation=vllm")
    end = toy.run.encoder.tokenizer.eos_token_id
    writer = VllmWriter({})
    student = Student(toy.model, toy.run.encoder, writer=writer)
    writer.take(student, prompts(toy))
    ended = [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]) for ids in ((7, 8, end), (7, 9), (end,))]
    monkeypatch.setattr(StandIn, "generate", lambda *_, **__: ended)
    assert student.write(prompts(toy)[:3], max_new_tokens=3) == [[7, 8], [7, 9], []]


def test_its_absence_is_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserMistake, match=r"needs the package vllm; pip install 'clbench\[vllm\]'"):
        VllmWriter({})


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("engine.generation=sglang",), "choose one of local, vllm"),
        (("engine=deepspeed", "engine.generation=vllm"), "choose engine=local"),
        (("+engine.vllm.enforce_eager=true",), "does nothing; choose engine.generation=vllm"),
        (("engine.generation=vllm", "+engine.vllm.hf_overrides={rms_norm_eps:0.1}"), "engine.vllm, of which a key"),
        (("engine.generation=vllm", "+engine.vllm.tensor_parallel_size=2"), "choose one of gpu_memory_utilization"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(overrides, line):
    with pytest.raises(UserMistake, match=line):
        check(methods.composed("seq", *overrides))


def test_runs_that_it_wrote_are_other_runs_and_all_others_keep_their_names():
    local, written = methods.composed("seq"), methods.composed("seq", "engine.generation=vllm")
    settings = methods.composed("seq", "engine.generation=vllm", "+engine.vllm.enforce_eager=true")
    assert run_hash(asdict(local)) != run_hash(asdict(written)) == run_hash(asdict(settings))


@pytest.mark.parametrize("name", NAMES)
def test_vllm_writes_what_the_examined_weights_say(name, monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed (pip install 'clbench[vllm]')")
    monkeypatch.setitem(methods.TINY, "head_dim", 32)
    toy = methods.lab(name, "engine.generation=vllm", "train.lr=0.05")
    threads = torch.get_num_threads()
    writer = VllmWriter({"enforce_eager": True, "max_model_len": 64})
    check_answers(toy, writer)
    assert torch.get_num_threads() == threads and writer.name.startswith("vllm 0.")
