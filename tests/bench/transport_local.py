"""What a byte over `local` costs against a memmove of as many in the same run, and what a transfer costs beside them.

    python tests/bench/transport_local.py [--short]

Two processes; blocks in random order. CPU seconds of the reading process (the peer's process does nothing for a
read), as paired ratios: the machine is shared, and each pair is measured within the same tenth of a second.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable

import tensorway
from tensorway.testing import PeerProcess
from tensorway.transport import BlockTable

SIZES = ((4 << 10, 4096), (16 << 10, 2048), (64 << 10, 1024), (1 << 20, 64))


def cpu(call: Callable[[], object]) -> float:
    """CPU seconds of this process for one call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def ratio(ours: Callable[[], object], theirs: Callable[[], object], pairs: int) -> str:
    """The median of paired ratios, with the smallest and the largest."""
    found = sorted(cpu(ours) / cpu(theirs) for _ in range(pairs))
    return f"{statistics.median(found):5.2f} x memmove   ({found[0]:.2f} to {found[-1]:.2f})"


def bytes_cost(peer: PeerProcess, pairs: int) -> None:
    """CPU per byte, for several block sizes."""
    for number, (block, count) in enumerate(SIZES):
        nbytes = block * count
        peer.register(nbytes, seed=number)
        mine, source, target = bytearray(nbytes), bytearray(nbytes), bytearray(nbytes)
        with tensorway.create("transport", "local") as transport:
            other = transport.connect(peer.describe())
            here = transport.register(mine).regions[0]
            tables = BlockTable.over(here, block), BlockTable.over(other.regions[number], block)
            route, ids = transport.prepare(other, *tables), random.Random(1).sample(range(count), count)

            def read(route: object = route, ids: list[int] = ids, transport: object = transport) -> None:
                transport.read(route, ids, ids).wait()  # type: ignore[attr-defined]

            def copy(target: bytearray = target, source: bytearray = source) -> None:
                memoryview(target)[:] = source

            read()
            copy()
            print(f"read of {count:>5} blocks of {block >> 10:>4} KiB: {ratio(read, copy, pairs)}")


def transfer_cost(peer: PeerProcess, rounds: int) -> None:
    """Wall time of the smallest transfer, and CPU of an idle second."""
    peer.register(1 << 20)
    with tensorway.create("transport", "local") as transport:
        other, here = transport.connect(peer.describe()), transport.register(bytearray(1 << 20)).regions[0]
        block = 4 << 10
        route = transport.prepare(other, BlockTable.over(here, block), BlockTable.over(other.regions[0], block))
        started = time.perf_counter()
        for _ in range(rounds):
            transport.read(route, [0], [1]).wait()
        print(
            f"one 4 KiB block: {(time.perf_counter() - started) / rounds * 1e6:.1f} us each, from the call to the end"
        )
        idle = cpu(lambda: time.sleep(1))
        print(f"an idle endpoint: {idle:.2%} of a core")


def main() -> None:
    """Print all rows."""
    short = "--short" in sys.argv
    peer = PeerProcess("local")
    try:
        bytes_cost(peer, 7 if short else 51)
        transfer_cost(peer, 500 if short else 20_000)
    finally:
        peer.close()


if __name__ == "__main__":
    main()
