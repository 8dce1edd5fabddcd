"""Rows of a primary tier with content that follows from keys, and a clock that a test moves.

May import the core's offload room.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

from tensorway.memory import Region, shared
from tensorway.offload import OffloadKey, make_offload_key

#: Seconds that a test waits for what threads do; only who waits in vain needs them.
PATIENCE = 60.0


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rows:
    """So many rows of as many bytes, in memory that other processes can read."""

    def __init__(self, count: int, nbytes: int = 256) -> None:
        self.memory, self.nbytes = shared(count * nbytes), nbytes
        self.region = Region.of(self.memory)

    def row(self, key: OffloadKey, row: int) -> memoryview:
        """The bytes of one."""
        return self.memory[row * self.nbytes : (row + 1) * self.nbytes]

    def fill(self, key: OffloadKey, row: int) -> None:
        """Write what a block of this key holds."""
        self.row(key, row)[:] = content(key, self.nbytes)

    def right(self, key: OffloadKey, row: int) -> bool:
        """Whether it holds that."""
        return bytes(self.row(key, row)) == content(key, self.nbytes)


def content(key: OffloadKey, nbytes: int) -> bytes:
    """What a block of this key holds: equal keys are equal bytes, and no two keys have the same."""
    some = hashlib.blake2b(key).digest()
    return (some * (nbytes // len(some) + 1))[:nbytes]


def keys_of(name: str, count: int, salt: str = "") -> list[OffloadKey]:
    """The keys of a sequence."""
    return [make_offload_key(hashlib.sha256(f"{name} {place}".encode()).digest(), 0, salt) for place in range(count)]


def until(true: Callable[[], Any], step: Callable[[], object] = lambda: None) -> Any:
    """What this says as soon as it is true; each look follows a step."""
    end = time.monotonic() + PATIENCE
    while True:
        step()
        if found := true():
            return found
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.001)
