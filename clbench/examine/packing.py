"""Contexts and what follows them, laid out in rows of tokens that one forward reads.

A row holds many contexts end to end, behind each its continuations; a mask lets a token see what it would see if its sequence stood alone.
Contexts that begin with the same tokens (few-shot examples, instructions) form a group, whose beginning is not in its rows.

Shape suffixes: T tokens of a row, S tokens it sees (the group's beginning and the row), N scored positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

import torch
from torch import Tensor

from clbench.types import Ids

SHARED = 32
"""Fewest tokens of a common beginning that are worth a forward of their own."""


@dataclass(frozen=True)
class Read:
    """A context and `branches` that continue it. Logits are wanted after the context and everywhere in the branches."""

    context: Ids
    branches: tuple[Ids, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.context) + sum(map(len, self.branches))

    @property
    def scored(self) -> int:
        """At how many of them logits are wanted."""
        return 1 + sum(map(len, self.branches))

    @property
    def longest(self) -> int:
        return len(self.context) + max(map(len, self.branches), default=0)


@dataclass(frozen=True)
class Row:
    """One forward: `ids` and `positions` [T], `places` [N] where logits are wanted, `sees_TS` None where a token sees all that precedes it."""

    ids: Tensor
    positions: Tensor
    places: Tensor
    sees_TS: Tensor | None


def row_of(reads: Sequence[Read], *, shared: int = 0) -> Row:
    """The reads end to end, each without its first `shared` tokens. Of each read its context's place comes first, then those of its branches."""
    ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    spans: list[tuple[int, int, int, int]] = []  # a run of tokens, and the run before it that it continues
    for read in reads:
        start, length = len(ids), len(read.context)
        ids += read.context[shared:]
        positions += range(shared, length)
        end = len(ids)
        places.append(end - 1)
        spans.append((start, end, start, start))
        for branch in filter(None, read.branches):
            first, last = len(ids), len(ids) + len(branch)
            ids += branch
            positions += range(length, length + len(branch))
            places += range(first, last)
            spans.append((first, last, start, end))
    is_chain = len(reads) == 1 and len(spans) <= 2
    sees_TS = None if is_chain else _sight(spans, tokens=len(ids), shared=shared)
    return Row(torch.tensor(ids), torch.tensor(positions), torch.tensor(places), sees_TS)


def _sight(spans: Sequence[tuple[int, int, int, int]], *, tokens: int, shared: int) -> Tensor:
    """Which tokens each token sees, bool [T, S]: the group's beginning, the run that its own continues, its own run up to itself."""
    sees_TS = torch.zeros(tokens, shared + tokens, dtype=torch.bool)
    sees_TS[:, :shared] = True
    for first, last, before, end in spans:
        sees_TS[first:last, shared + before : shared + end] = True
        sees_TS[first:last, shared + first : shared + last] = torch.ones(last - first, last - first).tril().bool()
    return sees_TS


def groups(contexts: Sequence[Ids]) -> list[tuple[int, list[int]]]:
    """(tokens of a common beginning, the contexts that share it), of each member all but its last token at most; 0 for those that share none.

    Neighbours in lexicographic order are taken in as long as a shorter beginning of more contexts saves more tokens than a longer one of fewer.

    >>> groups([(*range(40), 1, 2), (5, 6), (*range(40), 3)])
    [(40, [0, 2]), (0, [1])]
    """
    order = sorted(range(len(contexts)), key=contexts.__getitem__)
    found: list[tuple[int, list[int]]] = []
    for place, index in enumerate(order):
        longest = len(contexts[index]) - 1
        if found:
            before, members = found[-1]
            shared = min(before, longest, len(commonprefix([contexts[order[place - 1]], contexts[index]])))
            if shared >= SHARED and len(members) * shared >= (len(members) - 1) * before:
                found[-1] = (shared, [*members, index])
                continue
        found.append((longest, [index]))
    alone = [members[0] for _, members in found if len(members) == 1]
    return [group for group in found if len(group[1]) > 1] + ([(0, alone)] if alone else [])
