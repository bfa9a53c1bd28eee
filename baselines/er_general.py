"""ER with general text: experience replay that draws from rows of a general dataset, too, from the first stage on.

Loss and memory as in ER; rows are drawn from those of past tasks and from `texts`, of which every token after the first is an answer. So the base's
own kind of text is rehearsed with the tasks. TRACE's replay (arXiv 2310.06762, section 4.3.1) mixes its alignment data (LIMA) in this way, once
after the task; here rows are drawn in every step, as in ER. The text must not be what a probe reads.

Official code: BeyonderXX/TRACE. Deviations: interleaved; the text's share of the memory follows from its number of rows.

Card:
- paper: arXiv 2310.06762 section 4.3.1
- trainable: rank (in + out) per layer
- memory: fraction of each task's rows and the general rows, as text
- compute: 1 + ratio times the rows per step
- deviations: interleaved
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import PositiveInt

from baselines.er import Er
from clbench.types import Example


def beginnings(texts: Sequence[str], *, words: int) -> list[str]:
    """The first `words` words of each text."""
    return [" ".join(text.split()[:words]) for text in texts]


def as_rows(texts: Sequence[str]) -> tuple[Example, ...]:
    """Each text that is not empty as an example that has no prompt, so that all of it is trained on."""
    return tuple(Example(id=f"general/{number}", prompt="", answer=text) for number, text in enumerate(texts) if text)


@dataclass(kw_only=True)
class ErGeneral(Er):
    """ER that also replays the beginnings of `texts`, of at most `words` words each; `capacity` counts rows of tasks alone."""

    texts: Sequence[str]
    words: PositiveInt

    def documents(self) -> Sequence[str]:
        return beginnings(self.texts, words=self.words)

    def replayed(self) -> list[Example]:
        return [*as_rows(self.documents()), *super().replayed()]
