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
    """Of a layer: where its live rows are, and its staging rows. An address takes less time than a region."""

    name: str
    nbytes: int
    device: str
    live: int
    stride: int
    staged: int
    #: Copies a row: target and source, by their addresses, and how long they are.
    move: Callable[[int, int, int], object]

    def slot(self, slot: int) -> int:
        """The address of a live row."""
        return self.live + slot * self.stride

    def row(self, row: int) -> int:
        """The address of a staging row."""
        return self.staged + row * self.nbytes


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
        self._layers = [[_tensor(tensor, staging, copy) for tensor in tensors] for tensors in layout.layers]

    def write(
        self, layer: int, copies: Sequence[tuple[int, int]], writes: Sequence[tuple[int, int]], temporary: int | None
    ) -> None:
        """Make the rows of a layer what a plan says: slot to slot in order, then staging row to slot.

        `temporary` is the staging row that slot -1 stands for.
        """
        for tensor in self._layers[layer]:
            for start, end in copies:
                tensor.move(_place(tensor, end, temporary), _place(tensor, start, temporary), tensor.nbytes)
            for row, slot in writes:
                tensor.move(tensor.slot(slot), tensor.row(row), tensor.nbytes)

    def live_digest(self, layer: int, slot: int) -> int:
        """Of the expert in a slot."""
        return digest((tensor.slot(slot), tensor.nbytes) for tensor in self._layers[layer])

    def staged_digest(self, layer: int, row: int) -> int:
        """Of the expert in a staging row."""
        return digest((tensor.row(row), tensor.nbytes) for tensor in self._layers[layer])

    def nbytes(self, layer: int) -> int:
        """The bytes of one expert in a layer."""
        return self._layout.row_bytes(layer)

    def regions(self, layer: int, row: int) -> dict[str, Region]:
        """Where the tensors of an expert go that is loaded into a staging row."""
        tensors = self._layers[layer]
        return {each.name: self._staging.row((each.name, each.nbytes, each.device), row) for each in tensors}

    def live(self, layer: int, slot: int) -> dict[str, Region]:
        """Where the tensors of the expert in a slot are."""
        tensors = self._layers[layer]
        return {each.name: Region(each.slot(slot), each.nbytes, each.device) for each in tensors}


def _tensor(tensor: ExpertTensor, staging: Staging, copy: Copy | None) -> _Tensor:
    region, nbytes = tensor.region, tensor.row_bytes
    staged = staging.regions[tensor.name, nbytes, region.device].address

    def by_engine(target: int, source: int, nbytes: int) -> None:
        assert copy is not None, "taken only where there is one"
        copy(Region(target, nbytes, region.device), Region(source, nbytes, region.device))

    move = ctypes.memmove if copy is None else by_engine
    return _Tensor(tensor.name, nbytes, region.device, region.address, tensor.stride, staged, move)


def _place(tensor: _Tensor, slot: int, temporary: int | None) -> int:
    if slot >= 0:
        return tensor.slot(slot)
    assert temporary is not None, "a plan with a temporary row has one"
    return tensor.row(temporary)


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
