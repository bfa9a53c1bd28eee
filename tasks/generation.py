"""Free text with one or more references: data-to-text, summaries, dialogue; ROUGE-L per answer, BLEU over the corpus.

A row of e2e_nlg; several rows share a meaning representation:
    {"meaning_representation": "name[...], eatType[pub]", "human_reference": "... is a pub."}
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from clbench.types import Example
from tasks.hub import TextTask, accepted, ragged

ROUGE = RougeScorer(["rougeL"], use_stemmer=True)
"""English: its tokenizer keeps a-z and 0-9 only."""


@dataclass(kw_only=True)
class Generation(TextTask):
    """`answer` is the column with the text to write."""

    metric: Literal["rougeL", "rougeL_stemmed"]

    def score(self, example: Example, answer: str) -> float:
        """ROUGE-L F-measure with stemming, in [0, 1], against the reference that fits best."""
        return max(ROUGE.score(reference, answer)["rougeL"].fmeasure for reference in accepted(example))

    def corpus_scores(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
        """Corpus BLEU over all references (nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp), sacrebleu's value / 100."""
        return {"corpus_bleu": BLEU().corpus_score(list(answers), ragged(examples)).score / 100}
