"""Where NCCL is and whether it has what we call: ctypes only, no torch, no device context.

May import nothing of tensorway. For the probe's child process: loading the library runs its constructors.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs

#: The oldest NCCL with ncclCommInitRankConfig in the form that we call, communicator splitting and non-blocking abort.
OLDEST: Final = (2, 18)
#: What the communicator will call.
SYMBOLS: Final = (
    "ncclGetUniqueId",
    "ncclCommInitRankConfig",
    "ncclSend",
    "ncclRecv",
    "ncclGroupStart",
    "ncclGroupEnd",
    "ncclCommAbort",
    "ncclCommGetAsyncError",
    "ncclGetErrorString",
    "ncclGetLastError",
)
#: Kind of device -> its library's file names; RCCL has NCCL's interface.
FILES: Final = {"cuda": ("libnccl.so.2",), "rocm": ("librccl.so.1", "librccl.so")}


@attrs.frozen
class Nccl:
    """A library that loads."""

    path: str
    version: tuple[int, int, int]
    #: What it lacks of `SYMBOLS`.
    missing: tuple[str, ...]

    @property
    def dotted(self) -> str:
        """The version for people."""
        return ".".join(map(str, self.version))


@attrs.frozen
class NotFound:
    """No library loads; `broken` says what the loader said about the first that is there, if any is."""

    broken: str = ""


def find(kind: str, path: Sequence[str] | None = None) -> Nccl | NotFound:
    """The first library that loads, for one kind of device; wheels and torch's own on `path` before the system's."""
    broken = ""
    for candidate in _candidates(FILES[kind], sys.path if path is None else path):
        try:
            return _examine(candidate)
        except (OSError, AttributeError) as error:
            # The bare names at the end are a question to the loader; that it has no answer is not worth telling.
            if "/" in candidate:
                broken = broken or " ".join(str(error).split())[:160]
    return NotFound(broken)


def _candidates(files: Sequence[str], path: Sequence[str]) -> Iterator[str]:
    for entry in path:
        for folder in ("nvidia/nccl/lib", "torch/lib"):
            for file in files:
                library = str(Path(entry, folder, file))
                if os.path.isfile(library):  # noqa: PTH113 - Path.is_file raises on a folder that we may not enter
                    yield library
    # No folder: the dynamic loader looks through LD_LIBRARY_PATH and its own cache.
    yield from files


def _examine(path: str) -> Nccl:
    library = ctypes.CDLL(path)
    code = ctypes.c_int(0)
    status = library.ncclGetVersion(ctypes.byref(code))
    if status != 0:
        raise OSError(f"ncclGetVersion returned {status} in {path}")
    missing = tuple(name for name in SYMBOLS if not hasattr(library, name))
    return Nccl(path, _version(code.value), missing)


def _version(code: int) -> tuple[int, int, int]:
    # Two digits for the minor version since 2.9 (21803 is 2.18.3), one before (2804 is 2.8.4).
    base = 10_000 if code >= 10_000 else 1_000
    return code // base, code % base // 100, code % 100
