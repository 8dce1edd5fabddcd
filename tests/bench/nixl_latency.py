"""What one small read over NIXL takes, and what the waist adds to a transfer and to a block, all in the same run.

    python tests/bench/nixl_latency.py [--short] [--spinning]

Three ways to read, in turns, over one connection each to the same peer. `raw` is the shortest there is: lists prepared
once, indices that are arrays already, looks with nothing but `sched_yield` between them: `time.sleep(0)` is 70 us.
`anchor` is what engines do: a list of descriptors built for each transfer, and sleeps of half a millisecond between two
looks. With `--spinning` the peer's progress thread never sleeps, and burns a core. Printed are medians of ratios and of
differences within a turn: the machine is shared.
"""

from __future__ import annotations

import importlib.util
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

LANES: dict[str, dict[str, Any]] = {"tcp": {"ucx_tls": ("tcp",)}, "cma": {}}
#: Blocks that touch would be joined, so every other one is taken.
COUNT, SMALL, MANY = 8192, 64, 4096
#: Seconds between two reads.
GAP = 2e-3
#: Reads in a burst.
BURST = 50
Read = Callable[[list[int], list[int]], None]


class Native:
    """A NIXL agent without tensorway's waist, connected to the peer's first region."""

    def __init__(self, description: bytes, options: dict[str, Any], block: int) -> None:
        import msgspec

        from tensorway.memory import Region
        from tensorway.transport import BlockTable
        from tensorway.transport.description import decode
        from tensorway_nixl import agent, tables, wire
        from tensorway_nixl.library import LIBRARY
        from tensorway_nixl.options import NixlOptions

        seen = decode(description, "nixl")
        loaded: Any = LIBRARY.result()
        self.agent = agent.create("nixl", loaded, f"native-{random.random()}", NixlOptions(**options))
        self.native, self.bindings, self.peer, self.block = (
            self.agent.native,
            self.agent.bindings,
            seen.incarnation,
            block,
        )
        mine, theirs = Region.of(bytearray(block * COUNT)), seen.regions[0]
        self.agent.register(mine)
        self.native.loadRemoteMD(msgspec.msgpack.decode(seen.blob, type=wire.Blob).metadata)
        self.starts = mine.address, theirs.address
        self.lists = [
            self.native.prepXferDlist(
                who, self._descriptors(tables.expanded(BlockTable.over(region, block, count=COUNT))), []
            )
            for who, region in ((self.bindings.NIXL_INIT_AGENT, mine), (self.peer, theirs))
        ]

    def _descriptors(self, rows: Any) -> Any:
        return self.bindings.nixlXferDList(self.bindings.DRAM_SEG, rows)

    def raw(self, local: Any, remote: Any) -> None:
        """Prepared lists, arrays of indices, looks without a pause that is worth the name."""
        native, (ours, theirs) = self.native, self.lists
        request = native.makeXferReq(self.bindings.NIXL_READ, ours, local, theirs, remote, b"", [], False)
        self._move(request, os.sched_yield)

    def anchor(self, local: list[int], remote: list[int]) -> None:
        """Lists for this transfer, and sleeps of half a millisecond."""
        ours, theirs = (
            self._descriptors([(start + block * self.block, self.block, 0) for block in ids])
            for start, ids in zip(self.starts, (local, remote), strict=True)
        )
        self._move(
            self.native.createXferReq(self.bindings.NIXL_READ, ours, theirs, self.peer, b"", []), half_a_millisecond
        )

    def _move(self, request: Any, pause: Callable[[], None]) -> None:
        state = self.native.postXferReq(request, b"")
        while state == self.bindings.NIXL_IN_PROG:
            pause()
            state = self.native.getXferStatus(request)
        self.native.releaseXferReq(request)


def half_a_millisecond() -> None:
    """How engines wait."""
    time.sleep(0.5e-3)


def by_tensorway(endpoint: Any, description: bytes, block: int) -> Read:
    """A route to the same region, and the waist's read."""
    from tensorway.transport import BlockTable

    region = endpoint.register(bytearray(block * COUNT)).regions[0]
    peer = endpoint.connect(description)
    tables = BlockTable.over(region, block, count=COUNT), BlockTable.over(peer.regions[0], block, count=COUNT)
    route = endpoint.prepare(peer, *tables)
    return lambda local, remote: endpoint.read(route, local, remote).wait()


def seconds(read: Callable[[Any, Any], None], ids: Any, burst: int) -> float:
    """The median of a burst of reads, one right after the other; a burst of one follows a pause."""
    time.sleep(GAP)
    taken = []
    for _ in range(burst):
        started = time.perf_counter()
        read(*ids)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def turns(
    reads: list[Callable[[Any, Any], None]], ids: list[Any], count: int, burst: int = 1
) -> list[tuple[float, ...]]:
    """So many turns, each a burst of reads in every way; the first ones set up what stays."""
    rows = [tuple(seconds(read, each, burst) for read, each in zip(reads, ids, strict=True)) for _ in range(count + 5)]
    return rows[5:]


def compare(title: str, rows: list[tuple[float, ...]]) -> float:
    """Print what one way takes beside the others; returns the seconds that the waist adds to raw."""
    anchor, ours, raw = (statistics.median(column) * 1e6 for column in zip(*rows, strict=True))
    print(f"{title}: raw {raw:.0f} us, tensorway {ours:.0f} us, the anchor's way {anchor:.0f} us")
    to_ours, to_raw = (statistics.median(row[0] / row[number] for row in rows) for number in (1, 2))
    print(f"{title}: the anchor's way takes {to_ours:.1f} x tensorway, and {to_raw:.1f} x raw, as much as can be")
    added = statistics.median(row[1] - row[2] for row in rows)
    print(f"{title}: the waist adds {added * 1e6:.1f} us to a transfer")
    return added


def measure(lane: str, options: dict[str, Any], count: int) -> None:
    """Print the rows of one lane."""
    import numpy

    import tensorway
    from tensorway.testing import PeerProcess

    theirs = {**options, "progress_interval_us": 0} if "--spinning" in sys.argv else options
    peer, endpoint = PeerProcess("nixl", theirs), tensorway.create("transport", "nixl", options)
    peer.register(4096 * COUNT, seed=1)
    description, ids = peer.describe(), {}
    for number in (1, MANY):
        lists = [[2 * block for block in random.Random(seed).sample(range(COUNT // 2), number)] for seed in (1, 2)]
        ids[number] = lists, [numpy.array(each, dtype=numpy.int32) for each in lists]
    waist, native = by_tensorway(endpoint, description, 4096), Native(description, options, 4096)
    (lists, arrays), reads = ids[1], [native.anchor, waist, native.raw]
    ways = [lists, lists, arrays]
    compare(f"{lane}, 4 KiB, one after the other", turns(reads, ways, count // 3, BURST))
    added = compare(f"{lane}, 4 KiB, after a pause of 2 ms", turns(reads, ways, count))
    waist, native = by_tensorway(endpoint, description, SMALL), Native(description, options, SMALL)
    rows = turns([waist, native.raw], list(ids[MANY]), count // 4)
    each = (statistics.median(ours - raw for ours, raw in rows) - added) / MANY
    print(f"{lane}: of a transfer of {MANY} blocks, it adds {each * 1e6:.3f} us to each")
    endpoint.close()
    peer.close()


def main() -> None:
    """Print some rows per lane."""
    from tensorway_nixl.library import packages

    if not any(importlib.util.find_spec(name) for name in packages()):
        print("NIXL is not installed here: nothing to compare. pip install nixl-cu12")
        return
    for lane, options in LANES.items():
        measure(lane, options, 60 if "--short" in sys.argv else 1000)


if __name__ == "__main__":
    main()
