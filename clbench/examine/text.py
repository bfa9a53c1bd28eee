"""What probes of running text have in common: the text, its name in the ledger, where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clbench.data.rows import DatasetSpec
from clbench.protocols import Probe


class TextProbe(Probe):
    """A probe of `texts`. `task` names them in the ledger, `dataset` says where they come from (None: they are made here)."""

    def __init__(self, *, name: str, task: str, texts: Sequence[str], dataset: DatasetSpec | None = None) -> None:
        self.name = name
        self.task = task
        self.texts = tuple(texts)
        self.dataset = dataset

    def datasets(self) -> Sequence[DatasetSpec]:
        """The dataset of the texts."""
        return () if self.dataset is None else (self.dataset,)

    def documents(self) -> Mapping[str, Sequence[str]]:
        """The texts, whole."""
        return {self.task: self.texts}
