"""Which tokens a forward reads when sequences begin alike: every shared beginning once.

Sequences in lexicographic order are the branches of a tree. A row holds one tree: each token of it once, at the position of its depth, seeing its
ancestors and itself only, so that every branch is read as if it stood alone. Rows that share a long beginning (few-shot examples, instructions)
are a group, and its keys and values are computed once. The four options of an item are thus read for the price of one and a bit.

Shape suffixes: B rows, T tokens of a row after the group's beginning, S tokens it sees (beginning and row).

>>> (group,) = groups([Read((1, 2, 3, 4), 2), Read((1, 2, 3, 9), 2), Read((1, 2, 3), 2)])
>>> group.rows[0].ids.tolist(), group.rows[0].depths.tolist()
([1, 2, 3, 4, 9], [0, 1, 2, 3, 3])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = tuple[int, ...]
Integers = NDArray[np.int64]

SHARED = 32
"""Fewest tokens of a common beginning that are worth a forward of their own."""
WIDEST = 512
"""Tokens of a tree with more than one branch, unless its longest branch alone has half as many."""


@dataclass(frozen=True)
class Read:
    """A sequence to read: what the model has understood is wanted after each of its tokens from position `first` on."""

    ids: Ids
    first: int


@dataclass(frozen=True)
class Row:
    """A tree of tokens in the order in which they were added: a token comes after its ancestors.

    `branches` are the runs of tokens added for one sequence each: where the run starts, where it ends, which tokens come before it.
    `paths` are the tokens of each read by its index in the list of reads. `stem`: tokens at the beginning that every read shares and at
    which none wants a state.
    """

    ids: Integers
    depths: Integers
    branches: list[tuple[int, int, Integers]]
    paths: dict[int, Integers]
    stem: int

    @property
    def is_chain(self) -> bool:
        """Whether it is one sequence."""
        return len(self.branches) == 1


@dataclass(frozen=True)
class Group:
    """Rows whose first `shared` tokens are the same."""

    shared: int
    rows: list[Row]


@dataclass(frozen=True)
class Packed:
    """One forward: `ids_BT` and `depths_BT`, padded on the right, after a beginning of `shared` tokens.

    `wanted` are the places (in the flattened [B, T]) whose states are asked for, each once; `places` says which of them belong to the
    reads of `members`, one read's after another's. `sees_BTS`: which tokens each token sees; None where every row is one sequence without a
    beginning, so that a causal mask says it all. `tokens`: read for it, the beginning counted once per group.
    """

    ids_BT: Integers
    depths_BT: Integers
    sees_BTS: NDArray[np.bool_] | None
    shared: int
    members: list[int]
    wanted: Integers
    places: Integers
    tokens: int


def groups(reads: Sequence[Read], *, branching: bool = True) -> list[Group]:
    """The reads as trees, and the trees by what they share. Without `branching` each read is a row of its own."""
    order = sorted(range(len(reads)), key=lambda index: reads[index].ids)
    rows: list[Row] = []
    begun: list[int] = []  # the first read of each row
    parts: list[tuple[int, int]] = []  # the reads of the row at hand, with what each shares with the one before it
    size = 0
    for index in order:
        ids = reads[index].ids
        common = common_length(reads[parts[-1][0]].ids, ids) if parts else 0
        added = len(ids) - common
        longest = max(len(ids), len(reads[begun[-1]].ids)) if parts else len(ids)
        if branching and parts and 4 * common >= added and size + added <= max(WIDEST, 2 * longest):
            parts.append((index, common))
            size += added
            continue
        if parts:
            rows.append(tree(reads, parts))
        parts, size = [(index, 0)], len(ids)
        begun.append(index)
    if parts:
        rows.append(tree(reads, parts))
    if not branching:
        return [Group(0, rows)]
    found = gathered([row.stem for row in rows], [reads[index].ids for index in begun])
    return [Group(shared, [rows[place] for place in places]) for shared, places in found]


def tree(reads: Sequence[Read], parts: Sequence[tuple[int, int]]) -> Row:
    """The row of `parts`: reads in lexicographic order, each with the length of what it shares with the one before it."""
    ids: list[int] = []
    branches: list[tuple[int, int, Integers]] = []
    depths: list[Integers] = []
    paths: dict[int, Integers] = {}
    path = np.empty(0, dtype=np.int64)
    stem = len(reads[parts[0][0]].ids)
    for index, common in parts:
        read = reads[index]
        stem = min(stem, read.first, common if paths else stem)
        if len(read.ids) > common:
            start = len(ids)
            ids += read.ids[common:]
            branches.append((start, len(ids), path[:common]))
            depths.append(np.arange(common, len(read.ids)))
            path = np.concatenate([path[:common], np.arange(start, len(ids))])
        paths[index] = path[: len(read.ids)]
    return Row(np.array(ids), np.concatenate(depths), branches, paths, stem)


def beginnings(sequences: Sequence[Ids]) -> list[tuple[int, list[int]]]:
    """Which sequences share how long a beginning, short of their last token: (tokens, indices), 0 for those that share none.

    >>> beginnings([(*range(40), 1, 2), (5, 6), (*range(40), 3)])
    [(40, [0, 2]), (0, [1])]
    """
    order = sorted(range(len(sequences)), key=lambda index: sequences[index])
    found = gathered([len(sequences[index]) - 1 for index in order], [sequences[index] for index in order])
    return [(shared, [order[place] for place in places]) for shared, places in found]


def gathered(stems: Sequence[int], sequences: Sequence[Ids]) -> list[tuple[int, list[int]]]:
    """Neighbours in lexicographic order grouped by a beginning of at most `stems` tokens that they share, those that share none last.

    A group goes on as long as a longer list saves more tokens than its shorter beginning gives up.
    """
    found: list[tuple[int, list[int]]] = []
    for place, stem in enumerate(stems):
        if found:
            before, held = found[-1]
            longest = before if len(held) > 1 else stems[held[0]]
            shared = min(longest, stem, common_length(sequences[place - 1], sequences[place]))
            if shared >= SHARED and len(held) * shared >= (len(held) - 1) * before:
                found[-1] = (shared, [*held, place])
                continue
        found.append((0, [place]))
    alone = [held[0] for _, held in found if len(held) == 1]
    return [group for group in found if len(group[1]) > 1] + ([(0, alone)] if alone else [])


def common_length(left: Ids, right: Ids) -> int:
    """How many tokens two sequences begin with in common.

    >>> common_length((1, 2, 3), (1, 2, 4)), common_length((1, 2), (1, 2, 3)), common_length((1,), (2,))
    (2, 2, 0)
    """
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def forwards(group: Group, reads: Sequence[Read], *, tokens_per_batch: int) -> Iterator[Packed]:
    """The group's rows in batches of like length, the longest first; trees and single sequences apart.

    `tokens_per_batch` bounds rows times padded length; with the beginning, whose keys and values every row refers to, four times as many.
    """
    unread = group.shared
    for chains in (True, False):
        rows = sorted((row for row in group.rows if row.is_chain == chains), key=lambda row: -len(row.ids))
        while rows:
            longest = len(rows[0].ids) - group.shared
            count = min(tokens_per_batch // longest, 4 * tokens_per_batch // (longest + group.shared))
            batch, rows = rows[: max(1, count)], rows[max(1, count) :]
            yield packed(batch, reads, shared=group.shared, unread=unread, causal=chains and not group.shared)
            unread = 0


def packed(rows: Sequence[Row], reads: Sequence[Read], *, shared: int, unread: int, causal: bool) -> Packed:
    """One batch of `rows`, the longest first; `unread` tokens of the beginning are read for it."""
    length = len(rows[0].ids) - shared
    ids_BT = np.zeros((len(rows), length), dtype=np.int64)
    depths_BT = np.zeros((len(rows), length), dtype=np.int64)
    members: list[int] = []
    asked: list[Integers] = []
    for number, row in enumerate(rows):
        own = len(row.ids) - shared
        ids_BT[number, :own] = row.ids[shared:]
        depths_BT[number, :own] = row.depths[shared:]
        for index, path in row.paths.items():
            members.append(index)
            asked.append(number * length + path[reads[index].first :] - shared)
    wanted, places = np.unique(np.concatenate(asked), return_inverse=True)
    return Packed(
        ids_BT=ids_BT,
        depths_BT=depths_BT,
        sees_BTS=None if causal else np.stack([sight(row, shared=shared, length=length) for row in rows]),
        shared=shared,
        members=members,
        wanted=wanted,
        places=places,
        tokens=unread + sum(len(row.ids) - shared for row in rows),
    )


def sight(row: Row, *, shared: int, length: int) -> NDArray[np.bool_]:
    """Which tokens each of the row's tokens after the beginning sees [T, S]; one that fills up sees itself."""
    sees_TS = np.zeros((length, shared + length), dtype=np.bool_)
    for start, end, before in row.branches:
        first = max(start, shared)
        sees_TS[first - shared : end - shared, before] = True
        sees_TS[first - shared : end - shared, start:first] = True
        sees_TS[first - shared : end - shared, first:end] = np.tri(end - first, dtype=np.bool_)
    filled = np.arange(len(row.ids) - shared, length)
    sees_TS[filled, shared + filled] = True
    return sees_TS
