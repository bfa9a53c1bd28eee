"""What results/README.md says of speed is what was measured."""

import math

import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.benchmarks import real
from tests.benchmarks.__main__ import BEGIN, CSV, END, NAMES, PAGE, table
from tests.benchmarks.models import Subject
from tests.benchmarks.race import fastest, figure, race


def test_the_page_shows_the_table_of_the_csv():
    shown = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()
    assert shown == table()
    assert set(pd.read_csv(CSV)["benchmark"]) <= set(NAMES)


def test_a_race_is_against_the_fastest_peer_and_in_medians():
    ticks = iter([0, 2, 10, 14, 20, 29, 30, 34, 40, 48, 50, 53, 60, 61, 70, 74, 80, 82])
    raced = race(
        lambda: 1,
        {"slow": lambda: 1, "fast": lambda: 1},
        same=lambda a, b: abs(a - b),
        repetitions=3,
        clock=lambda: next(ticks),
    )
    # Ours 2, 4, 1; slow 4, 8, 4; fast 9, 3, 2.
    found = figure("b", "c", raced=raced, wanted=">= 1", unit="s")
    assert (found.peer, found.ours, found.theirs, found.ratio) == ("fast", 2, 3, 1.5)
    assert math.isclose(found.ours_spread, 0.75)


def test_of_the_peers_that_are_tried_the_one_that_takes_least_is_raced():
    ticks = iter([0, 5, 10, 12, 20, 23])
    assert fastest(dict.fromkeys(("a", "b", "c"), lambda: None), clock=lambda: next(ticks)) == "b"


def test_a_peer_that_gives_other_results_stops_the_race():
    def same(found, expected):
        raise AssertionError

    try:
        race(lambda: 1, {"peer": lambda: 2}, same=same, repetitions=1)
    except AssertionError:
        return
    raise RuntimeError


@pytest.mark.slow
def test_a_tiny_model_of_the_real_ones_kind_passes_every_race():
    def tiny() -> PreTrainedModel:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "gemma3_text",
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            sliding_window=64,
            layer_types=["sliding_attention", "full_attention"],
            initializer_range=0.2,
        )
        return AutoModelForCausalLM.from_config(config).eval()

    found = list(real.run(Subject(name="tiny", make=tiny, vocabulary=512)))
    assert {figure.benchmark for figure in found} == {"real"}
    work = {figure.case.partition(",")[0] for figure in found}
    assert work == {"scoring", "training", "writing", "stream", "precision"}
    assert all(figure.ratio > 0 for figure in found)
