"""What is done with memory before it is used: huge pages, taking all of it at once, and pinning it for a device.

May import the core's ground and this package's way to torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import time
from collections.abc import Callable
from typing import Final

import attrs

from tensorway._logging import logger
from tensorway.errors import DeadlineExceeded, MemoryInvalid
from tensorway.memory import PAGE, Region, SharedFile, libc
from tensorway_cpu.devices import loaded_torch

_log = logger("offload")
#: Bytes that are taken, or pinned, at once: the deadline is looked at in between.
_TAKEN: Final = 64 << 20
_PINNED: Final = 1 << 30
#: Python has no name for it before 3.14: take these pages, and be told if there are none. Linux 5.14 has it.
_POPULATE_WRITE: Final = 23
#: A register function returns it for success.
_DONE: Final = 0


def settle(buffer: memoryview, *, huge_pages: bool, populate: bool, until: float) -> None:
    """Ask for huge pages, and take all memory now; raises `MemoryInvalid` if there is not so much."""
    region = Region.of(buffer)
    if huge_pages:
        libc().madvise(region.address, region.nbytes, mmap.MADV_HUGEPAGE)  # a wish: the kernel may not have any
    for begin in range(0, region.nbytes if populate else 0, _TAKEN):
        if time.monotonic() >= until:
            raise DeadlineExceeded(
                f"{region.nbytes:,} bytes of host memory were to be taken.",
                f"{begin:,} of them were when the time was over.",
                "Give a longer deadline, or leave `populate` out.",
            )
        _take(region, begin, min(_TAKEN, region.nbytes - begin))


def _take(region: Region, begin: int, nbytes: int) -> None:
    whole = -(-nbytes // PAGE) * PAGE
    if not libc().madvise(region.address + begin, whole, _POPULATE_WRITE):
        return
    code = ctypes.get_errno()
    if code == errno.EINVAL and (found := SharedFile.of(region)) is not None:  # an older kernel
        with contextlib.suppress(OSError):
            os.posix_fallocate(found[0].number, begin, whole)
            return
    raise MemoryInvalid(
        f"{region.nbytes:,} bytes of host memory were to be taken.",
        f"At {begin:,} of them the system had no more: {os.strerror(code)}.",
        "Set a smaller capacity, or look at the memory limit.",
    )


#: Of an address and a length; 0 if it did.
Register = Callable[[int, int], int]


@attrs.define
class Pinned:
    """What was pinned, piece by piece."""

    unregister: Callable[[int], int]
    pieces: list[int] = attrs.field(factory=list)

    def undo(self) -> None:
        """Let go of all of it."""
        while self.pieces:
            self.unregister(self.pieces.pop())


def pin(buffer: memoryview, row_bytes: int, wanted: bool | None) -> Pinned | None:
    """Pin memory if there is a device to copy from; `wanted`: raise if there is none, or do not pin."""
    torch = None if wanted is False else loaded_torch()
    if torch is None:
        if wanted:
            true, to_do = "The process has no torch with CUDA.", "Leave `pin` out, or import torch before."
            raise MemoryInvalid("Host memory was to be pinned.", true, to_do)
        return None
    runtime = torch.cuda.cudart()
    try:
        return pinned(
            Region.of(buffer),
            row_bytes,
            lambda address, nbytes: int(runtime.cudaHostRegister(address, nbytes, 0)),
            lambda address: int(runtime.cudaHostUnregister(address)),
        )
    except MemoryInvalid as error:
        if wanted:
            raise
        _log.warning("Host memory is not pinned, and copies take longer: %s", error.true)
        return None


def pinned(region: Region, row_bytes: int, register: Register, unregister: Callable[[int], int]) -> Pinned:
    """In pieces of whole rows; all of them or none."""
    each, done = max(1, _PINNED // row_bytes) * row_bytes, Pinned(unregister)
    for begin in range(0, region.nbytes, each):
        code = register(region.address + begin, min(each, region.nbytes - begin))
        if code != _DONE:
            done.undo()
            raise MemoryInvalid(
                f"{region.nbytes:,} bytes of host memory were to be pinned.",
                f"The device's runtime refused at {begin:,} of them, with code {code}.",
                "Look at `ulimit -l`, set a smaller capacity, or leave `pin` out.",
            )
        done.pieces.append(region.address + begin)
    return done
