"""L2: the update is pulled to zero. LoRA whose weight change is penalised by its squared Frobenius norm.

    loss = CE + sum over layers of strength/2 * ||DeltaW||_F^2,        DeltaW = s B A,  s = alpha/r,
    ||DeltaW||_F^2 = s^2 tr((B^T B)(A A^T)),    d/dA = strength s^2 (B^T B) A,    d/dB = strength s^2 B (A A^T).

Penalising the product rather than the factors makes the penalty independent of how DeltaW is split into A and B, and
zero at the start; the r x r products cost r^2 (in + out) per layer. A control, not a published method: CLoRA's
"LoRA-L2" (arXiv 2410.16801, mechanism not stated) and L2-SP (arXiv 1802.01483) are its relatives. Any gain of a
method with a penalty has to show against this one. No official code.

Card:
- paper: none (control); relatives 1802.01483, 2410.16801
- trainable: rank (in + out) per layer
- memory: none
- compute: rank^2 (in + out) per layer and step
- deviations: none
"""

from dataclasses import dataclass

from pydantic import NonNegativeFloat
from torch import Tensor

from baselines.seq import SeqPairs
from clbench.protocols import Engine


def gram(factor: Tensor) -> Tensor:
    """[rank, rank]: A A^T of a factor A [rank, width]; B is given transposed."""
    return factor @ factor.T


def penalty(gram_a: Tensor, gram_b: Tensor, *, scale: float) -> Tensor:
    """1/2 ||scale * B A||_F^2 from A A^T and B^T B, both [rank, rank]; no unit."""
    return 0.5 * scale**2 * (gram_b * gram_a).sum()


def penalty_gradient(factor: Tensor, gram_other: Tensor, *, scale: float) -> Tensor:
    """d penalty / d factor [rank, width], from the other factor's Gram matrix; B is given and returned transposed."""
    return scale**2 * (gram_other @ factor)


@dataclass(kw_only=True)
class L2(SeqPairs):
    """LoRA with `strength`/2 times the squared Frobenius norm of the update."""

    strength: NonNegativeFloat

    def correct_gradients(self, engine: Engine) -> Tensor | float:
        """Adds the penalty's gradient to every factor; returns strength times the penalty."""
        if self.strength == 0:
            return 0.0
        rows = {pair.A: pair for pair in self.pairs}
        columns = {pair.B: pair for pair in self.pairs}
        # Whole matrices come one at a time, so both Gram matrices are taken before either factor's gradient is touched.
        grams = {tensor.name: gram(tensor.value) for tensor in engine.tensors(rows)}
        grams |= {tensor.name: gram(tensor.value.T) for tensor in engine.tensors(columns)}
        for tensor in engine.tensors(rows):
            pair = rows[tensor.name]
            tensor.grad += self.strength * penalty_gradient(tensor.value, grams[pair.B], scale=pair.scale)
        for tensor in engine.tensors(columns):
            pair = columns[tensor.name]
            tensor.grad += self.strength * penalty_gradient(tensor.value.T, grams[pair.A], scale=pair.scale).T
        return self.strength * sum(penalty(grams[pair.A], grams[pair.B], scale=pair.scale) for pair in self.pairs)
