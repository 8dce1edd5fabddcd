"""Where blocks are in host memory: numbers of rows, which go from the manager to workers as they are.

May import the core's ground. Nothing in it is a handle: whoever has the rows knows what a number means.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, overload

import attrs

from tensorway.errors import MemoryInvalid

_ROW: Final = "q"
_BYTES: Final = array(_ROW).itemsize


@attrs.frozen(repr=False)
class CPULoadStoreSpec(Sequence[int]):
    """Rows of blocks, in the order of the keys that they are of; eight bytes for each."""

    #: 64-bit whole numbers, as this machine has them.
    data: bytes = attrs.field(validator=attrs.validators.instance_of(bytes))
    medium: str = "cpu"

    def __attrs_post_init__(self) -> None:
        if len(self.data) % _BYTES:
            raise _invalid(f"They are {len(self.data)} bytes.")

    @classmethod
    def of(cls, rows: Iterable[int]) -> CPULoadStoreSpec:
        """Of these rows."""
        try:
            return cls(array(_ROW, rows).tobytes())
        except (TypeError, ValueError, OverflowError) as error:
            raise _invalid(f"One of them is no row: {error}.") from error

    def __len__(self) -> int:
        return len(self.data) // _BYTES

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> CPULoadStoreSpec: ...

    def __getitem__(self, index: int | slice) -> int | CPULoadStoreSpec:
        rows = memoryview(self.data).cast(_ROW)
        return CPULoadStoreSpec(rows[index].tobytes()) if isinstance(index, slice) else rows[index]

    def __iter__(self) -> Iterator[int]:
        return iter(memoryview(self.data).cast(_ROW).tolist())

    def __repr__(self) -> str:
        return f"CPULoadStoreSpec({list(self)})"


def _invalid(true: str) -> MemoryInvalid:
    return MemoryInvalid(
        "Rows of blocks in host memory were given.", true, "Give whole numbers of 64 bits, or the bytes of a spec."
    )
