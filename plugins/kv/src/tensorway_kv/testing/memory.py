"""Memory of ranks whose every byte says what it is: layer, component, position, head, byte, and of which request.

May import the core and this dist. Where a byte lies is worked out here from the geometry alone, one position at a
time, and by nothing that plans or moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

import attrs
import numpy as np
from numpy.typing import NDArray

from tensorway import memory
from tensorway.kv import Plane, RankGeometry
from tensorway.memory import Region
from tensorway_kv.layouts import Cache, Parallel, rank_geometry

Array = NDArray[Any]
Ids = Sequence[Sequence[int]]

PAGES: Final = 64
#: What is in memory that nobody has written to.
JUNK: Final = 0xEE
COMPONENTS: Final = ["k", "v", "latent", "scale.k", "scale.v", "conv", "ssm"]


class Shaped(Protocol):
    """What the ranks of an engine hold."""

    @property
    def tp(self) -> int:
        """How many they are."""

    def caches(self) -> Sequence[Cache]:
        """Their cache groups."""


def name_of(layer: int, component: str, position: Any, head: Any, byte: Any) -> Any:
    """The number that stands for a byte."""
    number: Any = 0
    coordinates = (layer, COMPONENTS.index(component), position, head, byte)
    for value, limit in zip(coordinates, (64, 8, 1 << 16, 256, 512), strict=True):
        number = number * limit + value
    return number


def salted(names: Any, salt: int) -> Array:
    """One byte for each number that names one, in the request that a salt stands for."""
    number = np.asarray(names, np.uint64) * np.uint64(1009) + np.uint64(salt)
    found: Array = ((number * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(56)).astype(np.uint8)
    return found


def geometries(
    caches: Sequence[Cache], parallel: Parallel, blocks: int = 8, start: int = 64, room: int = 7
) -> list[tuple[RankGeometry, int]]:
    """Of all ranks, each in an address space of its own that begins at 0; and how large it is."""
    made = []
    for rank in range(parallel.ranks):
        cursor = start

        def base(name: str, nbytes: int) -> int:
            nonlocal cursor
            cursor += nbytes + room
            return cursor - nbytes - room

        made.append((rank_geometry(caches, parallel, rank, blocks=blocks, base=base), cursor))
    return made


@attrs.define
class Rank:
    """A geometry, and what is there."""

    geometry: RankGeometry
    memory: Array

    def places(
        self, blocks: Ids, positions: Sequence[int], states: bool = True
    ) -> Iterator[tuple[Plane, Array, Array]]:
        """For each plane and part that has any: the addresses of all bytes of these positions, and their names."""
        share = self.geometry.share
        for plane in self.geometry.planes:
            ids = np.asarray(blocks[plane.group])
            for part in plane.parts:
                if part.tokens:
                    held = np.asarray([p for p in positions if p // share.interleave % share.of == share.rank], int)
                    nth = held // (share.interleave * share.of) * share.interleave + held % share.interleave
                    page, slot = ids[nth // part.tokens], nth % part.tokens
                elif states:
                    held, page, slot = np.zeros(1, int), ids[-1:], np.zeros(1, int)
                else:
                    continue
                rows = (plane.base + page * plane.stride + part.offset + slot * part.token_stride)[:, None, None]
                head = np.arange(part.heads)[:, None]
                byte = np.arange(part.width)
                name = name_of(part.layer, part.component, held[:, None, None], part.first + head, byte)
                yield plane, rows + head * part.head_stride + byte, name

    def pages(self, blocks: Ids) -> Iterator[slice]:
        """All bytes of these blocks."""
        for plane in self.geometry.planes:
            for block in blocks[plane.group]:
                at = plane.base + block * plane.stride
                yield slice(at, at + plane.page_bytes)


def memory_of(shape: Shaped, rank: int) -> tuple[RankGeometry, Rank]:
    """A rank's geometry, in memory that is really there; and the same with what is in it, counted from 0."""
    described, size = geometries(shape.caches(), Parallel(shape.tp), PAGES)[rank]
    buffer = memory.shared(size)
    start = Region.of(buffer).address
    planes = tuple(_moved(plane, start) for plane in described.planes)
    bytes_ = np.frombuffer(buffer, np.uint8)
    bytes_[:] = JUNK
    return RankGeometry(planes, described.groups, described.share), Rank(described, bytes_)


def _moved(plane: Plane, start: int) -> Plane:
    fields = {name: getattr(plane, name) for name in plane.__struct_fields__}
    return Plane(**{**fields, "base": plane.base + start})
