"""Pieces land where they belong, whichever way they are copied, and nothing beside them changes."""

from __future__ import annotations

import random

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
