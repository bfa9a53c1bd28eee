"""O-LoRA: orthogonal subspaces. Every task gets a new LoRA that reads other directions than all earlier ones.

Paper: O-LoRA (arXiv 2310.14152). With the frozen pairs (A_s, B_s) of earlier tasks summed in the forward, task t minimises

    loss = CE + strength * sum over layers of sum_{s<t} sum_ij |A_s A_t^T|_ij,
    d/dA_t = strength * sum_{s<t} sign(A_t A_s^T) A_s.

The absolute value is taken entry by entry, as in the official code. After the task its pair joins the frozen ones and a fresh pair is drawn.

Official code: cmnfriend/O-LoRA. Followed: entry-wise penalty on A only (B is free), strength 0.5, fresh pair per task. Deviations: old pairs are
merged into the frozen weight instead of being carried beside it, which is the same function up to rounding (to bfloat16 where the base is) at no
cost per forward; their A stay for the penalty, rank * in numbers per layer and task. The gradient is added in closed form once per optimizer step.
The official second term, lambda_2 times the norm of the new factors, is left out: it is 0 in their four-task orders and tuned per task in the long
ones.

Card:
- paper: arXiv 2310.14152
- trainable: rank (in + out) per layer
- memory: rank in per layer and task
- compute: rank^2 in per layer, past task and step
- deviations: old pairs merged; lambda_2 left out
"""

from dataclasses import dataclass

from pydantic import NonNegativeFloat
from torch import Tensor

from baselines.seq_merge import SeqMerge
from clbench.protocols import Engine


def penalty(live: Tensor, old: Tensor) -> Tensor:
    """Sum of |A A_old^T| over entries: A [rank, in], all earlier ones stacked [tasks * rank, in]; no unit."""
    return (live @ old.T).abs().sum()


def penalty_gradient(live: Tensor, old: Tensor) -> Tensor:
    """d penalty / d A = sign(A A_old^T) A_old, [rank, in]."""
    return (live @ old.T).sign() @ old


@dataclass(kw_only=True)
class OLora(SeqMerge):
    """One LoRA per task, held orthogonal to its predecessors by a penalty of `strength`."""

    strength: NonNegativeFloat

    def correct_gradients(self, engine: Engine) -> Tensor | float:
        """Adds the penalty's gradient to every A from the second task on; returns strength times the penalty."""
        if not self.retired or self.strength == 0:
            return 0.0
        value = 0.0
        for tensor in engine.tensors([pair.A for pair in self.pairs]):
            old = self.retired[tensor.name].to(tensor.value)
            tensor.grad += self.strength * penalty_gradient(tensor.value, old)
            value = value + self.strength * penalty(tensor.value, old)
        return value
