"""Memory that stands for a device: it is the host's, under another name, which a transport of host memory refuses.

May import the core, its `testing` and this dist. Functions with a `Rank` first are called in an engine's processes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

import attrs
import numpy as np

import tensorway
from tensorway import memory
from tensorway.errors import Unsupported
from tensorway.kv import KVContext, Plane, RankGeometry
from tensorway.memory import Region
from tensorway.testing.ranks import Rank
from tensorway_kv.offers import construct_handover
from tensorway_kv.options import HandoverOptions
from tensorway_kv.testing.engine import Options
from tensorway_kv.testing.memory import JUNK, Ids, Shaped, memory_of, salted

DEVICE: Final = "cuda:0"


@attrs.define
class HostCopier:
    """A copier that counts what it is asked for, and can be made to fail."""

    pieces: int = 0
    nbytes: int = 0
    #: From and to which device.
    ways: set[tuple[str, str]] = attrs.field(factory=set)
    #: How many of the next calls raise.
    fails: int = 0

    def __call__(self, pairs: Sequence[tuple[Region, Region]]) -> None:
        """Copy; see `tensorway.kv.Copier`."""
        if self.fails:
            self.fails -= 1
            raise RuntimeError("the stream is broken")
        for source, target in pairs:
            assert source.nbytes == target.nbytes
            ctypes.memmove(target.address, source.address, target.nbytes)
            self.ways.add((source.device, target.device))
            self.pieces += 1
            self.nbytes += target.nbytes


def elsewhere(geometry: RankGeometry, device: str = DEVICE) -> RankGeometry:
    """The same memory on another device."""
    planes = [{name: getattr(plane, name) for name in plane.__struct_fields__} for plane in geometry.planes]
    return RankGeometry(tuple(Plane(**{**one, "device": device}) for one in planes), geometry.groups, geometry.share)


def open_device_mover(rank: Rank, engine: str, shape: Shaped, number: int, options: Options) -> None:
    """As `open_mover`, beside memory of a device."""
    geometry, rank.notes["memory"] = memory_of(shape, number)
    copier = rank.notes["copier"] = HostCopier()
    context = KVContext(
        engine, rank.rendezvous(), "mover", shape.tp, number, elsewhere(geometry), {"model": "tiny"}, copier=copier
    )
    rank.notes["mover"] = construct_handover(HandoverOptions(**options), context)


def fail_copies(rank: Rank, times: int) -> None:
    """Let so many of the next copies raise."""
    rank.notes["copier"].fails = times


def copied(rank: Rank) -> tuple[int, set[tuple[str, str]]]:
    """Bytes that were copied, and from where to where."""
    return rank.notes["copier"].nbytes, rank.notes["copier"].ways


def refused_by_transport(rank: Rank) -> str:
    """What `local` says to such memory."""
    endpoint = tensorway.create("transport", "local")
    buffer = memory.shared(memory.PAGE)
    try:
        endpoint.register(Region(Region.of(buffer).address, memory.PAGE, DEVICE))
    except Unsupported as error:
        return str(error)
    finally:
        endpoint.close()
    raise AssertionError("it was taken")


def verify_windows(rank: Rank, blocks: Ids, start: int, stop: int) -> int:
    """As `verify`, but that of a group with a window only its last tokens are there."""
    held = rank.notes["memory"]
    expected = np.full(len(held.memory), JUNK, np.uint8)
    for group, about in enumerate(held.geometry.groups):
        begin = max(start, stop - about.window) if about.window else start
        for plane, places, names in held.places(blocks, range(begin, stop)):
            if plane.group == group:
                expected[places] = salted(names, 1)
    np.testing.assert_array_equal(held.memory, expected)
    return int((expected != JUNK).sum())
