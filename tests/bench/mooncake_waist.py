"""What the waist costs over Mooncake: tensorway's read against a hand-written loop over an engine, in the same minute.

    python tests/bench/mooncake_waist.py [--short]

Two processes of one host over TCP, 64 MiB in blocks of 64 KiB, once in random order, once in order, where neighbors
can be joined. The loop is the one that Mooncake's users write: all blocks in one batch, one blocking call, no check of
anything, no deadline. Each pair of runs is timed back to back, with the processor time of this process beside it, and
medians of the pairs' ratios are what is printed: the machine is shared.
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

# One block less than 1,024: a batch of more than two thousand operations fails in Mooncake.
BLOCK, COUNT = 65_536, 1023
Read = Callable[[list[int], list[int]], None]


def by_hand(description: bytes) -> Read:
    """An engine of its own that reads blocks of the peer's first region."""
    import msgspec

    from tensorway.memory import Region
    from tensorway.transport.description import decode
    from tensorway_mooncake import wire
    from tensorway_mooncake.library import load

    seen = decode(description, "mooncake")
    blob = msgspec.msgpack.decode(seen.blob, type=wire.Blob)
    engine = load().symbols["Engine"]()  # type: ignore[union-attr]
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    mine = Region.of(bytearray(BLOCK * COUNT))
    assert engine.register_memory(mine.address, mine.nbytes) == 0
    segment, theirs = f"{blob.address}:{blob.port}", seen.regions[0]

    def read(local: list[int], remote: list[int]) -> None:
        here = [mine.address + BLOCK * block for block in local]
        there = [theirs.address + BLOCK * block for block in remote]
        assert engine.batch_transfer_sync_read(segment, here, there, [BLOCK] * len(here)) == 0

    return read


def by_tensorway(endpoint: Any, description: bytes) -> Read:
    """A route to the same region, and the waist's read."""
    from tensorway.transport import BlockTable

    region = endpoint.register(bytearray(BLOCK * COUNT)).regions[0]
    peer = endpoint.connect(description)
    route = endpoint.prepare(peer, BlockTable.over(region, BLOCK), BlockTable.over(peer.regions[0], BLOCK))
    return lambda local, remote: endpoint.read(route, array("q", local), array("q", remote)).wait()


def seconds(read: Read, local: list[int], remote: list[int]) -> tuple[float, float]:
    """How long one read of these blocks takes, and how much of the processor in this process."""
    started, used = time.perf_counter(), time.process_time()
    read(local, remote)
    return time.perf_counter() - started, time.process_time() - used


def main() -> None:
    """Print a row per order."""
    if importlib.util.find_spec("mooncake") is None:
        print("Mooncake is not installed here: nothing to compare. pip install mooncake-transfer-engine-non-cuda")
        return
    import tensorway
    from tensorway.errors import BackendUnavailable
    from tensorway.testing import PeerProcess

    try:
        endpoint: Any = tensorway.create("transport", "mooncake")
    except BackendUnavailable as error:
        print(f"Mooncake cannot be used here: nothing to compare. {error.true}")
        return
    peer = PeerProcess("mooncake")
    peer.register(BLOCK * COUNT, seed=1)
    waist, loop = by_tensorway(endpoint, peer.describe()), by_hand(peer.describe())
    pairs = 7 if "--short" in sys.argv else 31
    shuffled = [random.Random(seed).sample(range(COUNT), COUNT) for seed in (1, 2)]
    for name, order in {"random": shuffled, "in order": [list(range(COUNT))] * 2}.items():
        times = [(seconds(waist, *order), seconds(loop, *order)) for _ in range(pairs + 2)][2:]
        wall, used = (statistics.median(ours[i] / theirs[i] for ours, theirs in times) for i in (0, 1))
        best = BLOCK * COUNT / min(ours[0] for ours, _ in times) / 1e9
        print(
            f"{name}: tensorway takes {wall:.2f} x the hand-written loop, and {used:.2f} x its processor time   "
            f"({best:.2f} GB/s at best, {pairs} pairs)"
        )
    endpoint.close()
    peer.close()


if __name__ == "__main__":
    main()
