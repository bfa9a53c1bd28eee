"""Simpler text for a given one, scored by SARI (Xu et al. 2016, TACL 4:401-415), as Hugging Face's `evaluate` computes it.

SARI compares three texts: what the answer keeps of the source, what it deletes and what it adds, each against what the
references keep, delete and add, in n-grams of 1 to 4 tokens. Source and answer count once per reference. Where nothing was
there to keep, delete or add (0/0) the share is 1. Tokens: lower case, sacrebleu's 13a.

A row of 20Minuten as TRACE has it; the whole prompt is the source there:
    {"prompt": "Provide a simplified version ... Paragraph:\\n...\\n\\nSimplification:", "answer": "..."}
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from clbench.types import Example
from tasks.hub import Row, TextTask, accepted, render, text_at

ORDERS = (1, 2, 3, 4)
TOKENIZER = Tokenizer13a()


@dataclass(kw_only=True)
class Simplification(TextTask):
    """`source` is the column with the text to simplify, `answer` the one with a simple version."""

    metric: Literal["sari"]

    # A reference that repeats a word less often than the source scores a little below 1.
    reference_score: ClassVar[float] = 0.98

    source: str

    def example(self, row: Row, *, id: str) -> Example:
        source, answer = (text_at(row, column) for column in (self.source, self.answer))
        return Example(id=id, prompt=render(self.template, row), answer=answer, source=source)

    def score(self, example: Example, answer: str) -> float:
        """SARI in [0, 1], as the library has it: unlike other metrics, it is bound to neither 0 nor 1.

        An empty answer scores what it rightly deletes, and 1 for n-grams that were not there to keep. A reference scores
        less than 1 where it repeats a word less often than the source, and where there are several references.
        """
        return sari(example.source, answer, accepted(example))


def sari(source: str, answer: str, references: Sequence[str]) -> float:
    """SARI in [0, 1]: the mean over n-gram orders of keep F1, deletion precision and addition F1 (eq. 1 to 9 of the paper).

    >>> sari("the big dog sat", "the dog sat", ["the dog sat"])
    1.0
    """
    texts = [tokens(text) for text in (source, answer, *references)]
    parts = [operations(*([ngrams(text, order) for text in texts])) for order in ORDERS]
    return sum(map(sum, parts)) / (3 * len(ORDERS))


def tokens(text: str) -> list[str]:
    """The tokens of `text`; an empty text has one, the empty token."""
    return TOKENIZER(text.lower()).split(" ")


def ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    """How often each run of `order` words occurs."""
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def operations(source: Counter, answer: Counter, *references: Counter) -> tuple[float, float, float]:
    """F1 of what was kept, precision of what was deleted, F1 of what was added, each in [0, 1], for n-grams of one order."""
    wanted: Counter = sum(references, Counter())
    before, after = (
        Counter({gram: count * len(references) for gram, count in text.items()}) for text in (source, answer)
    )
    kept, deleted = before & after, before - after
    keepable, rightly_kept = before & wanted, before & after & wanted
    keep = f1(mean_share(rightly_kept, kept), share(rightly_kept.total(), keepable.total()))
    delete = mean_share(deleted - wanted, deleted)
    added, addable = answer.keys() - source.keys(), wanted.keys() - source.keys()
    rightly_added = len(added & addable)
    return keep, delete, f1(share(rightly_added, len(added)), share(rightly_added, len(addable)))


def mean_share(part: Counter, whole: Counter) -> float:
    """The mean over the n-grams of `whole` of the share of each that is in `part`; 1 where there are none."""
    return share(sum(part[gram] / count for gram, count in whole.items()), len(whole))


def share(part: float, whole: float) -> float:
    """part / whole, 0/0 being 1."""
    return part / whole if whole else 1.0


def f1(precision: float, recall: float) -> float:
    """The harmonic mean, 0 where both are."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
