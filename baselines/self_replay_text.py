"""Self-replay on given text: as self_replay, with rows of general text in place of text that the model wrote.

    loss = CE(task) + strength * R,      R as in self_replay, over every token of a replayed text.

What text holds the model's outputs best is open: its own costs nothing but may be narrow, given text needs a licence. The text must not be what a
probe reads. Relatives: replay of pretraining text (arXiv 2403.08763), pretraining loss in RLHF (arXiv 2203.02155). No one paper's method.

Card:
- paper: relatives 2605.26097, 2403.08763
- trainable: rank (in + out) per layer
- memory: the texts
- compute: 1 + ratio times the rows per step, and a forward of the replayed ones without adapter
- deviations: not one paper's method
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.nn import Module

from baselines.er_general import as_rows, beginnings
from baselines.self_replay import SelfReplay


@dataclass(kw_only=True)
class SelfReplayText(SelfReplay):
    """LoRA with `strength` times R on the beginnings of `texts`, of at most `length` words; the first `rows` of them."""

    texts: Sequence[str]

    def documents(self) -> Sequence[str]:
        return beginnings(self.texts[: self.rows], words=self.length)

    def wrap(self, model: Module) -> Module:
        self.replay = as_rows(self.documents())
        return super(SelfReplay, self).wrap(model)

    def state_dict(self) -> dict[str, object]:
        """Nothing: the texts are the configuration's."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Takes nothing back."""
