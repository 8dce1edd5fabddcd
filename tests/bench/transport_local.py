"""What a byte over `local` costs beside what else moves the same bytes between two processes, and an idle endpoint.

    python tests/bench/transport_local.py [--short]

What blocks of several lengths and small transfers cost is `tensorway bench run transport`. Here they are of 64 KiB in
random order, over each lane: `cma`, where the kernel copies, and `shm`, where the memory of both is of
`tensorway.memory.shared`; beside the kernel's call itself, memmove, and NIXL. CPU seconds of the reading process (the
peer's process does nothing for a read), as ratios within a turn: the machine is shared.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable
from typing import Any

import tensorway
from tensorway.memory import Region, shared
from tensorway.testing import PeerProcess
from tensorway.transport import BlockTable, Peer


def cpu(call: Callable[[], object]) -> float:
    """CPU seconds of this process for one call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def at_length(peer: PeerProcess, sharing: PeerProcess, pairs: int) -> None:
    """64 KiB x 4,095 in random order, beside what else moves the same bytes between two processes, in turns."""
    block, count = 64 << 10, 4095
    number, shared_number = (each.register(block * count, seed=9) for each in (peer, sharing))
    orders = [random.Random(seed).sample(range(count), count) for seed in (1, 2)]
    mine, source, target = (bytearray(b"\1" * (block * count)) for _ in range(3))
    starts = [ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory)) for memory in (target, source)]
    ways: dict[str, Callable[[], object]] = {}
    with tensorway.create("transport", "local") as transport:
        other, here = transport.connect(peer.describe()), transport.register(mine).regions[0]
        tables = BlockTable.over(here, block), BlockTable.over(other.regions[number], block)
        route = transport.prepare(other, *tables)
        vectors = [table.vector(array("q", ids)) for table, ids in zip(tables, orders, strict=True)]
        kernel = ctypes.CDLL(None).process_vm_readv

        def raw() -> None:
            for first in range(0, 2 * count, 2048):
                parts = [vector[first : first + 2048] for vector in vectors]
                lists = [(ctypes.c_uint64 * len(part)).from_buffer(part) for part in parts]
                kernel(peer.pid, lists[0], len(parts[0]) // 2, lists[1], len(parts[1]) // 2, 0)

        def blocks() -> None:
            for to, start in zip(*orders, strict=True):
                ctypes.memmove(starts[0] + to * block, starts[1] + start * block, block)

        ways["local, lane cma"] = lambda: transport.read(route, *orders).wait()
        other = transport.connect(sharing.describe())
        for memory, name in ((shared(block * count), "both shared"), (mine, "only the peer's shared")):
            here, there = transport.register(memory).regions[0], other.regions[shared_number]
            ways[f"local, lane {other.lane}, {name}"] = reader(transport, other, here, there, block, orders)
        ways["process_vm_readv itself"] = raw
        ways["memmove of the same blocks in this process"] = blocks
        with contextlib.ExitStack() as stack:
            if nixl := by_nixl(stack, orders, block, count):
                ways["tensorway over NIXL and CMA"] = nixl
            found: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(pairs + 1):
                base = cpu(lambda: ctypes.memmove(*starts, block * count))
                for name, way in ways.items():
                    found[name].append(cpu(way) / base)
    for name, ratios in found.items():
        print(f"64 KiB x {count} at random, {name}: {statistics.median(ratios[1:]):.2f} x memmove of all at once")


def reader(
    transport: Any, other: Peer, here: Region, there: Region, block: int, orders: list[list[int]]
) -> Callable[[], object]:
    """Reads all blocks of a region, in these orders here and there."""
    route = transport.prepare(other, BlockTable.over(here, block), BlockTable.over(there, block))
    return lambda: transport.read(route, *orders).wait()


def by_nixl(
    stack: contextlib.ExitStack, orders: list[list[int]], block: int, count: int
) -> Callable[[], object] | None:
    """The same read over NIXL, where it is installed."""
    if not any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13")):
        return None
    peer = PeerProcess("nixl")
    stack.callback(peer.close)
    peer.register(block * count, seed=9)
    transport = stack.enter_context(tensorway.create("transport", "nixl"))
    other, here = transport.connect(peer.describe()), transport.register(bytearray(block * count)).regions[0]
    return reader(transport, other, here, other.regions[0], block, orders)


def idle() -> None:
    """CPU of an endpoint that has nothing to do, for a second."""
    with tensorway.create("transport", "local") as transport:
        transport.register(bytearray(1 << 20))
        print(f"an idle endpoint: {cpu(lambda: time.sleep(1)):.2%} of a core")


def main() -> None:
    """Print all rows."""
    short = "--short" in sys.argv
    peer, sharing = PeerProcess("local"), PeerProcess("local", shared_memory=True)
    try:
        at_length(peer, sharing, 5 if short else 21)
        idle()
    finally:
        peer.close()
        sharing.close()


if __name__ == "__main__":
    main()
