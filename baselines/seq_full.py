"""SEQ-full: sequential fine-tuning of all weights. Nothing protects what was learned before.

Minimises the cross-entropy on the current task from where the last task left off ("SeqFT" of TRACE, arXiv 2310.06762, section 4.3), every weight
trained, embeddings included. Official setting there: constant learning rate 1e-5 for 7B models, a tenth of LoRA's; a comparison at LoRA's rate
would be one of learning rates. Deviation: trained weights are kept in float32 whatever the base's precision, because steps of this size vanish in
bfloat16's rounding. The checkpoint of a stage is the whole model.

Card:
- paper: arXiv 2310.06762 (SeqFT)
- trainable: all parameters
- memory: none
- compute: backward through all weights
- deviations: float32 weights under a bfloat16 base
"""

from dataclasses import dataclass

from torch.nn import Module

from clbench.protocols import Method


@dataclass(kw_only=True)
class SeqFull(Method):
    """Sequential fine-tuning of every weight, in float32."""

    def wrap(self, model: Module) -> Module:
        return model.float().requires_grad_(True)
