"""Rows of experts in memory: copied, and told apart by digests over all tensors of an expert.

May import the core, numpy and xxhash. Host memory is read and written here; for accelerators the engine gives a
function that copies, and digests are not taken.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from tensorway.eplb import ExpertLayout, Staging
from tensorway.errors import Unsupported
from tensorway.memory import Region

#: Copies the bytes of the second region into the first; they are there when it returns.
Copy: TypeAlias = Callable[[Region, Region], None]
#: One digest for each layer and logical expert; 0 where none is known.
Digests: TypeAlias = NDArray[np.uint64]
UNKNOWN: Final = 0


class Rows:
    """The live rows of one rank, and its staging."""

    def __init__(self, layout: ExpertLayout, staging: Staging, copy: Copy | None = None) -> None:
        if copy is None and not layout.host_visible:
            raise Unsupported(
                "Expert weights on an accelerator were to be committed.",
                "No function was given that copies there.",
                "Give copy=: a function of two regions, target and source.",
            )
        self._layout, self._staging, self._copy = layout, staging, copy or copy_on_host

    def write(
        self, layer: int, copies: Sequence[tuple[int, int]], writes: Sequence[tuple[int, int]], temporary: int | None
    ) -> None:
        """Make the rows of a layer what a plan says: slot to slot in order, then staging row to slot.

        `temporary` is the staging row that slot -1 stands for.
        """
        for start, end in copies:
            self._move(layer, self._place(layer, start, temporary), self._place(layer, end, temporary))
        for row, slot in writes:
            self._move(layer, self._staged(layer, row), self._live(layer, slot))

    def live_digest(self, layer: int, slot: int) -> int:
        """Of the expert in a slot."""
        return digest(self._live(layer, slot))

    def staged_digest(self, layer: int, row: int) -> int:
        """Of the expert in a staging row."""
        return digest(self._staged(layer, row))

    def nbytes(self, layer: int) -> int:
        """The bytes of one expert in a layer."""
        return self._layout.row_bytes(layer)

    def regions(self, layer: int, row: int) -> dict[str, Region]:
        """Where the tensors of an expert go that is loaded into a staging row."""
        return dict(zip(self._names(layer), self._staged(layer, row), strict=True))

    def live(self, layer: int, slot: int) -> dict[str, Region]:
        """Where the tensors of the expert in a slot are."""
        return dict(zip(self._names(layer), self._live(layer, slot), strict=True))

    def _names(self, layer: int) -> list[str]:
        return [tensor.name for tensor in self._layout.layers[layer]]

    def _place(self, layer: int, slot: int, temporary: int | None) -> list[Region]:
        if slot >= 0:
            return self._live(layer, slot)
        assert temporary is not None, "a plan with a temporary row has one"
        return self._staged(layer, temporary)

    def _move(self, layer: int, source: list[Region], target: list[Region]) -> None:
        for start, end in zip(source, target, strict=True):
            self._copy(end, start)

    def _live(self, layer: int, slot: int) -> list[Region]:
        return [
            Region(tensor.region.address + slot * tensor.stride, tensor.row_bytes, tensor.region.device)
            for tensor in self._layout.layers[layer]
        ]

    def _staged(self, layer: int, row: int) -> list[Region]:
        return [
            self._staging.row((tensor.name, tensor.row_bytes, tensor.region.device), row)
            for tensor in self._layout.layers[layer]
        ]


def copy_on_host(target: Region, source: Region) -> None:
    """memmove."""
    ctypes.memmove(target.address, source.address, target.nbytes)


def digest(regions: Sequence[Region]) -> int:
    """Of bytes in host memory; never `UNKNOWN`."""
    seen = xxhash.xxh3_64()
    for region in regions:
        buffer: Any = (ctypes.c_char * region.nbytes).from_address(region.address)
        seen.update(memoryview(buffer).cast("B"))
    return seen.intdigest() or 1
