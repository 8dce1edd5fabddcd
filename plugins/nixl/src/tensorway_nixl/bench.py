"""What the waist costs over NIXL: tensorway's read against a hand-written loop over a NIXL agent, in the same minute.

Of the dist only an entry point refers to this module, and `tensorway bench` runs it; it may import the core and its own
dist. Two processes of one host, by cross-memory attach and by TCP. The loop is the shortest there is: prepared lists on
both sides, one request, polling, no check of anything, no deadline.
"""

from __future__ import annotations

import importlib.util
import random
import time
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from tensorway.memory import Region
from tensorway.transport import BlockTable
from tensorway.transport.description import decode
from tensorway_nixl import agent, tables, wire
from tensorway_nixl.library import LIBRARY, packages
from tensorway_nixl.options import NixlOptions
from tensorway_tools.benchmark import Benchmark, Row, Run

_BLOCK: Final = 65_536
_LANES: Final[dict[str, dict[str, Any]]] = {"cma": {}, "tcp": {"ucx_tls": ("tcp",)}}
_Read = Callable[[list[int], list[int]], None]


def rows(run: Run) -> Iterator[Row]:
    """One for each lane."""
    # One block less than 4,096: Python makes no 2**31 random bits at once for the peer to fill its memory with.
    count = run.either(4095, 255)
    order = [random.Random(seed).sample(range(count), count) for seed in (1, 2)]
    for lane, options in _LANES.items():
        peer, endpoint = run.peer("nixl", options), run.create("transport", "nixl", options)
        try:
            peer.register(_BLOCK * count, seed=1)
            waist, loop = _by_tensorway(endpoint, peer.describe(), count), _by_hand(peer.describe(), options, count)
            yield run.measured(
                f"{lane}: reading {count} blocks of 64 KiB in random order",
                partial(waist, *order), partial(loop, *order),
                to="a hand-written loop over NIXL", rounds=run.either(15, 5), nbytes=_BLOCK * count,
            )  # fmt: skip
        finally:
            endpoint.close()
            peer.close()


def _by_hand(description: bytes, options: dict[str, Any], count: int) -> _Read:
    """An agent of its own that reads blocks of the peer's first region."""
    import numpy

    seen, loaded = decode(description, "nixl"), LIBRARY.result()
    made = agent.create("nixl", loaded, f"by-hand-{random.random()}", NixlOptions(**options))  # type: ignore[arg-type]
    native, bindings = made.native, made.bindings
    mine = Region.of(bytearray(_BLOCK * count))
    made.register(mine)
    native.loadRemoteMD(wire.DECODE_BLOB(seen.blob).metadata)
    ours, theirs = (
        native.prepXferDlist(
            who, bindings.nixlXferDList(bindings.DRAM_SEG, tables.expanded(BlockTable.over(region, _BLOCK))), []
        )
        for who, region in ((bindings.NIXL_INIT_AGENT, mine), (seen.incarnation, seen.regions[0]))
    )

    def read(local: list[int], remote: list[int]) -> None:
        chosen = (numpy.array(ids, dtype=numpy.int32) for ids in (local, remote))
        request = native.makeXferReq(bindings.NIXL_READ, ours, next(chosen), theirs, next(chosen), b"", [], False)
        state = native.postXferReq(request, b"")
        while state == bindings.NIXL_IN_PROG:
            time.sleep(100e-6)
            state = native.getXferStatus(request)
        native.releaseXferReq(request)
        assert made.regions  # which keep the memory alive

    return read


def _by_tensorway(endpoint: Any, description: bytes, count: int) -> _Read:
    """A route to the same region, and the waist's read."""
    region = endpoint.register(bytearray(_BLOCK * count)).regions[0]
    peer = endpoint.connect(description)
    route = endpoint.prepare(peer, BlockTable.over(region, _BLOCK), BlockTable.over(peer.regions[0], _BLOCK))
    return lambda local, remote: endpoint.read(route, array("q", local), array("q", remote)).wait()


def _missing() -> str:
    here = any(importlib.util.find_spec(name) for name in packages())
    return "" if here else "NIXL is not installed: pip install 'tensorway[nixl]'"


BENCH: Final = Benchmark("Reads over NIXL through tensorway, beside a hand-written loop.", rows, _missing)
