"""Block tables and block ids: thousands of descriptors said in five numbers and one array.

Room `transport`; may import the ground. Everything that a native library must never be given is refused here: lengths
that wrap around, ids that are not whole numbers, ids out of range, a block that is written twice in one transfer.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from operator import sub
from typing import Any, Final

import attrs

from tensorway.errors import MemoryInvalid
from tensorway.memory import ADDRESS_LIMIT, Region

#: More planes or blocks than any engine has; beyond that a number is a mistake or an attack.
MAX_PLANES: Final = 1 << 16
MAX_BLOCKS: Final = 1 << 31
_WHOLE: Final = {int}


@attrs.frozen
class BlockTable:
    """Where blocks are: block `i` of each plane is `block_bytes` long and begins at `base + i * stride`.

    A plane is what repeats at a base of its own, for a KV cache each layer, or each half of one. One id moves that
    block of every plane. In a stacked table ids run on from plane to plane instead, and one id moves one block:
    block `i` of plane `p` is `p * count + i`. So can rows of many tensors, each somewhere else, be one route.
    """

    bases: tuple[int, ...]
    block_bytes: int
    stride: int
    count: int
    device: str = "cpu"
    stacked: bool = False

    def __attrs_post_init__(self) -> None:
        numbers = (*self.bases, self.block_bytes, self.stride, self.count)
        if not 0 < len(self.bases) <= MAX_PLANES or any(type(number) is not int or number <= 0 for number in numbers):
            raise self._invalid("Bases, block length, stride and count are whole numbers above zero.")
        if self.ids > MAX_BLOCKS or self.stride < self.block_bytes:
            raise self._invalid(
                f"The stride is at least the block's length, and there are at most {MAX_BLOCKS} blocks."
            )
        if max(self.bases) + self.span > ADDRESS_LIMIT:
            raise self._invalid("The last block would end beyond 2**63.")

    @classmethod
    def over(
        cls,
        regions: Region | Sequence[Region],
        block_bytes: int,
        *,
        stride: int | None = None,
        count: int | None = None,
        offset: int = 0,
        stacked: bool = False,
    ) -> BlockTable:
        """A table over whole regions, one plane each; without `count` as many blocks as fit behind `offset`."""
        planes = [regions] if isinstance(regions, Region) else list(regions)
        if not planes or len({(plane.nbytes, plane.device) for plane in planes}) != 1:
            raise MemoryInvalid(
                f"A block table over {len(planes)} regions was to be made.",
                "The planes of one table are equally long and on one device, and there is at least one.",
                "Make a table for each kind of plane.",
            )
        step = block_bytes if stride is None else stride
        usable = planes[0].nbytes - offset
        fits = (usable - block_bytes) // step + 1 if step > 0 and usable >= block_bytes else 0
        return cls(
            tuple(plane.address + offset for plane in planes),
            block_bytes,
            step,
            fits if count is None else count,
            planes[0].device,
            stacked,
        )

    @property
    def ids(self) -> int:
        """How many ids it has: they are the whole numbers below."""
        return self.count * len(self.bases) if self.stacked else self.count

    @property
    def width(self) -> int:
        """How many blocks one id moves."""
        return 1 if self.stacked else len(self.bases)

    @property
    def span(self) -> int:
        """Bytes from the first byte of a plane's first block to behind the last byte of its last."""
        return self.stride * (self.count - 1) + self.block_bytes

    @property
    def dense(self) -> bool:
        """Whether neighboring ids are neighboring memory, so that runs of them can be one piece."""
        return self.stride == self.block_bytes

    def extents(self) -> Iterator[tuple[int, int]]:
        """Address and length of what each plane covers."""
        return ((base, self.span) for base in self.bases)

    def pieces(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Address and length of what these blocks are, in order; neighbors that touch are one piece."""
        for starts in self.starts(ids):
            if not self.dense:
                yield from ((start, self.block_bytes) for start in starts)
                continue
            begin = length = 0
            for start in starts:
                if start == begin + length:
                    length += self.block_bytes
                    continue
                if length:
                    yield begin, length
                begin, length = start, self.block_bytes
            if length:
                yield begin, length

    def starts(self, ids: Sequence[int]) -> Iterator[list[int]]:
        """Where these blocks begin, in the order in which they are moved: plane by plane, or once if stacked."""
        if self.stacked:
            bases, stride, count = self.bases, self.stride, self.count
            yield [bases[block // count] + stride * (block % count) for block in ids]
        else:
            for base in self.bases:
                yield [base + self.stride * block for block in ids]

    def vector(self, ids: array[int]) -> array[int]:
        """The same as `pieces`, as one array of address, length, address, length: what a kernel or a library takes.

        Made without a step of Python per block, unless there are neighbors to join.
        """
        if self.dense and 1 in map(sub, islice(ids, 1, None), ids):
            return array("Q", chain.from_iterable(self.pieces(ids)))
        numbers = array("Q", bytes(16 * len(ids) * self.width))
        numbers[0::2] = array("Q", chain.from_iterable(self.starts(ids)))
        numbers[1::2] = array("Q", [self.block_bytes]) * (len(ids) * self.width)
        return numbers

    def _invalid(self, true: str) -> MemoryInvalid:
        asked = (
            f"A block table of {self.count!r} blocks of {self.block_bytes!r} bytes, {self.stride!r} apart, "
            f"in {len(self.bases)} planes was given."
        )
        return MemoryInvalid(asked, true, "Give the numbers of memory that exists; BlockTable.over computes them.")


def block_ids(ids: Iterable[int] | Any, count: int, *, unique: bool, whose: str) -> array[int]:
    """Ids as 64-bit integers, each below `count`; raises `MemoryInvalid` for anything else.

    NIXL takes floats, booleans and numbers above 2**32, and moves another block than was meant.
    """
    if isinstance(ids, array) and ids.typecode == "q":
        values: Any = ids[:]  # whole numbers for certain, and a copy: the caller may change its own
    else:
        if type(ids) is list:
            values = ids[:]
        else:
            several = ids.tolist() if hasattr(ids, "tolist") else ids
            if not isinstance(several, Iterable):
                raise _ids_invalid(whose, f"A {type(several).__name__} was given, which is not several ids.")
            values = list(several)
        if len(values) == 1 and type(values[0]) is int and 0 <= values[0] < count:
            return array("q", values)  # as below, and a third of the time
        if not set(map(type, values)) <= _WHOLE:
            raise _ids_invalid(whose, "One of them is not a whole number.")
    if not values:
        return array("q")
    low, high = (values[0], values[0]) if len(values) == 1 else (min(values), max(values))
    if low < 0 or high >= count:
        raise _ids_invalid(whose, f"They reach from {low} to {high}; the table has {count} blocks.")
    if unique and len(set(values)) != len(values):
        raise _ids_invalid(whose, "One of them is there twice, and what the block would hold afterwards is chance.")
    return values if isinstance(values, array) else array("q", values)


def covered(table: BlockTable, regions: Iterable[Region]) -> bool:
    """Whether every plane of the table lies within one of the regions, on its device."""
    known = [region for region in regions if region.device == table.device]
    return all(
        any(region.address <= start and start + length <= region.end for region in known)
        for start, length in table.extents()
    )


def touches(table: BlockTable, regions: Iterable[Region]) -> bool:
    """Whether any plane of the table lies in one of the regions, be it in part."""
    known = [region for region in regions if region.device == table.device]
    return any(
        start < region.end and region.address < start + length for start, length in table.extents() for region in known
    )


def _ids_invalid(whose: str, true: str) -> MemoryInvalid:
    return MemoryInvalid(
        f"A transfer of {whose} blocks was asked for.", true, "Give ids of blocks of the route's tables."
    )
