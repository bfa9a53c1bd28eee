"""What a run under way is made of."""

from dataclasses import dataclass, field

from torch.nn import Module

from clbench.config import Config
from clbench.data.encoder import Encoder
from clbench.protocols import Method, Probe, Stream
from clbench.record.ledger import Ledger
from clbench.train.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run under way. Only the first rank has a ledger. `overlapping`: ids of training examples that a test or probe holds, too."""

    config: Config
    method: Method
    model: Module
    stream: Stream
    probes: tuple[Probe, ...]
    encoder: Encoder
    ledger: Ledger | None = None
    ranks: Ranks = field(default_factory=Ranks)
    overlapping: frozenset[str] = frozenset()
