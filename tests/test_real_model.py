"""A pretrained model from the folder in CLBENCH_MODEL, on the real rows in CLBENCH_DATA: what lm-eval's own class and float64 say of it."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from clbench.data.encoder import Encoder
from clbench.examine.student import Student
from tests.test_knowledge import assert_equal_item_by_item, probe

MODEL, ROWS = os.environ.get("CLBENCH_MODEL"), os.environ.get("CLBENCH_DATA")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL and ROWS), reason="CLBENCH_MODEL and CLBENCH_DATA do not both name a folder"),
]


@pytest.fixture(scope="module")
def student() -> Student:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return Student(model, Encoder(AutoTokenizer.from_pretrained(MODEL), max_length=256))


def test_every_item_is_right_or_wrong_as_lm_evals_own_class_says(student):
    tasks = ["hellaswag", "piqa", "arc_challenge"]
    assert_equal_item_by_item(student, probe(Path(ROWS), *tasks, items=dict.fromkeys(tasks, 6)))


def test_log_likelihoods_are_within_1e_4_nats_a_token_of_float64(student):
    (row,) = probe(Path(ROWS), "hellaswag", items={"hellaswag": 3}).ledger_rows
    tokenizer = student.encoder.tokenizer
    pairs = []
    for request in row.tasks[0].instances:
        context, continuation = request.args
        whole = tokenizer(context + continuation).input_ids
        start = len(tokenizer(context).input_ids)
        pairs.append((tuple(whole[:start]), tuple(whole[start:])))
    found = student.log_likelihoods(pairs, max_length=1024)
    exact = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64).eval()
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        with torch.inference_mode():
            logits_TV = exact(torch.tensor([context + continuation]), logits_to_keep=len(continuation) + 1).logits[0]
        expected = logits_TV[:-1].log_softmax(-1)[range(len(continuation)), list(continuation)].sum()
        assert value == pytest.approx(float(expected), abs=1e-4 * len(continuation))
