"""CURLoRA: only the small middle matrix of a CUR decomposition trains (Fawi 2024, arXiv 2408.14572).

    y = x W^T + alpha * x (C U R)^T + b,    C = W[:, J],  R = W[I, :],  U [rank, rank] zero at first, all that trains

Columns J and rows I carry little of the weight's norm (eq. 3-8): with p_j = ||W_:,j||^2 / ||W||_F^2, column j is drawn with probability
proportional to 1/p_j. C and R stay for the whole stream and U carries over from task to task (section 5.1): no merge, no reset, no penalty (eq.
11's "+ ||U||_F" explains; the official code has no such term). The gradient is dL/dU = C^T (dL/dD) R^T. Trainables: rank^2 per layer.

Official code: github.com/MNoorFawi/curlora at 31a7d00. Where ours deviates, and why:
- `select: code_eps` (default) draws by 1/(p + 0.001), as that code does; `paper` by 1/p, as eq. 4 says (at most 1e12);
  `topk` takes the smallest norms. At the widths of language models p is far below 0.001, so the code's draw is nearly
  uniform: these are different methods.
- Without replacement (the code may draw a column twice, which lowers the rank), and from a generator named by seed and
  layer (the code never seeds NumPy's), so that a seed gives the same C and R anywhere.
- Computed as ((x R^T) U^T) C^T; the code forms C U R in every forward.
- C, R and the indices are buffers; the code's plain attributes were lost on saving. A checkpoint holds U and a hash: C
  and R are made again from seed and base weights, and checked against it.
- GPT-2's Conv1D is known by its type; the code guesses the orientation by trial, wrongly where the weight is square.
Interpretation: the task heads that the paper swaps have no counterpart in a generative stream.

Card:
- paper: arXiv 2408.14572
- trainable: rank^2 per layer
- memory: rank (in + out) per layer, frozen
- compute: rank (in + rank + out) per layer and token
- deviations: drawn without replacement and seeded; factored forward
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import PositiveInt
from torch import Tensor
from torch.nn import Module

from clbench.data.sampling import generator
from clbench.models import cur
from clbench.protocols import Method
from clbench.types import UserMistake

OFFSETS = {"code_eps": 1e-3, "paper": 0.0}


def choose(weight: Tensor, count: int, *, select: str, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Indices J of `count` columns and I of `count` rows of the layer `name`, int64 [count] each (eq. 3-6)."""
    if select == "topk":
        return cur.smallest_columns(weight, count), cur.smallest_columns(weight.t(), count)
    rng = generator(seed, f"cur/{name}")
    columns = cur.sample_columns(weight, count, offset=OFFSETS[select], rng=rng)
    return columns, cur.sample_columns(weight.t(), count, offset=OFFSETS[select], rng=rng)


@dataclass(kw_only=True)
class CurLora(Method):
    """`rank` columns and rows of each layer in `targets`, chosen by `select`; the update is multiplied by `alpha`."""

    targets: list[str] | str
    rank: PositiveInt
    alpha: float
    select: Literal["code_eps", "paper", "topk"]
    seed: int
    layers: dict[str, cur.CurLinear] = field(default_factory=dict)

    def wrap(self, model: Module) -> Module:
        self.layers = cur.inject(model, targets=self.targets, make=self.layer)
        most = max(len(layer.columns) for layer in self.layers.values())
        if self.rank > most:
            raise UserMistake(
                f"method.rank={self.rank} is more than the smaller side of every layer; set it to {most} at most (conf/method)"
            )
        return model

    def layer(self, name: str, base: Module) -> cur.CurLinear:
        """The adapted layer `name`; rank is at most the smaller side of its weight."""
        weight = cur.oriented(base)
        rank = min(self.rank, *weight.shape)
        columns, rows = choose(weight, rank, select=self.select, seed=self.seed, name=name)
        return cur.CurLinear(
            base, columns=columns, rows=rows, core=cur.SquareCore(rank=rank, like=weight), scale=self.alpha
        )

    def state_dict(self) -> dict[str, Any]:
        """The hash of what `wrap` chose; U is the checkpoint's own."""
        return {"selection": cur.selection_hash(self.layers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuses a checkpoint of other columns and rows."""
        cur.check_selection(self.layers, state["selection"])
