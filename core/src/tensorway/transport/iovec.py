"""How host memory is copied: vectors of address and length by the kernel, and memmove within this process's own memory.

Room `transport`; may import its own room.
"""

from __future__ import annotations

import ctypes
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice, repeat, starmap
from operator import sub
from typing import Any, Final

from tensorway.transport.blocks import BlockTable
from tensorway.transport.contract import Operation

#: What one call of the kernel takes.
IOV_MAX: Final = 1024
#: Address and length.
_Piece = tuple[int, int]
#: `ctypes.memmove` makes a number of each address that it returns. Other threads run while it copies.
_memmove: Final = ctypes.CDLL(None).memmove
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memmove.restype = None


def copied_by_kernel(call: Callable[..., int], process: int, mine: array[int], theirs: array[int]) -> bool:
    """Have `process_vm_readv` or its like copy all pieces; False once it refuses, and `ctypes.get_errno` knows why."""
    while mine:
        ours, others = mine[: 2 * IOV_MAX], theirs[: 2 * IOV_MAX]
        moved = call(process, _iovec(ours), len(ours) // 2, _iovec(others), len(others) // 2, 0)
        if moved <= 0:
            return False
        # Fewer bytes than asked for: one side had more pieces, or the kernel's limit for one call was reached.
        mine, theirs = _behind(mine, moved), _behind(theirs, moved)
    return True


def _iovec(vector: array[int]) -> Any:
    """An array of `struct iovec` over the same memory."""
    return (ctypes.c_uint64 * len(vector)).from_buffer(vector)


def _behind(vector: array[int], moved: int) -> array[int]:
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
    """Copy blocks whose memory is known to be mapped here.

    Without a step of Python per block, unless neighbors can be joined: then a step for each block, and a copy for each
    run of them.
    """
    length = local.block_bytes
    for mine, theirs in zip(local.starts(local_ids), remote.starts(remote_ids), strict=True):
        targets, sources = (mine, theirs) if operation == "read" else (theirs, mine)
        if _neighbors(targets, length) and _neighbors(sources, length):
            deque(starmap(_memmove, _joined(targets, sources, length)), maxlen=0)
        else:
            deque(map(_memmove, targets, sources, repeat(length)), maxlen=0)


def _neighbors(starts: Sequence[int], length: int) -> bool:
    """Whether any block begins where the one before it ends."""
    return length in map(sub, islice(starts, 1, None), starts)


def _joined(targets: Iterable[int], sources: Iterable[int], block: int) -> Iterator[tuple[int, int, int]]:
    """Target, source and length of each run of blocks that are neighbors on both sides."""
    to = source = length = 0
    for target, start in zip(targets, sources, strict=True):
        if length and target == to + length and start == source + length:
            length += block
            continue
        if length:
            yield to, source, length
        to, source, length = target, start, block
    if length:
        yield to, source, length
