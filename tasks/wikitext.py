"""WikiText-2 (raw) as text: of its test split, 62 articles, some to pretrain a tiny model on and the others to measure perplexity on; of its
train split what methods replay.

A row is `{"page": " = Robert Boulter = \\n \\n Robert Boulter is an English film , television and theatre actor . ..."}`. Perplexity of a
published model is measured on the whole test split (`split="all"`); a model that was pretrained here on its first articles
(`split="train"`) is measured on the articles it has not read (`split="heldout"`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clbench.data.rows import DatasetSpec, load_rows, place
from clbench.types import UserMistake
from tasks.hub import bucket

DATASET = DatasetSpec(
    name="wikitext2_raw_documents",
    hub="EleutherAI/wikitext_document_level",
    config="wikitext-2-raw-v1",
    revision="main",
)
PRETRAINING_ARTICLES = 50


def dataset() -> DatasetSpec:
    """Where they come from, for a yaml to name."""
    return DATASET


def articles(*, data_dir: str | None, split: str) -> list[str]:
    """The articles of the test split: "train" (the first 50), "heldout" (the rest) or "all"."""
    pages = pages_of("test", data_dir=data_dir)
    parts = {"train": pages[:PRETRAINING_ARTICLES], "heldout": pages[PRETRAINING_ARTICLES:], "all": pages}
    if split not in parts:
        raise UserMistake(
            f"split={split!r} of WikiText is unknown; choose one of {', '.join(parts)} (conf/model, conf/probe)"
        )
    return parts[split]


def general_texts(seed: int, *, texts: int, data_dir: str | None) -> list[str]:
    """At most `texts` articles of the train split, which no probe reads; `seed` decides which."""
    pages = pages_of("train", data_dir=data_dir)
    order = sorted(range(len(pages)), key=lambda number: bucket(seed, "general text", number))
    return [pages[number] for number in order[:texts]]


def pages_of(split: str, *, data_dir: str | None) -> list[str]:
    """The articles of one of the dataset's own splits; raises UserMistake where a row holds none."""
    pages: list[Any] = [row.get("page") for row in load_rows(DATASET, split=split, data_dir=data_dir)]
    for number, page in enumerate(pages):
        if not isinstance(page, str) or not page.strip():
            where = place(DATASET, split=split, data_dir=data_dir, row=number)
            raise UserMistake(f"{where}: column 'page' is missing or empty; the text of an article is due")
    return pages


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The articles that a tiny model is pretrained on."""

    data_dir: str | None

    def texts(self) -> Sequence[str]:
        return articles(data_dir=self.data_dir, split="train")

    def vocabulary(self) -> Sequence[str]:
        """No word list: the tokenizer is trained on the text."""
        return ()
