"""What was answered once is not computed again, and anything that could change an answer makes it another one."""

import ast
import copy

import pytest
import torch

import clbench.student
from clbench import cells
from clbench.adapters import Lora, folded
from clbench.cells import CachedStudent, model_key
from clbench.data import Encoder
from tests.test_data import Words
from tests.test_packing import model

ASKED = [((1, 5, 6), (7, 8)), ((1, 5, 6), (9,)), ((1, 4), (3,))]


class Decodable(Words):
    class backend_tokenizer:
        @staticmethod
        def to_str():
            return "words"

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def llama():
    return model("llama")


def student(subject, folder, **changes):
    settings = {"cells": folder, "key": model_key(subject)} | changes
    return CachedStudent(subject, Encoder(Decodable(), max_length=32), **settings)


def forwards(monkeypatch):
    """Counts what is computed from here on."""
    calls = []
    plain, decode = clbench.student.Student._states, clbench.student.decode

    def states(self, reads):
        calls.append(len(reads))
        return plain(self, reads)

    monkeypatch.setattr(clbench.student.Student, "_states", states)
    monkeypatch.setattr(clbench.student, "decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    return calls


def test_equal_weights_answer_equal_questions_once(llama, tmp_path, monkeypatch):
    first = student(llama, tmp_path)
    scored = first.log_likelihoods(ASKED)
    written = first.generate([(1, 5), (1, 6, 7)], max_new_tokens=4)
    plain = clbench.student.Student(llama, first.encoder)
    assert (scored, written) == (plain.log_likelihoods(ASKED), plain.generate([(1, 5), (1, 6, 7)], max_new_tokens=4))
    calls = forwards(monkeypatch)
    again = student(copy.deepcopy(llama), tmp_path)
    assert again.log_likelihoods(ASKED) == scored
    assert again.generate([(1, 5), (1, 6, 7)], max_new_tokens=4) == written
    assert calls == [] and again.tokens_scored == first.tokens_scored == plain.tokens_scored > 0


def test_whatever_could_change_an_answer_makes_it_another_cell(llama, tmp_path, monkeypatch):
    student(llama, tmp_path).log_likelihoods(ASKED)
    student(llama, tmp_path).generate([(1, 5)], max_new_tokens=4)
    calls = forwards(monkeypatch)
    moved = copy.deepcopy(llama)
    with torch.no_grad():
        moved.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
    student(moved, tmp_path).log_likelihoods(ASKED)
    student(llama, tmp_path).log_likelihoods([*ASKED[:2], ((1, 4), (4,))])
    student(llama, tmp_path).log_likelihoods([*ASKED[:2], ((1, 5), (3,))])
    student(llama, tmp_path).generate([(1, 5)], max_new_tokens=5)
    assert len(calls) == 4
    monkeypatch.setattr(cells, "code", lambda: "changed")
    student(llama, tmp_path).log_likelihoods(ASKED)
    assert len(calls) == 5
    other = copy.deepcopy(llama)
    other.config.rope_theta = 5.0
    assert model_key(other) != model_key(llama)


def test_adapters_that_do_nothing_yet_are_the_untouched_model(llama):
    adapted = Lora(rank=2, alpha=4, targets=["q_proj"]).add(copy.deepcopy(llama), seed=0)
    assert model_key(adapted) is None  # at work beside the weights, not in them
    with folded(adapted):
        assert model_key(adapted) == model_key(llama)
    with torch.no_grad():
        adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight += 0.1
    with folded(adapted):
        assert model_key(adapted) not in (None, model_key(llama))


def test_half_a_cell_is_no_cell(llama, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(self, target):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.PosixPath.replace", killed)
        with pytest.raises(Killed):
            student(llama, tmp_path).log_likelihoods(ASKED)
    assert not list(tmp_path.glob("*/[!.]*.json"))
    student(llama, tmp_path).log_likelihoods(ASKED)
    assert len(list(tmp_path.glob("*/[!.]*.json"))) == 1


def test_all_that_computes_an_answer_is_part_of_its_key():
    apart = {"adapters", "cur", "data", "sharding", "types"}  # what they give is in the key: weights, token ids
    for module in cells.COMPUTING:
        named = {node.module for node in ast.walk(ast.parse(cells.source(module))) if isinstance(node, ast.ImportFrom)}
        used = {name.split(".")[1] for name in named if name and name.startswith("clbench.")}
        assert used <= apart | {each.__name__.split(".")[1] for each in cells.COMPUTING}, module
