"""Joint: all tasks at once. Every stage trains the one LoRA on the mixture of all tasks' examples.

The usual upper bound ("MTL" of TRACE, arXiv 2310.06762, and O-LoRA, arXiv 2310.14152). It looks at future tasks, so it is no continual method and
its rows before the last stage are learning curves, not forgetting. With `train.steps` it has taken as many optimizer steps after the last stage as
every other method, on examples drawn in proportion to the tasks' sizes. With `train.epochs` every stage would pass the whole stream, as many times
the work as there are stages; state steps for a fair bound. No official code, no deviation.

Card:
- paper: arXiv 2310.06762 (MTL), 2310.14152
- trainable: rank (in + out) per layer
- memory: all tasks' data
- compute: none
- deviations: none; sees future tasks
"""

from collections.abc import Sequence
from dataclasses import dataclass

from baselines.seq import Seq
from clbench.protocols import Stage
from clbench.types import Source


@dataclass(kw_only=True)
class Joint(Seq):
    """Fine-tuning of one LoRA on the whole stream at once."""

    def training_set(self, stage: Stage) -> Sequence[Source]:
        return (Source(examples=stage.whole_stream),)
