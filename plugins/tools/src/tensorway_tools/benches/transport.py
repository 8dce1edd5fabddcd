"""What a byte and a transfer cost over each transport that works here, beside a memmove and a pipe.

Of the dist only an entry point refers to this module; it may import the core and `benchmark`.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, Final

from tensorway.errors import TransferFailed
from tensorway.plugins import host
from tensorway.testing.peer import PeerProcess, allocated, content, digest
from tensorway.transport import BlockTable
from tensorway_tools.benchmark import Benchmark, Row, Run

#: Length of a block and how many are read in one transfer, in random order.
_SIZES: Final = ((4 << 10, 4096), (64 << 10, 1024), (1 << 20, 64))
_SMALL: Final = 4 << 10
#: Small transfers in a round: one alone is as long as the clock is fine.
_MANY: Final = 50
_MEMMOVE: Final = "a memmove of as many bytes"
_PIPE: Final = "a byte there and back through a pipe"


def rows(run: Run) -> Iterator[Row]:
    """Over each transport, and over `local` with memory that both processes share."""
    host().probe_all("transport")
    usable = [slot for slot in host().slots("transport") if slot.record is None and slot.offer and slot.offer.factory]
    for slot in usable:
        for shared in (False, True) if slot.declaration.name == "local" else (False,):
            peer = PeerProcess(slot.label, shared_memory=shared)
            try:
                yield from _over(run, slot.label, peer, shared=shared)
            finally:
                peer.close()


def _over(run: Run, name: str, peer: PeerProcess, *, shared: bool) -> Iterator[Row]:
    sizes = [(block, run.either(count, count // 16)) for block, count in _SIZES]
    for number, (block, count) in enumerate(sizes):
        peer.register(block * count, seed=number)
    with run.create("transport", name) as transport:
        other = transport.connect(peer.describe())
        title = f"{transport.name}, lane {other.lane}"
        for number, (block, count) in enumerate(sizes):
            nbytes = block * count
            # All pages are there: what was never written to is one page of zeros for the kernel.
            mine = allocated(bytearray(b"\1" * nbytes), shared_memory=shared)
            read = _reader(transport, other, mine, other.regions[number], block)
            ids = random.Random(1).sample(range(count), count)
            what = f"{title}: reading blocks of {block >> 10} KiB in random order"
            yield run.measured(
                what, lambda read=read, ids=ids: read(ids), _memmove(nbytes),  # type: ignore[misc]
                to=_MEMMOVE, rounds=run.either(15, 5), nbytes=nbytes,
            )  # fmt: skip
            if digest(mine) != digest(content(number, nbytes)):
                raise TransferFailed(f"{what} was measured.", "Other bytes arrived than were sent.", "Report this.")
        read = _reader(transport, other, bytearray(1 << 20), other.regions[-1], _SMALL)
        with _Pipe() as pipe:
            yield run.measured(
                f"{title}: one block of {_SMALL >> 10} KiB", lambda: [read([3]) for _ in range(_MANY)],
                lambda: [pipe.there_and_back() for _ in range(_MANY)], to=_PIPE, rounds=run.either(30, 5),
            )  # fmt: skip


def _reader(transport: Any, other: Any, mine: Any, there: Any, block: int) -> Callable[[list[int]], object]:
    here = transport.register(mine).regions[0]
    route = transport.prepare(other, BlockTable.over(here, block), BlockTable.over(there, block))
    return lambda ids: transport.read(route, ids, ids).wait()


def _memmove(nbytes: int) -> Callable[[], object]:
    source, target = memoryview(bytearray(b"\1" * nbytes)), memoryview(bytearray(b"\1" * nbytes))

    def copy() -> None:
        target[:] = source

    return copy


class _Pipe:
    """Another process that gives back what it gets: what two processes cannot be faster than without shared memory."""

    def __enter__(self) -> _Pipe:
        self._process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        return self

    def there_and_back(self) -> bytes:
        """One byte."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(b"x")
        return self._process.stdout.read(1)

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()


BENCH: Final = Benchmark("Reads from another process over each transport, beside a memmove and a pipe.", rows)
