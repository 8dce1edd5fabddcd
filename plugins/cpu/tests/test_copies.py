"""Pieces land where they belong, whichever way they are copied, and nothing beside them changes."""

from __future__ import annotations

import ctypes
import random
import sys
import threading
import time

import numpy as np
import pytest

from tensorway.transport.blocks import BlockTable
from tensorway_cpu import copies
from tensorway_cpu.copies import copy
from tensorway_cpu.pages import Move


def side(rng, length, gap, planes=2, count=24):
    memory = rng.integers(1, 250, planes * count * (length + gap) + 64, dtype=np.uint8)
    bases = tuple(memory.ctypes.data + 7 + plane * count * (length + gap) for plane in range(planes))
    return memory, BlockTable(bases, length, length + gap, count)


def by_hand(to, frm, move):
    """The same, one byte after the other."""
    wanted = to.copy()
    for plane in range(move.to.width):
        starts = [table.bases[plane] - memory.ctypes.data for table, memory in ((move.to, to), (move.frm, frm))]
        for target, source in zip(move.to_ids, move.frm_ids, strict=True):
            at, there = starts[0] + target * move.to.stride, starts[1] + source * move.frm.stride
            wanted[at : at + move.to.block_bytes] = frm[there : there + move.to.block_bytes]
    return wanted


PATTERNS = {
    "nothing": lambda rng: ([], []),
    "one": lambda rng: ([5], [7]),
    "two": lambda rng: ([5, 3], [7, 8]),
    "all in a row": lambda rng: (range(20), range(2, 22)),
    "gathered": lambda rng: (range(12), rng.sample(range(24), 12)),
    "scattered": lambda rng: (rng.sample(range(24), 12), range(3, 15)),
    "both": lambda rng: (rng.sample(range(24), 12), rng.sample(range(24), 12)),
    "pairs": lambda rng: ([0, 1, 8, 9, 4, 5], [2, 3, 0, 1, 20, 21]),
    "every second": lambda rng: (range(0, 24, 2), range(12)),
    "runs of every second": lambda rng: ([0, 2, 4, 12, 14, 16, 6, 8, 10], [0, 1, 2, 9, 10, 11, 3, 4, 5]),
    "backwards": lambda rng: (range(23, 11, -1), range(12)),
    "the same source": lambda rng: (range(6), [3] * 6),
}


@pytest.mark.parametrize("thresholds", ["as they are", "all long", "all steps"])
@pytest.mark.parametrize("gaps", [(0, 0), (0, 9), (9, 0), (5, 3)])
@pytest.mark.parametrize("length", [1, 40, 5000, 70_000])
@pytest.mark.parametrize("name", PATTERNS)
def test_pieces_are_copied_as_one_would_by_hand(name, length, gaps, thresholds, monkeypatch):
    if thresholds == "all long":
        monkeypatch.setattr(copies, "_LONG", 1)
    elif thresholds == "all steps":
        monkeypatch.setattr(copies, "_LONG", 1 << 40)
        monkeypatch.setattr(copies, "_STEPS", 1)
    rng = np.random.default_rng(1)
    (to, to_table), (frm, frm_table) = side(rng, length, gaps[0]), side(rng, length, gaps[1])
    ids = [np.asarray(some, np.int64) for some in PATTERNS[name](random.Random(2))]
    move = Move(to_table, frm_table, *ids)
    wanted = by_hand(to, frm, move)

    nbytes = copy([move])

    np.testing.assert_array_equal(to, wanted)
    assert len(ids[0]) * length * 2 == nbytes


# -- pieces that wait for the interpreter are copied by the kernel


PIECES, PIECE = 128, 64 << 10


@pytest.fixture
def long_pieces():
    """Every second of many, in another order, so that no two are neighbors."""
    rng = np.random.default_rng(3)
    (to, to_table), (frm, frm_table) = (side(rng, PIECE, 64, planes=1, count=2 * PIECES) for _ in range(2))
    ids = [np.asarray(random.Random(seed).sample(range(0, 2 * PIECES, 2), PIECES), np.int64) for seed in (1, 2)]
    move = Move(to_table, frm_table, *ids)
    return move, to, by_hand(to, frm, move), frm  # whose memory is to stay


def test_who_copies_long_pieces_does_not_wait_for_the_interpreter_for_each(long_pieces):
    """Beside a thread that is busy in Python, as the loop of an engine may be: each time costs a whole interval."""
    move, to, wanted, _ = long_pieces
    interval, stop = sys.getswitchinterval(), threading.Event()

    def busy():
        while not stop.is_set():
            pass

    beside = threading.Thread(target=busy)
    sys.setswitchinterval(0.05)
    try:
        beside.start()
        took = []
        while not took or (took[-1] >= PIECES / 4 * 0.05 and len(took) < 3):  # a busy machine is late once
            began = time.monotonic()
            copy([move])
            took.append(time.monotonic() - began)
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        beside.join()
    np.testing.assert_array_equal(to, wanted)
    assert took[-1] < PIECES / 4 * 0.05


@pytest.mark.parametrize("most", [1, 1000, PIECE, 3 * PIECE + 5])
def test_what_the_kernel_leaves_is_asked_for_again(long_pieces, monkeypatch, most):
    """As it does behind two gigabytes."""
    move, to, wanted, _ = long_pieces
    monkeypatch.setattr(copies, "_WAIT", -1)
    read = copies._read_memory()
    left = [most, most]  # then all

    def some(process, targets, target_count, sources, source_count, flags):
        if not left:
            return read(process, targets, target_count, sources, source_count, flags)
        short = np.zeros((target_count, 2), np.int64)
        ctypes.memmove(short.ctypes.data, targets, short.nbytes)
        ends = np.minimum(np.cumsum(short[:, 1]), left.pop())
        short[:, 1] = np.diff(ends, prepend=0)
        return read(process, short.ctypes.data, target_count, sources, source_count, flags)

    monkeypatch.setattr(copies, "_read_memory", lambda: some)
    copy([move])
    assert not left
    np.testing.assert_array_equal(to, wanted)


def test_where_the_kernel_may_not_be_asked_the_c_library_copies(long_pieces, monkeypatch):
    """As in a container whose profile knows no `process_vm_readv`."""
    move, to, wanted, _ = long_pieces
    monkeypatch.setattr(copies, "_WAIT", -1)
    monkeypatch.setattr(copies, "_read_memory", lambda: lambda *_: -1)
    copy([move])
    np.testing.assert_array_equal(to, wanted)
