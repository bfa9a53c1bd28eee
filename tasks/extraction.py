"""Questions answered by a span of the passage, scored by shared words as in SQuAD.

A row of Super-NaturalInstructions task 002 (Quoref):
    {"definition": "...", "inputs": "Passage: ... \\nQuestion: ...", "targets": "..."}
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from clbench.types import Example
from tasks.hub import TextTask, accepted

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(kw_only=True)
class Extraction(TextTask):
    """`answer` is the column with the span."""

    metric: Literal["token_f1"]

    def score(self, example: Example, answer: str) -> float:
        """Token F1 in [0, 1] against the reference that fits best."""
        return max(token_f1(answer, reference) for reference in accepted(example))

    def corpus_scores(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
        """Share of answers whose words are exactly those of a reference, in order."""
        pairs = zip(examples, answers, strict=True)
        exact = [words(answer) in map(words, accepted(example)) for example, answer in pairs]
        return {"exact_match": sum(exact) / len(exact)}


def words(text: str) -> list[str]:
    """The words of `text` in lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words shared, counted with repetition, in [0, 1].

    >>> token_f1("the old king", "King Lear")
    0.5
    """
    given, right = words(answer), words(reference)
    if not given or not right:
        return float(given == right)
    shared = (Counter(given) & Counter(right)).total()
    return 2 * shared / (len(given) + len(right))
