"""Ranks with pages whose every byte says what it is, and what a row must hold, worked out one position at a time.

May import the core, its `testing`, and the same of `tensorway-kv`. What plans and copies is not asked for any of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs
import msgspec
import numpy as np

from tensorway import memory
from tensorway.geometry import RankGeometry
from tensorway.memory import Region
from tensorway_cpu.canonical import Canon
from tensorway_kv.layouts import Cache, Parallel
from tensorway_kv.testing.memory import JUNK, Array, Rank, geometries, name_of, salted

#: Pages of each group that a rank has.
PAGES: Final = 48


@attrs.frozen(eq=False)
class Pages:
    """Memory of all ranks of an engine."""

    #: Where it is.
    geometries: tuple[RankGeometry, ...]
    #: What is there, counted from 0.
    ranks: tuple[Rank, ...]

    @classmethod
    def of(cls, caches: Sequence[Cache], parallel: Parallel, pages: int = PAGES) -> Pages:
        """All of it is junk."""
        real, ranks = [], []
        for described, size in geometries(caches, parallel, pages):
            buffer = memory.shared(size)
            start, held = Region.of(buffer).address, np.frombuffer(buffer, np.uint8)
            held[:] = JUNK
            planes = tuple(msgspec.structs.replace(plane, base=plane.base + start) for plane in described.planes)
            real.append(RankGeometry(planes, described.groups, described.share))
            ranks.append(Rank(described, held))
        return cls(tuple(real), tuple(ranks))

    def fill(self, pages: Sequence[Sequence[int]], tokens: int, salt: int = 1) -> None:
        """A request that has these pages of each group has computed so many tokens."""
        for rank in self.ranks:
            for _, places, names in rank.places(pages, range(tokens)):
                rank.memory[places] = salted(names, salt)

    def clear(self) -> None:
        """All of it is junk again."""
        for rank in self.ranks:
            rank.memory[:] = JUNK

    def expected(self, pages: Sequence[Sequence[int]], positions: Sequence[int], salt: int = 1) -> list[Array]:
        """What the memory of each rank is to be, if these positions of a request are there and nothing else."""
        found = []
        for rank in self.ranks:
            whole = np.full(len(rank.memory), JUNK, np.uint8)
            for _, places, names in rank.places(pages, positions):
                whole[places] = salted(names, salt)
            found.append(whole)
        return found


def row_of(canon: Canon, group: int, block: int, salt: int = 1) -> Array:
    """What a row of a request's block must hold."""
    (plane,) = canon.groups[group].planes
    tokens = canon.groups[group].groups[0].block_tokens
    row = np.full(plane.page_bytes, JUNK, np.uint8)
    for part in plane.parts:
        for token in range(tokens):
            for head in range(part.heads):
                at = part.offset + token * part.token_stride + head * part.head_stride
                byte = np.arange(part.width)
                names = name_of(part.layer, part.component, block * tokens + token, head, byte)
                row[at : at + part.width] = salted(names, salt)
    return row
