"""What containment costs: reads over `local` in a mover against the same reads without one, in the same minute.

    python tests/bench/contained.py [--short]

Two processes, shared memory on both sides. Each pair of runs is timed back to back, and the median of the pairs' ratios
is what is printed, with the smallest and the largest: the machine is shared.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable

import tensorway
from tensorway.memory import shared
from tensorway.testing import PeerProcess
from tensorway.transport import BlockTable

#: Length of a block, how many there are, how many of them one read moves, and reads in one run.
CASES = ((64 << 10, 256, 256, 1), (4 << 10, 256, 1, 200))


def reader(endpoint: object, peer: PeerProcess, block: int, count: int, blocks: int, reads: int) -> Callable[[], None]:
    """A call that reads so many blocks so often."""
    here = endpoint.register(shared(block * count)).regions[0]  # type: ignore[attr-defined]
    other = endpoint.connect(peer.describe())  # type: ignore[attr-defined]
    there = next(region for region in other.regions if region.nbytes == block * count)
    route = endpoint.prepare(other, BlockTable.over(here, block), BlockTable.over(there, block))  # type: ignore[attr-defined]
    local, remote = (random.Random(seed).sample(range(count), blocks) for seed in (1, 2))

    def read() -> None:
        for _ in range(reads):
            endpoint.read(route, local, remote).wait()  # type: ignore[attr-defined]

    read()
    return read


def seconds(call: Callable[[], None]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def processor(pid: int) -> float:
    """CPU seconds of a process so far."""
    with open(f"/proc/{pid}/stat") as stat:
        user, system = stat.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / 100


def main() -> None:
    """Print a row per case, and what an idle mover costs."""
    pairs = 15 if "--short" in sys.argv else 101
    peer = PeerProcess("local", shared_memory=True)
    try:
        for block, count, _, _ in CASES:
            peer.register(block * count, seed=1)
        with (
            tensorway.create("transport", "local", {"contained": True}) as contained,
            tensorway.create("transport", "local") as direct,
        ):
            for block, count, blocks, reads in CASES:
                calls = [reader(endpoint, peer, block, count, blocks, reads) for endpoint in (contained, direct)]
                times = [tuple(map(seconds, calls)) for _ in range(pairs)]
                ratios = sorted(ours / theirs for ours, theirs in times)
                ours, theirs = (statistics.median(column) / reads * 1e6 for column in zip(*times, strict=True))
                print(
                    f"read of {blocks:>3} blocks of {block >> 10:>2} KiB: {statistics.median(ratios):5.2f} x direct   "
                    f"({ratios[0]:.2f} to {ratios[-1]:.2f}; {ours:,.0f} us and {theirs:,.0f} us)"
                )
            time.sleep(0.1)
            pid = contained._fabric._life.process.pid
            before = processor(pid)
            time.sleep(2)
            print(f"an idle mover: {(processor(pid) - before) / 2:.1%} of a core")
    finally:
        peer.close()


if __name__ == "__main__":
    main()
