"""What the waist costs over Mooncake: tensorway's read against a hand-written loop over an engine, in the same minute.

Of the dist only an entry point refers to this module, and `tensorway bench` runs it; it may import the core and its own
dist. Two processes of one host over TCP, once in random order, once in order, where neighbors can be joined. The loop
is the one that Mooncake's users write: all blocks in one batch, one blocking call, no check of anything, no deadline.
"""

from __future__ import annotations

import importlib.util
import random
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from tensorway.memory import Region
from tensorway.transport import BlockTable
from tensorway.transport.description import decode
from tensorway_mooncake import wire
from tensorway_mooncake.library import load
from tensorway_tools.benchmark import Benchmark, Row, Run

# One block less than 1,024: a batch of more than two thousand operations fails in Mooncake.
_BLOCK, _COUNT = 65_536, 1023
_Read = Callable[[list[int], list[int]], None]


def rows(run: Run) -> Iterator[Row]:
    """One for each order and each clock."""
    endpoint, peer = run.create("transport", "mooncake"), run.peer("mooncake")
    try:
        peer.register(_BLOCK * _COUNT, seed=1)
        waist, loop = _by_tensorway(endpoint, peer.describe()), _by_hand(peer.describe())
        shuffled = [random.Random(seed).sample(range(_COUNT), _COUNT) for seed in (1, 2)]
        for name, order in {"in random order": shuffled, "in order": [list(range(_COUNT))] * 2}.items():
            for clock in ("wall", "cpu"):
                yield run.measured(
                    f"reading 64 MiB in blocks of 64 KiB {name}, {clock}",
                    partial(waist, *order), partial(loop, *order),
                    to="a hand-written loop over Mooncake", rounds=run.either(15, 5), nbytes=_BLOCK * _COUNT,
                    clock=clock,
                )  # fmt: skip
    finally:
        endpoint.close()
        peer.close()


def _by_hand(description: bytes) -> _Read:
    """An engine of its own that reads blocks of the peer's first region."""
    seen = decode(description, "mooncake")
    blob = wire.DECODE_BLOB(seen.blob)
    engine = load().symbols["Engine"]()  # type: ignore[union-attr]
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    mine = Region.of(bytearray(_BLOCK * _COUNT))
    assert engine.register_memory(mine.address, mine.nbytes) == 0
    segment, theirs = f"{blob.address}:{blob.port}", seen.regions[0]

    def read(local: list[int], remote: list[int]) -> None:
        here = [mine.address + _BLOCK * block for block in local]
        there = [theirs.address + _BLOCK * block for block in remote]
        assert engine.batch_transfer_sync_read(segment, here, there, [_BLOCK] * len(here)) == 0

    return read


def _by_tensorway(endpoint: Any, description: bytes) -> _Read:
    """A route to the same region, and the waist's read."""
    region = endpoint.register(bytearray(_BLOCK * _COUNT)).regions[0]
    peer = endpoint.connect(description)
    route = endpoint.prepare(peer, BlockTable.over(region, _BLOCK), BlockTable.over(peer.regions[0], _BLOCK))
    return lambda local, remote: endpoint.read(route, array("q", local), array("q", remote)).wait()


def _missing() -> str:
    if importlib.util.find_spec("mooncake") is not None:
        return ""
    return "Mooncake is not installed: pip install mooncake-transfer-engine-non-cuda"


BENCH: Final = Benchmark("Reads over Mooncake through tensorway, beside a hand-written loop.", rows, _missing)
