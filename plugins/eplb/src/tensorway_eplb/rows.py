"""Rows of experts in memory: copied, and told apart by digests over all tensors of an expert.

May import the core, attrs, numpy and xxhash. Host memory is read and written here; for accelerators the engine gives a
function that copies, and digests are not taken.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias

import attrs
import numpy as np
import xxhash
from numpy.typing import NDArray

from tensorway.eplb import ExpertLayout, ExpertTensor, Staging
from tensorway.errors import Unsupported
from tensorway.memory import Region

#: Copies the bytes of the second region into the first; they are there when it returns.
Copy: TypeAlias = Callable[[Region, Region], None]
#: One digest for each layer and logical expert; 0 where none is known.
Digests: TypeAlias = NDArray[np.uint64]
UNKNOWN: Final = 0


@attrs.frozen(eq=False)
class _Tensor:
    """Where its rows are, live and in staging, by address: regions would take half as long as copying short rows."""

    tensor: ExpertTensor
    #: The first row in staging.
    staged: int
    #: Copies a row: target, source, and how long it is.
    move: Callable[[int, int, int], object]

    def slot(self, slot: int) -> int:
        """The address of a live row."""
        return self.tensor.region.address + slot * self.tensor.stride

    def row(self, row: int) -> int:
        """The address of a staging row."""
        return self.staged + row * self.tensor.row_bytes

    def place(self, slot: int, temporary: int | None) -> int:
        """The address of a live row, or of the temporary one in staging."""
        if slot >= 0:
            return self.slot(slot)
        assert temporary is not None, "a plan with a temporary row has one"
        return self.row(temporary)


class Rows:
    """The live rows of one rank, and its staging."""

    def __init__(self, layout: ExpertLayout, staging: Staging, copy: Copy | None = None) -> None:
        if copy is None and not layout.host_visible:
            raise Unsupported(
                "Expert weights on an accelerator were to be committed.",
                "No function was given that copies there.",
                "Give copy=: a function of two regions, target and source.",
            )
        self._layout, self._staging = layout, staging
        self._layers = [
            [
                _Tensor(
                    tensor,
                    staging.row(tensor.kind, 0).address,
                    ctypes.memmove if copy is None else _by_engine(copy, tensor.region.device),
                )
                for tensor in tensors
            ]
            for tensors in layout.layers
        ]

    def write(
        self, layer: int, copies: Sequence[tuple[int, int]], writes: Sequence[tuple[int, int]], temporary: int | None
    ) -> None:
        """Make the rows of a layer what a plan says: slot to slot in order, then staging row to slot.

        `temporary` is the staging row that slot -1 stands for.
        """
        for rows in self._layers[layer]:
            nbytes = rows.tensor.row_bytes
            for start, end in copies:
                rows.move(rows.place(end, temporary), rows.place(start, temporary), nbytes)
            for row, slot in writes:
                rows.move(rows.slot(slot), rows.row(row), nbytes)

    def live_digest(self, layer: int, slot: int) -> int:
        """Of the expert in a slot."""
        return digest((rows.slot(slot), rows.tensor.row_bytes) for rows in self._layers[layer])

    def staged_digest(self, layer: int, row: int) -> int:
        """Of the expert in a staging row."""
        return digest((rows.row(row), rows.tensor.row_bytes) for rows in self._layers[layer])

    def nbytes(self, layer: int) -> int:
        """The bytes of one expert in a layer."""
        return self._layout.row_bytes(layer)

    def regions(self, layer: int, row: int) -> dict[str, Region]:
        """Where the tensors of an expert go that is loaded into a staging row."""
        return {tensor.name: self._staging.row(tensor.kind, row) for tensor in self._layout.layers[layer]}

    def live(self, layer: int, slot: int) -> dict[str, Region]:
        """Where the tensors of the expert in a slot are."""
        return {
            rows.tensor.name: Region(rows.slot(slot), rows.tensor.row_bytes, rows.tensor.region.device)
            for rows in self._layers[layer]
        }


def _by_engine(copy: Copy, device: str) -> Callable[[int, int, int], object]:
    def move(target: int, source: int, nbytes: int) -> None:
        copy(Region(target, nbytes, device), Region(source, nbytes, device))

    return move


def copy_on_host(target: Region, source: Region) -> None:
    """memmove."""
    ctypes.memmove(target.address, source.address, target.nbytes)


def digest(places: Iterable[tuple[int, int]]) -> int:
    """Of bytes in host memory, by address and length; never `UNKNOWN`."""
    seen = xxhash.xxh3_64()
    for address, nbytes in places:
        buffer: Any = (ctypes.c_char * nbytes).from_address(address)
        seen.update(memoryview(buffer).cast("B"))
    return seen.intdigest() or 1
