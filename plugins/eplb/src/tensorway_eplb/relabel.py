"""Which number each packed rank gets, so that most of its rows are there already. May import `placement`, `policy`.

Ranks of one speed are alike to a balance, so their numbers are free; inside whole nodes, a node's ranks stay together.
The assignment is optimal: the Hungarian method, with one row of the matrix at a time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tensorway_eplb.placement import EMPTY, Placement
from tensorway_eplb.policy import Topology

Index = NDArray[np.int64]
Costs = NDArray[np.float64]


def relabeled(rows: Index, current: Placement, topology: Topology, *, whole_nodes: bool) -> Index:
    """The same packs of experts ([layers, ranks, slots]) under other ranks, in the slots where they are already."""
    speed = np.array(topology.speeds)
    node = np.array(topology.nodes)
    chosen = np.empty_like(rows)
    for layer in range(current.layers):
        value = _value(rows[layer], current.by_rank[layer], node, current.num_logical)
        value[speed[:, None] != speed] = -_FORBIDDEN
        pack_of = _by_node(value, node) if whole_nodes else assign(value)
        chosen[layer] = rows[layer, pack_of]
    return aligned(chosen, current)


_FORBIDDEN = 1 << 40


def _value(packs: Index, held: NDArray[np.int32], node: Index, experts: int) -> Index:
    """What pack `p` would find on rank `r`: first of all on the rank itself, then elsewhere on its node."""
    wanted, here = _holds(packs, experts), _holds(held, experts)
    there = np.zeros_like(here)
    for number in np.unique(node):
        there[node == number] = here[node == number].any(axis=0)
    local, near = (wanted @ found.T for found in (here, there))
    value: Index = np.rint(local * (packs.shape[1] + 1) + near).astype(np.int64)
    return value


def _holds(rows: NDArray[np.int32] | Index, experts: int) -> NDArray[np.float32]:
    held = np.zeros((len(rows), experts + 1), dtype=np.float32)
    held[np.arange(len(rows))[:, None], np.where(rows == EMPTY, experts, rows)] = 1
    return held[:, :experts]


def _by_node(value: Index, node: Index) -> Index:
    """The pack of each rank where packs of one node stay together: nodes among each other, ranks within each."""
    members = [np.flatnonzero(node == number) for number in np.unique(node)]
    inner = [[assign(value[np.ix_(packs, ranks)]) for ranks in members] for packs in members]
    worth = np.array(
        [[value[packs[inner[p][r]], ranks].sum() for r, ranks in enumerate(members)] for p, packs in enumerate(members)]
    )
    pack_of = np.empty(len(node), dtype=np.int64)
    for r, p in enumerate(assign(worth)):
        pack_of[members[r]] = members[p][inner[p][r]]
    return pack_of


def assign(value: Index) -> Index:
    """The pack for each rank, so that the sum of the chosen values is the largest there is; `value[pack, rank]`."""
    cost = (value.max() - value.T).astype(np.float64)  # [rank, pack]
    size = len(cost)
    # Prices under which no pack costs a rank less than nothing; a pack that costs it nothing is taken if it is free.
    of_rank, of_pack = cost.min(axis=1), np.zeros(size)
    owner = np.full(size, -1)
    waiting = []
    for rank in range(size):
        free = np.flatnonzero((cost[rank] == of_rank[rank]) & (owner < 0))
        if len(free):
            owner[free[0]] = rank
        else:
            waiting.append(rank)
    for rank in waiting:
        _settle(rank, cost, of_rank, of_pack, owner)
    pack_of: Index = np.empty(size, dtype=np.int64)
    pack_of[owner] = np.arange(size)
    return pack_of


def _settle(rank: int, cost: Costs, of_rank: Costs, of_pack: Costs, owner: Index) -> None:
    """Give one more rank a pack, on the cheapest path of ranks that change theirs."""
    size = len(cost)
    nearest, via = np.full(size, np.inf), np.full(size, -1)
    seen = np.zeros(size, dtype=bool)
    at, pack = rank, -1
    while True:
        price = cost[at] - of_rank[at] - of_pack
        closer = ~seen & (price < nearest)
        nearest[closer] = price[closer]
        via[closer] = pack
        pack = int(np.where(seen, np.inf, nearest).argmin())
        step = nearest[pack]
        of_rank[rank] += step
        of_rank[owner[seen]] += step
        of_pack[seen] -= step
        nearest[~seen] -= step
        if owner[pack] < 0:
            break
        seen[pack] = True
        at = int(owner[pack])
    while pack >= 0:
        before = int(via[pack])
        owner[pack] = owner[before] if before >= 0 else rank
        pack = before


def aligned(rows: Index, current: Placement) -> Index:
    """The same experts on the same ranks ([layers, ranks, slots]), each in the slot where it is already, if it is."""
    held = current.by_rank.astype(np.int64)
    left = rows.copy()
    placed = np.full_like(rows, EMPTY)
    for slot in range(current.slots):
        here = (left == held[:, :, slot, None]) & (held[:, :, slot, None] != EMPTY)
        where = here.argmax(axis=2)[..., None]
        found = np.take_along_axis(here, where, axis=2)[..., 0]
        placed[:, :, slot] = np.where(found, held[:, :, slot], EMPTY)
        kept = np.take_along_axis(left, where, axis=2)
        np.put_along_axis(left, where, np.where(found[..., None], EMPTY, kept), axis=2)
    for slot in range(current.slots):  # the rest, in their order, into the slots that are free
        taken = (left != EMPTY).argmax(axis=2)[..., None]
        free = placed[:, :, slot] == EMPTY
        moved = np.take_along_axis(left, taken, axis=2)[..., 0]
        placed[:, :, slot] = np.where(free, moved, placed[:, :, slot])
        kept = np.take_along_axis(left, taken, axis=2)
        np.put_along_axis(left, taken, np.where(free[..., None], EMPTY, kept), axis=2)
    return placed
