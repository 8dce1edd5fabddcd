"""What the tier `object` costs beside obstore alone: the same bytes, from and to the same store, as many at once.

Of the dist only an entry point refers to this module, and `tensorway bench` runs it; it may import the core and its own
dist. The store is a folder by way of obstore, and an S3 server of this machine where moto is installed (which is slow
itself). obstore alone puts and gets objects of the same sizes from one event loop that it keeps.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tensorway.offload import OffloadKey, TierContext, make_offload_key
from tensorway_tools.benchmark import Benchmark, Row, Run

AT_ONCE: Final = 32
_LONG: Final = 600.0
#: How many blocks, and how long each is.
_SHAPES: Final = ((256, 16 << 10), (256, 64 << 10), (64, 1 << 20))


def rows(run: Run) -> Iterator[Row]:
    """A folder, and S3 where a server is here."""
    shapes = [(run.either(count, count // 8), nbytes) for count, nbytes in _SHAPES]
    with tempfile.TemporaryDirectory() as folder:
        for count, nbytes in shapes:
            yield from _compared(run, "a folder", {"url": f"file://{folder}/store"}, count, nbytes)
        if importlib.util.find_spec("moto") is None:
            return
        from tensorway.testing.servers import launching
        from tensorway_object.testing.servers import S3, options_at

        (Path(folder) / "s3").mkdir()
        with launching(S3, Path(folder) / "s3") as launch:
            server = launch()
            options = options_at(server.port, server.bucket("bench"))
            for count, nbytes in shapes:
                yield from _compared(run, "S3 of this machine", options, count, nbytes)


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

        self.loop.run_until_complete(at_once([lambda name=name: one(name) for name in buffers]))  # type: ignore[misc]

    def ranges(self, name: str, buffers: Sequence[tuple[int, memoryview]]) -> None:
        """Parts of one object."""

        async def one(at: int, buffer: memoryview) -> None:
            buffer[:] = memoryview(await self.store.get_range_async(name, start=at, length=len(buffer)))

        self.loop.run_until_complete(at_once([lambda part=part: one(*part) for part in buffers]))  # type: ignore[misc]


def _compared(run: Run, what: str, options: dict[str, Any], count: int, nbytes: int) -> Iterator[Row]:
    """Puts and gets of so many new blocks by the tier and by obstore, in turns."""
    from tensorway_object.options import ObjectOptions
    from tensorway_object.stores import store_of
    from tensorway_object.tier import ObjectTier

    made = ObjectOptions(**options, concurrency=AT_ONCE)
    raw = Raw(store_of(made))
    tier = ObjectTier.open(made, TierContext("bench", os.urandom(16), (nbytes,)))
    found: dict[str, list[tuple[float, float]]] = {"storing": [], "loading": []}
    try:
        for turn in range(run.either(9, 5) + 1):
            keys = [make_offload_key(os.urandom(32)) for _ in range(count)]
            blocks = {key: memoryview(os.urandom(nbytes)) for key in keys}
            into = {key: memoryview(bytearray(nbytes)) for key in keys}
            for way, took in _turn(tier, raw, blocks, into, turn).items():
                if turn:  # the first connects
                    found[way].append(took)
    finally:
        tier.close()
    for way, pairs in found.items():
        ours, reference = zip(*pairs, strict=True)
        name = f"{way} {count} blocks of {nbytes >> 10} KiB, {AT_ONCE} at once, in {what}"
        yield Row(name, "obstore alone", ours, reference, nbytes=count * nbytes)


def _turn(
    tier: Any, raw: Raw, blocks: dict[OffloadKey, memoryview], into: dict[OffloadKey, memoryview], turn: int
) -> dict[str, tuple[float, float]]:
    """What storing and loading took us and obstore; who begins changes."""
    plain = {f"raw/{turn}/{key.hex()}": block for key, block in blocks.items()}
    back = {f"raw/{turn}/{key.hex()}": block for key, block in into.items()}
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "storing": (lambda: _done(tier.put(list(blocks.items()), _LONG)), lambda: raw.put(plain)),
        "loading": (lambda: _done(tier.get(list(into.items()), _LONG)), lambda: raw.get(back)),
    }
    found = {}
    for way, pair in ways.items():
        took = {which: _timed(pair[which]) for which in ((0, 1) if turn % 2 else (1, 0))}
        found[way] = took[0], took[1]
    assert all(into[key] == blocks[key] for key in blocks), "other bytes came back than were stored"
    return found


def _timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _done(outcomes: Sequence[str]) -> None:
    """Nothing else is timed."""
    assert set(outcomes) == {"done"}, set(outcomes)


def _missing() -> str:
    here = importlib.util.find_spec("obstore") is not None
    return "" if here else "obstore is not installed: pip install 'tensorway[object]'"


BENCH: Final = Benchmark("Blocks in an object store, beside obstore alone.", rows, _missing)
