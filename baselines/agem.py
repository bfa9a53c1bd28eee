"""A-GEM: averaged gradient episodic memory. A step that would raise the loss on the memory loses the part of its gradient that does.

With g the gradient on the current rows and g_ref that on as many rows of the memory, both over all trainable tensors as one vector,

    if <g, g_ref> < 0:      g <- g - <g, g_ref> / ||g_ref||^2 * g_ref                                   (eq. 11 of arXiv 1812.00420)

between the backward pass and clipping; afterwards <g, g_ref> = 0. The memory rows are not trained on. Memory as in ER. Official code:
facebookresearch/agem (images, TensorFlow). Released ports for language models edit the gradient after the optimizer's step, or project each tensor
by itself: inert, or another method; not followed. The optimizer here is Adam, so the step itself need not be orthogonal (the paper has plain SGD).

Card:
- paper: arXiv 1812.00420
- trainable: rank (in + out) per layer
- memory: fraction of each task's rows, as text
- compute: twice the rows per step
- deviations: Adam in place of SGD
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import Module

from baselines.er import Er
from clbench.models.loss import answer_loss, indices_of, rows_of
from clbench.protocols import Engine
from clbench.types import Batch, UserMistake


def share_along(g: Sequence[Tensor], g_ref: Sequence[Tensor]) -> Tensor:
    """What of g_ref is taken from g: min(0, <g, g_ref>) / ||g_ref||^2, over all tensors as one vector; 0 where g_ref is 0."""
    product = torch.as_tensor(sum((one * other).sum() for one, other in zip(g, g_ref, strict=True)))
    square = torch.as_tensor(sum(one.square().sum() for one in g_ref))
    return torch.where(square > 0, product.clamp(max=0) / square, 0.0)


@dataclass(kw_only=True)
class Agem(Er):
    """LoRA whose gradient does not oppose that of the memory. `pending`: the memory's rows of the step under way."""

    pending: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.after or self.weight != 1:
            raise UserMistake(
                "method=agem trains on no memory: method.after and method.weight are ER's; leave them out"
            )

    def loss(self, model: Module, batch: Batch) -> Tensor:
        """Cross-entropy of the current rows, in nats per answer token; the memory's wait for `correct_gradients`."""
        if len(batch.source_tokens) == 1:
            return answer_loss(model, batch)
        current, memory = (self.only(batch, source) for source in (0, 1))
        self.pending.append(memory)
        return answer_loss(model, current)

    @staticmethod
    def only(batch: Batch, source: int) -> Batch:
        """The rows of one source, weighted as if alone; where there are none one row without weight."""
        picked = rows_of(batch, indices_of(batch, source))
        # A source is half of the step's loss.
        return replace(picked, weights=2 * picked.weights * (picked.sources == source))

    def correct_gradients(self, engine: Engine) -> Tensor | float:
        """Takes from the gradient what opposes the memory's; nothing is added to the loss."""
        if not self.pending:
            return 0.0
        g = {tensor.name: tensor.grad.clone() for tensor in engine.tensors()}
        engine.clear()
        for batch in self.pending:
            engine.backward(answer_loss(engine.model, batch))
        self.pending.clear()
        g_ref = {tensor.name: tensor.grad.clone() for tensor in engine.tensors()}
        share = share_along([*g.values()], [*g_ref.values()])
        for tensor in engine.tensors():
            tensor.grad = g[tensor.name] - share * g_ref[tensor.name]
        return 0.0
