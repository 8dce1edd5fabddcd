"""Blocks to store in a tier, buffers to read them into, damage to its files, and calls that have to end.

Room `testing`; may import `offload` and the rooms below. The tests are in `offload_tiers`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from tensorway.offload import OffloadKey
from tensorway.testing.offload_ground import block_of

#: A page, one byte, one more than a page, many pages and a bit.
NBYTES: Final = (4096, 1, 4097, 100_003)
_GUARD: Final = 0xA5

Outcomes = Sequence[str]


class Reading:
    """Buffers at odd addresses, with something around them that nobody may touch."""

    def __init__(self, keys: Sequence[OffloadKey], nbytes: Sequence[int] | None = None) -> None:
        lengths = nbytes or [len(block_of(key, NBYTES)) for key in keys]
        self._all = [bytearray([_GUARD]) * (length + 2) for length in lengths]
        self.buffers = [memoryview(each)[1:-1] for each in self._all]
        self.items = list(zip(keys, self.buffers, strict=True))

    def wrong(self, outcomes: Outcomes) -> str:
        """What is not as the outcomes say; empty if all is."""
        for (key, buffer), whole, outcome in zip(self.items, self._all, outcomes, strict=True):
            if (whole[0], whole[-1]) != (_GUARD, _GUARD):
                return f"a byte beside the buffer of {key.hex()} was written to"
            if outcome == "done" and buffer != block_of(key, NBYTES):
                return f"bytes of {key.hex()} are wrong"
        return ""


def sources(keys: Sequence[OffloadKey]) -> list[tuple[OffloadKey, memoryview]]:
    """Blocks to store, in memory that cannot be written to."""
    return [(key, memoryview(block_of(key, NBYTES))) for key in keys]


def damage(folder: Path) -> int:
    """Change every 61st byte of every file; how many files there were."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    for path in files:
        data = bytearray(path.read_bytes())
        data[::61] = bytes(byte ^ 0xFF for byte in data[::61])
        path.write_bytes(data)
    return len(files)


def within(seconds: float, call: Callable[[], Any], what: str) -> Any:
    """What a call returns; a test fails if it has not ended after a time that no deadline explains."""
    answer: list[Any] = []
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            answer.append(call())
        except BaseException as error:  # it is raised in the test
            raised.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"{what} goes on long after its deadline"
    if raised:
        raise AssertionError(f"{what} raised: a deadline is an outcome, and no error") from raised[0]
    return answer[0]
