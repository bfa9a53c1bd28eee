"""Translation, scored by chrF per sentence and by BLEU and chrF over the corpus (sacrebleu).

A row of news_commentary de-en:
    {"translation": {"de": "...", "en": "..."}}
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from clbench.types import Example
from tasks.hub import HubTask, Row, accepted, ragged, render, text_at


@dataclass(kw_only=True)
class Translation(HubTask):
    """`source` and `target` are the columns of the two languages; the target must be one with spaces between words.

    `script` is that of its letters, the first word of their Unicode names: corpora have rows in a third language.
    """

    metric: Literal["chrf"]
    source: str
    target: str
    script: str = "LATIN"

    @property
    def answer_columns(self) -> tuple[str, ...]:
        return (self.target,)

    def example(self, row: Row, *, id: str) -> Example:
        source, target = (text_at(row, column) for column in (self.source, self.target))
        return Example(id=id, prompt=render(self.template, row), answer=target, source=source)

    def is_valid(self, example: Example, answer: str) -> bool:
        """Whether there is text, and at least half of its letters are of the target's script."""
        letters = [unicodedata.name(character, "") for character in answer if character.isalpha()]
        return bool(answer.strip()) and 2 * sum(name.split()[:1] == [self.script] for name in letters) >= len(letters)

    def score(self, example: Example, answer: str) -> float:
        """chrF2 of one sentence, in [0, 1]: nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no."""
        return CHRF().sentence_score(answer, list(accepted(example))).score / 100

    def corpus_scores(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
        """Corpus BLEU (nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp) and corpus chrF2, sacrebleu's values / 100."""
        references = ragged(examples)
        return {
            "corpus_bleu": BLEU().corpus_score(list(answers), references).score / 100,
            "corpus_chrf": CHRF().corpus_score(list(answers), references).score / 100,
        }
