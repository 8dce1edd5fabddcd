"""Copying many pieces between two tables of host memory, each length in the way that is fastest for it.

May import the core, numpy and ctypes. The ways are those that were measured (tensorway bench run offload-copies):
numpy's own loops over items as long as a piece, by ids or by slices of equal distances, which cost a few nanoseconds
for each; and a memmove for each piece, or for neighbors joined, where it is long enough for a call. Other threads run
meanwhile, and one that is busy in Python gives the interpreter back milliseconds later: so each call may wait that
long. Where that is seen, the kernel copies what is left, at half the speed, a thousand pieces in a call.
"""

from __future__ import annotations

import ctypes
import os
import time
from array import array
from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final

import attrs
import numpy as np
from numpy.typing import NDArray

from tensorway.memory import libc
from tensorway.transport.blocks import BlockTable
from tensorway.transport.iovec import IOV_MAX, copied_by_kernel
from tensorway_cpu.pages import Move
from tensorway_kv.intersect import Numbers, Runs, joined

#: From this length on a piece is worth a call of its own, unless all pieces of one side are an array for numpy.
_LONG: Final = 32 << 10
#: From this length on pieces at equal distances are worth a slice of their own.
_STEPS: Final = 4 << 10
#: Pieces that are neither read nor written in a row go through so many bytes that stay in the cache.
_BETWEEN: Final = 256 << 10
#: So many long pieces are copied, and then it is seen whether they have waited for more than this.
_GROUP: Final = 16
_WAIT: Final = 2e-3
_Items = NDArray[np.void]
_NOTHING: Final = (np.zeros(0, np.int64),) * 3


def copy(moves: Iterable[Move]) -> int:
    """Copy all pieces; how many bytes."""
    crowd = _Crowd()
    return sum(_copied(move, crowd) for move in moves)


def pieces(moves: Iterable[Move]) -> Runs:
    """All pieces as addresses, neighbors joined: for who copies to a device. `own` is where to, `theirs` where from."""
    found = [_NOTHING]
    for move in moves:
        to, frm = _places(move.to, move.to_ids).ravel(), _places(move.frm, move.frm_ids).ravel()
        found.append((to, frm, np.full(len(to), move.to.block_bytes, np.int64)))
    to, frm, nbytes = (np.concatenate(side) for side in zip(*found, strict=True))
    return joined(np.zeros(len(to), np.int64), to, frm, nbytes)


def _copied(move: Move, crowd: _Crowd) -> int:
    count, nbytes = len(move.to_ids), move.to.block_bytes
    if not count:
        return 0
    runs = _Runs.of(move)
    each = nbytes * count / len(runs.first)
    alone = len(runs.first) == count
    if each >= _LONG and (runs.touch if not alone else not _is_one_array(move)):
        targets, sources = _places(move.to, runs.to), _places(move.frm, runs.frm)
        crowd.copy(targets.ravel(), sources.ravel(), np.tile(runs.counts * nbytes, len(targets)))
    else:
        way = _by_ids if alone or each < _STEPS else _in_steps
        for to, frm in zip(_items(move.to), _items(move.frm), strict=True):
            way(to, frm, move, runs)
    return count * nbytes * move.to.width


@attrs.frozen(eq=False)
class _Runs:
    """Pieces that follow each other at equal distances on either side, such as those of half the heads of a page."""

    #: Which pieces begin one, and how many it has.
    first: Numbers
    counts: Numbers
    #: The ids of the first pieces, and how many ids later the next one is.
    to: Numbers
    frm: Numbers
    to_step: int
    frm_step: int
    #: Whether pieces of a run are neighbors on both sides, without anything between them.
    touch: bool

    @classmethod
    def of(cls, move: Move) -> _Runs:
        count = len(move.to_ids)
        steps = np.diff(move.to_ids), np.diff(move.frm_ids)
        to_step, frm_step = (int(np.partition(step, count // 2)[count // 2]) if count > 2 else 1 for step in steps)
        opens = np.ones(count, bool)
        if to_step > 0 and frm_step > 0:
            opens[1:] = (steps[0] != to_step) | (steps[1] != frm_step)
        first = np.flatnonzero(opens)
        counts = np.diff(np.append(first, count))
        touch = to_step == frm_step == 1 and move.to.dense and move.frm.dense
        return cls(first, counts, move.to_ids[first], move.frm_ids[first], to_step, frm_step, touch)


class _Crowd:
    """Long pieces; whether who copies has to wait for the interpreter is known from those before."""

    def __init__(self) -> None:
        self._waits = False

    def copy(self, to: Numbers, frm: Numbers, lengths: Numbers) -> None:
        """One by one, until that was a wait."""
        copied = 0
        while copied < len(to) and not self._waits:
            part = slice(copied, copied + _GROUP if copied else 1)
            began = time.perf_counter()
            _by_calls(to[part].tolist(), frm[part].tolist(), lengths[part].tolist())
            # What copies less than a gigabyte in a second does not copy.
            self._waits = time.perf_counter() - began > _WAIT + int(lengths[part].sum()) / 1e9
            copied = part.stop
        _by_kernel(to[copied:], frm[copied:], lengths[copied:])


def _by_calls(to: Iterable[int], frm: Iterable[int], lengths: Iterable[int]) -> None:
    deque(map(_memmove(), to, frm, lengths), 0)


def _by_kernel(to: Numbers, frm: Numbers, lengths: Numbers) -> None:
    read, own = _read_memory(), os.getpid()
    for begin in range(0, len(to), IOV_MAX):
        part = slice(begin, begin + IOV_MAX)
        targets, sources = (
            array("Q", np.stack([side[part], lengths[part]], axis=1).astype(np.uint64).tobytes()) for side in (to, frm)
        )
        if not copied_by_kernel(read, own, targets, sources):  # not in every container may one ask
            _by_calls(targets[0::2], sources[0::2], targets[1::2])


def _in_steps(to: _Items, frm: _Items, move: Move, runs: _Runs) -> None:
    """A slice for each run."""
    to_step, frm_step = runs.to_step, runs.frm_step
    for target, source, count in zip(runs.to.tolist(), runs.frm.tolist(), runs.counts.tolist(), strict=True):
        to[target : target + count * to_step : to_step] = frm[source : source + count * frm_step : frm_step]


def _by_ids(to: _Items, frm: _Items, move: Move, runs: _Runs) -> None:
    """All pieces in a few calls of numpy."""
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


def _is_one_array(move: Move) -> bool:
    """Whether the pieces of a side are one piece of memory, which numpy knows how to cut or to put together."""
    return (move.frm.dense and _in_a_row(move.frm_ids)) or (move.to.dense and move.frm.dense and _in_a_row(move.to_ids))


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


@lru_cache(maxsize=1)
def _read_memory() -> Any:
    """The kernel's copy from another process's memory, which may be this one's."""
    function = libc().process_vm_readv
    vector = (ctypes.c_void_p, ctypes.c_size_t)
    function.argtypes = (ctypes.c_int, *vector, *vector, ctypes.c_size_t)
    function.restype = ctypes.c_ssize_t
    return function
