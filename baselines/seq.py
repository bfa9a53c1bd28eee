"""SEQ: sequential fine-tuning. One LoRA is trained on task after task; nothing protects what was learned before.

Minimises the cross-entropy on the current task from where the last task left off ("SeqLoRA" of O-LoRA, arXiv 2310.14152; "LoraSeqFT" of
TRACE, arXiv 2310.06762, section 4.3). The reference that every other method must beat, and must equal when its own strength is zero.
Adapter: LoRA (arXiv 2106.09685) from PEFT. No deviation.

Card:
- paper: arXiv 2310.14152 (SeqLoRA), 2310.06762 (LoraSeqFT)
- trainable: rank (in + out) per layer
- memory: none
- compute: none
- deviations: none
"""

from dataclasses import dataclass

from torch.nn import Module

from clbench.models.lora import Lora
from clbench.models.pairs import Pair, lora_pairs
from clbench.protocols import Method


@dataclass(kw_only=True)
class Seq(Method):
    """Sequential fine-tuning of one LoRA."""

    lora: Lora
    seed: int

    def wrap(self, model: Module) -> Module:
        """Adds the one adapter that all stages train."""
        return self.lora.add(model, seed=self.seed)


@dataclass(kw_only=True)
class SeqPairs(Seq):
    """SEQ for methods that work on the two factors of each layer. `writing`: whether they write into the weights, if only for an examination."""

    writing = False

    pairs: tuple[Pair, ...] = ()

    def wrap(self, model: Module) -> Module:
        """Adds the adapter, which must be plain LoRA."""
        wrapped = super().wrap(model)
        self.pairs = lora_pairs(wrapped, merging=self.writing)
        return wrapped
