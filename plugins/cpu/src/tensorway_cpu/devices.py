"""Copying between rows and pages that the host cannot reach: by the engine's copier, or by CUDA itself.

May import the core's ground and this package's copies. torch is never imported: who has pages on a device has it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any, Final, Protocol

from tensorway.errors import TransferFailed, Unsupported
from tensorway.geometry import RankGeometry
from tensorway.memory import Copier, Region
from tensorway_cpu.copies import copy, pieces
from tensorway_cpu.pages import Move

_HOST: Final = "cpu"
_CUDA: Final = "cuda"


class Means(Protocol):
    """How pieces are copied. `copy` is called on threads, and returns when all of it is done."""

    def mark(self) -> object:
        """What the engine has begun until now; called on the engine's thread."""

    def copy(self, moves: Iterable[Move], after: object) -> int:
        """Copy, but not before that is done; how many bytes."""


class ByHost:
    """For pages in host memory."""

    def mark(self) -> None:
        """The host has begun nothing that it has not done."""

    def copy(self, moves: Iterable[Move], after: object) -> int:
        """See `Means`."""
        return copy(moves)


class ByCopier:
    """For pages that only the engine knows how to reach."""

    def __init__(self, copier: Copier) -> None:
        self._copier = copier

    def mark(self) -> None:
        """The copier waits itself for what it must wait for."""

    def copy(self, moves: Iterable[Move], after: object) -> int:
        """See `Means`."""
        pairs = []
        for (to, frm), some in _by_device(moves).items():
            found = pieces(some)
            rows = zip(found.own.tolist(), found.theirs.tolist(), found.nbytes.tolist(), strict=True)
            pairs += [(Region(source, size, frm), Region(target, size, to)) for target, source, size in rows]
        try:
            self._copier(pairs)
        except Exception as error:  # it is the engine's, and may raise anything
            raise TransferFailed(
                f"{len(pairs)} pieces of KV pages were to be copied.",
                f"The copier raised {type(error).__name__}: {error}.",
                "See to the copier that the engine gave.",
            ) from error
        return sum(source.nbytes for source, _ in pairs)


class ByCuda:
    """On a stream of its own, behind what the engine's stream had to do when the job was given."""

    def __init__(self, torch: Any, device: str, memcpy: Callable[[int, int, int, int], int]) -> None:
        """`memcpy`: begin to copy so many bytes on a stream, as CUDA's driver does; 0 if it has begun."""
        self._torch, self._device, self._memcpy = torch, device, memcpy
        self._streams = {way: torch.cuda.Stream(device=device) for way in (True, False)}

    def mark(self) -> object:
        """See `Means`."""
        event = self._torch.cuda.Event()
        event.record(self._torch.cuda.current_stream(self._device))
        return event

    def copy(self, moves: Iterable[Move], after: object) -> int:
        """See `Means`."""
        nbytes = 0
        for (to, _), some in _by_device(moves).items():
            stream, found = self._streams[to == _HOST], pieces(some)
            with self._torch.cuda.stream(stream):
                stream.wait_event(after)
                begun = map(
                    self._memcpy,
                    found.own.tolist(),
                    found.theirs.tolist(),
                    found.nbytes.tolist(),
                    repeat(stream.cuda_stream),
                )
                code = next(filter(None, begun), 0)
                done = self._torch.cuda.Event()
                done.record(stream)
            done.synchronize()  # also after an error: what had begun must not go on behind the job's end
            if code:
                raise TransferFailed(
                    f"{len(found)} pieces of KV pages were to be copied on {self._device}.",
                    f"CUDA's driver refused one with code {code}.",
                    "See whether the pages' memory is still there, and what the driver's log says.",
                )
            nbytes += int(found.nbytes.sum())
        return nbytes


def means(geometry: RankGeometry, copier: Copier | None) -> Means:
    """How pages of a rank are reached; raises `Unsupported` if nobody knows."""
    devices = sorted({plane.device for plane in geometry.planes} - {_HOST})
    if not devices:
        return ByHost()
    if copier is not None:
        return ByCopier(copier)
    torch = loaded_torch()
    if len(devices) == 1 and devices[0].partition(":")[0] == _CUDA and torch is not None:
        driver = ctypes.CDLL("libcuda.so.1").cuMemcpyAsync
        driver.argtypes, driver.restype = (ctypes.c_size_t,) * 4, ctypes.c_int
        return ByCuda(torch, devices[0], driver)
    raise Unsupported(
        f"KV pages on {', '.join(devices)} were to be kept in host memory.",
        "The context has no copier, and the process no torch with CUDA that could do it.",
        "Give one in `OffloadContext.copier`.",
    )


def loaded_torch() -> Any:
    """torch if the process has it already, and CUDA with it."""
    torch = sys.modules.get("torch")
    usable = torch is not None and torch.version.cuda is not None and torch.cuda.is_available()
    return torch if usable else None


def _by_device(moves: Iterable[Move]) -> dict[tuple[str, str], Sequence[Move]]:
    found: dict[tuple[str, str], list[Move]] = {}
    for move in moves:
        found.setdefault((move.to.device, move.frm.device), []).append(move)
    return dict(found)
