"""WikiText-2 (raw, test split, 62 articles) as text: some articles to pretrain a tiny model on, the others to measure perplexity on.

A row is `{"page": " = Robert Boulter = \\n \\n Robert Boulter is an English film , television and theatre actor . ..."}`. Perplexity of a
published model is measured on the whole split (`split="all"`); a model that was pretrained here on the first articles
(`split="train"`) is measured on the articles it has not read (`split="heldout"`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clbench.data.rows import DatasetSpec, load_rows, place
from clbench.types import UserMistake

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
    """The articles of `split`: "train" (the first 50), "heldout" (the rest) or "all"."""
    pages: list[Any] = [row.get("page") for row in load_rows(DATASET, split="test", data_dir=data_dir)]
    for number, page in enumerate(pages):
        if not isinstance(page, str) or not page.strip():
            where = place(DATASET, split="test", data_dir=data_dir, row=number)
            raise UserMistake(f"{where}: column 'page' is missing or empty; the text of an article is due")
    parts = {"train": pages[:PRETRAINING_ARTICLES], "heldout": pages[PRETRAINING_ARTICLES:], "all": pages}
    if split not in parts:
        raise UserMistake(
            f"split={split!r} of WikiText is unknown; choose one of {', '.join(parts)} (conf/model, conf/probe)"
        )
    return parts[split]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The articles that a tiny model is pretrained on."""

    data_dir: str | None

    def texts(self) -> Sequence[str]:
        return articles(data_dir=self.data_dir, split="train")

    def vocabulary(self) -> Sequence[str]:
        """No word list: the tokenizer is trained on the text."""
        return ()
