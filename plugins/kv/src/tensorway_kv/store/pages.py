"""Blocks of files into the pages of a rank, and pages into files: exactly the wanted bytes, whatever either looks like.

May import the core, numpy and this package's mathematics. Memory of a device is copied through a page in host memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs
import numpy as np
from numpy.typing import NDArray

from tensorway.errors import MemoryInvalid, Unsupported
from tensorway.kv import Copier, Plane, RankGeometry
from tensorway.memory import Region
from tensorway.transport.blocks import BlockTable
from tensorway_kv.reads import Batch, Held, Reads
from tensorway_kv.store.seals import OVERHEAD
from tensorway_kv.store.sections import BASE, Manifest, Section, of_group, register, topology
from tensorway_kv.topology import TransferTopology

_Rows = NDArray[np.uint8]
#: The only page of a file, or of an image.
_ONLY: Final = Held([[0]])


def _rows(base: int, nbytes: int, stride: int, count: int) -> _Rows:
    """Blocks in memory as rows."""
    span = (ctypes.c_ubyte * (stride * (count - 1) + nbytes)).from_address(base)
    flat: _Rows = np.ctypeslib.as_array(span)
    return np.lib.stride_tricks.as_strided(flat, (count, nbytes), (stride, 1))


def _address(data: bytearray | _Rows) -> int:
    return int(np.frombuffer(data, np.uint8).ctypes.data)


@attrs.frozen(eq=False)
class Layout:
    """How files of a layout are read into the pages of one group of a rank."""

    manifest: Manifest
    #: None where files have just the bytes of our pages.
    reads: Reads
    #: The rank whose files have exactly our pages; None for other layouts.
    same: int | None = None

    @property
    def files(self) -> tuple[int, ...]:
        """The ranks whose files are read."""
        return (self.same,) if self.same is not None else self.reads.producers


class Pages:
    """The pages of one cache group of a rank."""

    def __init__(self, ranks: Sequence[RankGeometry], me: int, section: Section, copier: Copier | None) -> None:
        own = of_group(ranks[me], section.group)
        assert own is not None
        self.section, self._planes = section, own.planes
        #: How many block ids there are.
        self.count = min(plane.pages for plane in own.planes)
        self.nbytes = sum(plane.page_bytes for plane in own.planes)
        self._copier = None
        if any(plane.device != "cpu" for plane in own.planes):
            if copier is None:
                device = next(plane.device for plane in own.planes if plane.device != "cpu")
                raise Unsupported(
                    "KV pages were to be saved to files.",
                    f"They are in memory of {device}, and no copier was given.",
                    "Give one in the context.",
                )
            self._copier = copier
        self._topology = self._made(ranks, me)
        self._views = [
            _rows(plane.base, plane.page_bytes, plane.stride, plane.pages) if self._copier is None else None
            for plane in own.planes
        ]

    def _made(self, ranks: Sequence[RankGeometry], me: int) -> TransferTopology:
        """Over real addresses, or, where the host cannot reach them, over one page as files have it."""
        if self._copier is None:
            return topology(ranks, self.section.group, me)
        places, all_of = self.section.places, self.section.manifest.info.ranks
        return TransferTopology(
            [all_of[place] for place in places if place is not None],
            sum(place is not None for place in places[:me]),
        )

    def layout(self, layout: str, manifest: Manifest, place: int | None) -> Layout:
        """How to read files of a layout; `place`: of our own, which rank of it we are. Raises `Incompatible`."""
        register(self._topology, layout, manifest)
        return Layout(manifest, Reads(self._topology, layout), place)

    def check(self, block: int) -> None:
        """Raise `MemoryInvalid` for an id that is none."""
        if not 0 <= block < self.count:
            raise MemoryInvalid(
                "Blocks of a request were given.", f"One is {block}; there are {self.count}.", "Give ids of blocks."
            )

    def take(self, block: int) -> bytearray:
        """What a block holds, as its file has it."""
        data = bytearray(self.nbytes)
        if self._copier is not None:
            self._copier([(page, place) for page, place in self._pairs(block, _address(data))])
            return data
        into, at = np.frombuffer(data, np.uint8), 0
        for plane, view in zip(self._planes, self._views, strict=True):
            assert view is not None
            into[at : at + plane.page_bytes] = view[block]
            at += plane.page_bytes
        return data

    def put(self, block: int, layout: Layout, files: Mapping[int, bytearray], start: int, stop: int) -> int:
        """Copy the tokens from `start` to before `stop` of a block out of its files; how many bytes."""
        whole = start == 0 and stop == layout.manifest.block_tokens
        if whole and layout.same is not None:
            self._put_all(block, np.frombuffer(files[layout.same], np.uint8)[OVERHEAD:])
            return self.nbytes
        image = self.take(block) if self._copier is not None else None
        own = _ONLY if image is not None else Held([[block]])
        moved = 0
        for rank, batches in layout.reads.plan(own, _ONLY, start, stop).items():
            shifts = _address(image) - BASE if image is not None else 0, _address(files[rank]) + OVERHEAD - BASE
            tables = layout.reads.routes(rank)
            moved += sum(_copy(tables[batch.route], batch, shifts) for batch in batches)
        if image is not None:
            self._put_all(block, np.frombuffer(image, np.uint8))
        return moved

    def _put_all(self, block: int, data: _Rows) -> None:
        if self._copier is not None:
            self._copier([(place, page) for page, place in self._pairs(block, int(data.ctypes.data))])
            return
        at = 0
        for plane, view in zip(self._planes, self._views, strict=True):
            assert view is not None
            view[block] = data[at : at + plane.page_bytes]
            at += plane.page_bytes

    def _pairs(self, block: int, address: int) -> list[tuple[Region, Region]]:
        """For each plane a block's page, and its place in host memory."""
        pairs = []
        for plane in self._planes:
            pairs.append((_page(plane, block), Region(address, plane.page_bytes)))
            address += plane.page_bytes
        return pairs


def _page(plane: Plane, block: int) -> Region:
    return Region(plane.base + block * plane.stride, plane.page_bytes, plane.device)


def _copy(tables: tuple[BlockTable, BlockTable], batch: Batch, shifts: tuple[int, int]) -> int:
    """The blocks of one batch, plane by plane."""
    own, theirs = tables
    for mine, its in zip(own.bases, theirs.bases, strict=True):
        into: Any = _rows(mine + shifts[0], own.block_bytes, own.stride, own.count)
        into[batch.local] = _rows(its + shifts[1], theirs.block_bytes, theirs.stride, theirs.count)[batch.remote]
    return own.width * own.block_bytes * len(batch.local)
