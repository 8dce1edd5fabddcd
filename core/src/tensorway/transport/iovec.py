"""How `local` copies: vectors of address and length for the kernel, and memmove within a process.

Room `transport`; may import its own room.
"""

from __future__ import annotations

import ctypes
from array import array
from itertools import chain
from typing import Any

from tensorway.transport.blocks import BlockTable
from tensorway.transport.contract import Operation

#: Address and length.
_Piece = tuple[int, int]


def iovec(vector: array[int]) -> Any:
    """An array of `struct iovec` over the same memory."""
    return (ctypes.c_uint64 * len(vector)).from_buffer(vector)


def behind(vector: array[int], moved: int) -> array[int]:
    """What is left of a vector behind the first `moved` bytes: nothing, nearly always."""
    if moved == sum(vector[1::2]):
        return array("Q")
    return array("Q", chain.from_iterable(_rest(list(zip(vector[0::2], vector[1::2], strict=True)), moved)))


def _rest(pieces: list[_Piece], moved: int) -> list[_Piece]:
    """What is left of the pieces behind the first `moved` bytes."""
    for index, (address, length) in enumerate(pieces):
        if moved < length:
            return [(address + moved, length - moved), *pieces[index + 1 :]]
        moved -= length
    return []


def move(
    operation: Operation, local: BlockTable, remote: BlockTable, local_ids: array[int], remote_ids: array[int]
) -> None:
    """Copy blocks whose memory is known to be there."""
    target, source = (local, remote) if operation == "read" else (remote, local)
    target_ids, source_ids = (local_ids, remote_ids) if operation == "read" else (remote_ids, local_ids)
    for to, start in zip(target.starts(target_ids), source.starts(source_ids), strict=True):
        for here, there in zip(to, start, strict=True):
            ctypes.memmove(here, there, target.block_bytes)
