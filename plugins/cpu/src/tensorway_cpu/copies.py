"""Copying many pieces between two tables of host memory, each length in the way that is fastest for it.

May import the core, numpy and ctypes. Three ways, by what was measured (tests/bench/offload_copies.py): numpy's own
loops over items as long as a piece, which cost a few nanoseconds each and let other threads run; one memmove for each
piece, where it is long enough to pay for the call; and that again for neighbors joined, where there are many.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tensorway.memory import libc
from tensorway.transport.blocks import BlockTable
from tensorway_cpu.pages import Move
from tensorway_kv.intersect import Numbers, Runs, joined

#: From this length on a piece is worth a call of its own.
_LONG: Final = 32 << 10
#: Pieces that are neither read nor written in a row go through so many bytes that stay in the cache.
_BETWEEN: Final = 256 << 10
_Items = NDArray[np.void]
_NOTHING: Final = (np.zeros(0, np.int64),) * 3


def copy(moves: Iterable[Move]) -> int:
    """Copy all pieces; how many bytes."""
    return sum(_copied(move) for move in moves)


def pieces(moves: Iterable[Move]) -> Runs:
    """All pieces as addresses, neighbors joined: for who copies to a device. `own` is where to, `theirs` where from."""
    found = [_NOTHING]
    for move in moves:
        to, frm = _places(move.to, move.to_ids).ravel(), _places(move.frm, move.frm_ids).ravel()
        found.append((to, frm, np.full(len(to), move.to.block_bytes, np.int64)))
    to, frm, nbytes = (np.concatenate(side) for side in zip(*found, strict=True))
    return joined(np.zeros(len(to), np.int64), to, frm, nbytes)


def _copied(move: Move) -> int:
    count, nbytes = len(move.to_ids), move.to.block_bytes
    if not count:
        return 0
    first, lengths = _runs(move)
    if lengths.sum() >= _LONG * len(lengths):
        _one_by_one(_places(move.to, move.to_ids[first]), _places(move.frm, move.frm_ids[first]), lengths)
    else:
        for to, frm in zip(_items(move.to), _items(move.frm), strict=True):
            _by_numpy(to, frm, move)
    return count * nbytes * move.to.width


def _runs(move: Move) -> tuple[Numbers, Numbers]:
    """Where pieces begin that are longer, since neighbors are neighbors on both sides; and how long they are."""
    count, nbytes = len(move.to_ids), move.to.block_bytes
    if not (move.to.dense and move.frm.dense):
        return np.arange(count, dtype=np.int64), np.full(count, nbytes, np.int64)
    opens = np.ones(count, bool)
    opens[1:] = (np.diff(move.to_ids) != 1) | (np.diff(move.frm_ids) != 1)
    first = np.flatnonzero(opens)
    return first, np.diff(np.append(first, count)) * nbytes


def _one_by_one(to: Numbers, frm: Numbers, lengths: Numbers) -> None:
    each = lengths.tolist()
    memmove = _memmove()
    for targets, sources in zip(to.tolist(), frm.tolist(), strict=True):
        deque(map(memmove, targets, sources, each), 0)


def _by_numpy(to: _Items, frm: _Items, move: Move) -> None:
    to_ids, frm_ids = move.to_ids, move.frm_ids
    if frm.flags.c_contiguous and to.flags.c_contiguous and _in_a_row(to_ids):
        begin = int(to_ids[0])
        np.take(frm, frm_ids, out=to[begin : begin + len(to_ids)], mode="clip")
    elif _in_a_row(frm_ids):
        begin = int(frm_ids[0])
        to[to_ids] = frm[begin : begin + len(frm_ids)]
    else:
        each = max(1, _BETWEEN // move.to.block_bytes)
        for begin in range(0, len(to_ids), each):
            to[to_ids[begin : begin + each]] = frm[frm_ids[begin : begin + each]]


def _in_a_row(ids: Numbers) -> bool:
    return bool(ids[-1] - ids[0] == len(ids) - 1 and (np.diff(ids) == 1).all())


def _places(table: BlockTable, ids: Numbers) -> Numbers:
    """Addresses of pieces, plane by plane."""
    places: Numbers = np.asarray(table.bases, np.int64)[:, None] + ids * table.stride
    return places


@lru_cache(maxsize=4096)
def _items(table: BlockTable) -> list[_Items]:
    """The pieces of each plane as items of an array, which knows nothing of what is in them."""
    item = np.dtype((np.void, table.block_bytes))
    spans: list[Any] = [(ctypes.c_ubyte * table.span).from_address(base) for base in table.bases]
    return [np.ndarray((table.count,), item, span, 0, (table.stride,)) for span in spans]


@lru_cache(maxsize=1)
def _memmove() -> Any:
    """That of the C library, told what numbers mean; it lets other threads run."""
    function = libc().memmove
    function.argtypes, function.restype = (ctypes.c_size_t,) * 3, None
    return function
