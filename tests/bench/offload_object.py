"""What the tier `object` costs beside obstore alone: the same bytes, from and to the same store, as many at once.

    python tests/bench/offload_object.py [--short]

The store is an S3 server of this machine (moto's, which is slow itself), and a folder by way of obstore. obstore alone
puts and gets objects of the same sizes from one event loop that it keeps. Both go in turns, and what is printed are
medians of ratios within a turn: the machine is shared. CPU is that of this process, all threads: it is what an engine
loses. The last rows say what packing blocks into one object would change, which the tier does not do.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import attrs

from tensorway.offload import OffloadKey, TierContext, make_offload_key

AT_ONCE = 32
LONG = 600.0


@attrs.frozen
class Took:
    """Seconds of one turn, by the wall and of this process' CPU."""

    wall: float
    cpu: float


def timed(work: Callable[[], object]) -> Took:
    """Do it."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Took(time.perf_counter() - wall, time.process_time() - cpu)


async def at_once(works: Sequence[Callable[[], Awaitable[object]]]) -> None:
    """All of them, so many at a time."""
    left = iter(works)

    async def worker() -> None:
        for work in left:
            await work()

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))


class Raw:
    """obstore alone, with an event loop."""

    def __init__(self, store: Any) -> None:
        self.store, self.loop = store, asyncio.new_event_loop()

    def put(self, blocks: dict[str, memoryview]) -> None:
        """One object for each."""
        put = self.store.put_async
        works = [lambda name=name: put(name, blocks[name], use_multipart=False) for name in blocks]
        self.loop.run_until_complete(at_once(works))

    def get(self, buffers: dict[str, memoryview]) -> None:
        """Whole objects."""

        async def one(name: str) -> None:
            result = await self.store.get_async(name)
            buffers[name][:] = memoryview(await result.bytes_async())

        self.loop.run_until_complete(at_once([lambda name=name: one(name) for name in buffers]))

    def ranges(self, name: str, buffers: Sequence[tuple[int, memoryview]]) -> None:
        """Parts of one object."""

        async def one(at: int, buffer: memoryview) -> None:
            buffer[:] = memoryview(await self.store.get_range_async(name, start=at, length=len(buffer)))

        self.loop.run_until_complete(at_once([lambda part=part: one(*part) for part in buffers]))


def compare(what: str, options: dict[str, Any], count: int, nbytes: int, turns: int) -> None:
    """Puts and gets of so many new blocks by the tier and by obstore, in turns."""
    from tensorway_object.options import ObjectOptions
    from tensorway_object.stores import store_of
    from tensorway_object.tier import ObjectTier

    made = ObjectOptions(**options, concurrency=AT_ONCE)
    raw = Raw(store_of(made))
    tier = ObjectTier.open(made, TierContext("bench", os.urandom(16), (nbytes,)))
    ratios: dict[str, list[tuple[float, float, float]]] = {"put": [], "get": []}
    try:
        for turn in range(turns + 1):
            keys = [make_offload_key(os.urandom(32)) for _ in range(count)]
            blocks = {key: memoryview(os.urandom(nbytes)) for key in keys}
            into = {key: memoryview(bytearray(nbytes)) for key in keys}
            for way, found in turn_of(tier, raw, blocks, into, turn).items():
                if turn:  # the first connects
                    ours, beside = found
                    rate = count * nbytes / ours.wall / 1e6
                    ratios[way].append((beside.wall / ours.wall, ours.cpu / beside.cpu, rate))
    finally:
        tier.close()
    for way, rows in ratios.items():
        rate, cpu, speed = (statistics.median(column) for column in zip(*rows, strict=True))
        print(
            f"{what}, {way} {count} x {nbytes >> 10} KiB, {AT_ONCE} at once: {rate:.2f} of obstore alone "
            f"({min(rows)[0]:.2f} to {max(rows)[0]:.2f}, {turns} pairs), {cpu:.2f} times its CPU; {speed:,.0f} MB/s"
        )


def turn_of(
    tier: Any, raw: Raw, blocks: dict[OffloadKey, memoryview], into: dict[OffloadKey, memoryview], turn: int
) -> dict[str, tuple[Took, Took]]:
    """What putting and getting took us and obstore; who begins changes."""
    plain = {f"raw/{turn}/{key.hex()}": block for key, block in blocks.items()}
    back = {f"raw/{turn}/{key.hex()}": block for key, block in into.items()}
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "put": (lambda: done(tier.put(list(blocks.items()), LONG)), lambda: raw.put(plain)),
        "get": (lambda: done(tier.get(list(into.items()), LONG)), lambda: raw.get(back)),
    }
    found = {}
    for way, (ours, theirs) in ways.items():
        first, second = (ours, theirs) if turn % 2 else (theirs, ours)
        took = [timed(first), timed(second)]
        found[way] = (took[0], took[1]) if turn % 2 else (took[1], took[0])
        if way == "get":
            assert all(into[key] == blocks[key] for key in blocks), "other bytes came back than were stored"
    return found


def done(outcomes: Sequence[str]) -> None:
    """Nothing else is timed."""
    assert set(outcomes) == {"done"}, set(outcomes)


def packing(what: str, options: dict[str, Any], count: int, nbytes: int, turns: int) -> None:
    """By obstore alone: an object for each block, or one object for all and one that says where each is."""
    from tensorway_object.options import ObjectOptions
    from tensorway_object.stores import store_of

    raw, rows = Raw(store_of(ObjectOptions(**options))), []
    for turn in range(turns + 1):
        blocks = {f"each/{turn}/{number}": memoryview(os.urandom(nbytes)) for number in range(count)}
        buffers = {name: memoryview(bytearray(nbytes)) for name in random.sample(list(blocks), count)}
        whole = memoryview(b"".join(blocks.values()))
        parts = [(number * nbytes, memoryview(bytearray(nbytes))) for number in random.sample(range(count), count)]
        each = timed(lambda: raw.put(blocks)).wall, timed(lambda: raw.get(buffers)).wall  # noqa: B023 - now
        packed = (
            timed(lambda: raw.put({f"pack/{turn}": whole, f"index/{turn}": whole[: 64 * count]})).wall,  # noqa: B023
            timed(lambda: raw.ranges(f"pack/{turn}", parts)).wall,  # noqa: B023
        )
        if turn:
            rows.append((each[0] / packed[0], each[1] / packed[1]))
    put, get = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"{what}, {count} x {nbytes >> 10} KiB in one object and an index: {put:.2f} times as fast to put, "
        f"{get:.2f} times to get one by one in random order"
    )


def main() -> None:
    """Print all rows; of what is missing, that it is."""
    short = "--short" in sys.argv
    if importlib.util.find_spec("obstore") is None:
        print("obstore is not here: pip install obstore; nothing was measured")
        return
    shapes = [(64, 64 << 10), (32, 1 << 20)] if short else [(256, 16 << 10), (256, 64 << 10), (64, 1 << 20)]
    turns = 3 if short else 9
    with tempfile.TemporaryDirectory() as folder:
        stores = [("folder", {"url": f"file://{folder}/store"})]
        for what, options in stores:
            for count, nbytes in shapes:
                compare(what, options, count, nbytes, turns)
        if importlib.util.find_spec("moto") is None:
            print("moto is not here: pip install 'moto[server]'; nothing was measured over S3")
            return
        from tensorway.testing import launching
        from tensorway_object.testing.servers import S3, options_at

        (Path(folder) / "s3").mkdir()
        with launching(S3, Path(folder) / "s3") as launch:
            server = launch()
            options = options_at(server.port, server.bucket("bench"))
            for count, nbytes in shapes:
                compare("S3 of this machine", options, count, nbytes, turns)
            for count, nbytes in [(64, 64 << 10)] if short else [(64, 64 << 10), (32, 1 << 20)]:
                packing("S3 of this machine", options, count, nbytes, turns)


if __name__ == "__main__":
    main()
