"""SEQ-merge: a new LoRA for every task. After each task the adapter is merged into the weights and started afresh.

    W <- W + s B A, then A drawn anew, B = 0                                                   after every stage

Equals "IncLoRA" of O-LoRA (arXiv 2310.14152), where old adapters are kept frozen and summed, up to the rounding of the sum: the rank of the total
update grows with the stream, at no cost in memory or time of a forward. No official code of its own. Deviation: a bfloat16 base rounds every merge
to bfloat16. The merged factors, rank (in + out) numbers per layer and task, are kept, so that resuming repeats the same sums.

Card:
- paper: arXiv 2310.14152 (IncLoRA)
- trainable: rank (in + out) per layer
- memory: rank (in + out) per layer and task, in the checkpoint only
- compute: one merge per task
- deviations: old pairs merged instead of summed beside
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import Module

from baselines.seq import SeqPairs
from clbench.models.pairs import merge_and_restart, merge_stacks, stack


@dataclass(kw_only=True)
class SeqMerge(SeqPairs):
    """Sequential fine-tuning of one LoRA per task, each merged when its task ends."""

    merges = True
    writing = True

    stages: int = 0
    retired: dict[str, Tensor] = field(default_factory=dict)

    def consolidate(self, model: Module) -> None:
        self.stages += 1
        self.retired = stack(self.pairs, self.retired)
        merge_and_restart(self.pairs, seed=self.seed, restart=self.stages)

    def state_dict(self) -> dict[str, Any]:
        """The merged factors: rows of A and columns of B, task after task."""
        return {"stages": self.stages, **self.retired}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them back and merges those again that were not merged yet."""
        merged, self.stages = self.stages, state["stages"]
        if self.stages > merged:
            live = {name: factor for pair in self.pairs for name, factor in pair.live().items()}
            self.retired = {name: state[name].to(factor) for name, factor in live.items()}
            merge_stacks(self.pairs, self.retired)
