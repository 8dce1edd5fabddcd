"""What the waist costs over NIXL: tensorway's read against a hand-written loop over a NIXL agent, in the same minute.

    python tests/bench/nixl_waist.py [--short]

Two processes of one host, 4,095 blocks of 64 KiB in random order, by cross-memory attach and by TCP. The loop is the
shortest there is: prepared lists on both sides, one request, polling, no check of anything, no deadline. Each pair of
runs is timed back to back, and the median of the pairs' ratios is what is printed: the machine is shared.
"""

from __future__ import annotations

import importlib.util
import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable
from typing import Any

# One block less than 4,096: Python makes no 2**31 random bits at once for the peer to fill its memory with.
BLOCK, COUNT = 65_536, 4095
LANES: dict[str, dict[str, Any]] = {"cma": {}, "tcp": {"ucx_tls": ("tcp",)}}


def by_hand(description: bytes, options: dict[str, Any]) -> Callable[[list[int], list[int]], None]:
    """An agent of its own that reads blocks of the peer's first region."""
    import msgspec
    import numpy

    from tensorway.memory import Region
    from tensorway.transport import BlockTable
    from tensorway.transport.description import decode
    from tensorway_nixl import agent, tables, wire
    from tensorway_nixl.library import LIBRARY
    from tensorway_nixl.options import NixlOptions

    seen = decode(description, "nixl")
    made = agent.create("nixl", LIBRARY.result(), f"by-hand-{random.random()}", NixlOptions(**options))  # type: ignore[arg-type]
    native, bindings = made.native, made.bindings
    mine = Region.of(bytearray(BLOCK * COUNT))
    made.register(mine)
    native.loadRemoteMD(msgspec.msgpack.decode(seen.blob, type=wire.Blob).metadata)
    ours, theirs = (
        native.prepXferDlist(
            who, bindings.nixlXferDList(bindings.DRAM_SEG, tables.expanded(BlockTable.over(region, BLOCK))), []
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


def by_tensorway(endpoint: Any, description: bytes) -> Callable[[list[int], list[int]], None]:
    """A route to the same region, and the waist's read."""
    from tensorway.transport import BlockTable

    region = endpoint.register(bytearray(BLOCK * COUNT)).regions[0]
    peer = endpoint.connect(description)
    route = endpoint.prepare(peer, BlockTable.over(region, BLOCK), BlockTable.over(peer.regions[0], BLOCK))
    return lambda local, remote: endpoint.read(route, array("q", local), array("q", remote)).wait()


def seconds(read: Callable[[list[int], list[int]], None], local: list[int], remote: list[int]) -> float:
    """How long one read of these blocks takes."""
    started = time.perf_counter()
    read(local, remote)
    return time.perf_counter() - started


def main() -> None:
    """Print a row per lane."""
    from tensorway_nixl.library import packages

    if not any(importlib.util.find_spec(name) for name in packages()):
        print("NIXL is not installed here: nothing to compare. pip install nixl-cu12")
        return
    import tensorway
    from tensorway.testing import PeerProcess

    pairs = 7 if "--short" in sys.argv else 31
    order = [random.Random(seed).sample(range(COUNT), COUNT) for seed in (1, 2)]
    for lane, options in LANES.items():
        peer, endpoint = PeerProcess("nixl", options), tensorway.create("transport", "nixl", options)
        peer.register(BLOCK * COUNT, seed=1)
        waist, loop = by_tensorway(endpoint, peer.describe()), by_hand(peer.describe(), options)
        times = [(seconds(waist, *order), seconds(loop, *order)) for _ in range(pairs + 2)][2:]
        ratio = statistics.median(ours / theirs for ours, theirs in times)
        best = BLOCK * COUNT / min(ours for ours, _ in times) / 1e9
        print(f"{lane}: tensorway takes {ratio:.2f} x the hand-written loop   ({best:.1f} GB/s at best, {pairs} pairs)")
        endpoint.close()
        peer.close()


if __name__ == "__main__":
    main()
