"""How two pages meet: the positions that both have, in runs that could not be longer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorway.kv import Part
from tensorway_kv.intersect import Axis, Box, meet, pattern
from tensorway_kv.tables import Room, units


@st.composite
def axes(draw):
    of, interleave = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return Axis(interleave * draw(st.integers(1, 4)), draw(st.integers(0, of - 1)), of, interleave)


def slots(axis, period):
    """Where a rank keeps positions, found by filling its pages one after the other."""
    held = [position for position in range(period) if position // axis.interleave % axis.of == axis.rank]
    return {position: divmod(nth, axis.tokens) for nth, position in enumerate(held)}


@settings(deadline=None)
@given(axes(), axes())
def test_positions_meet_where_both_sides_keep_them(own, theirs):
    met = meet(own, theirs)
    mine, its = slots(own, met.period), slots(theirs, met.period)
    assert sorted(set(mine) & set(its)) == met.positions.tolist()
    for index, position in enumerate(met.positions.tolist()):
        segment = met.segments[index]
        assert mine[position] == (met.own_block[segment], met.own_slots[index])
        assert its[position] == (met.their_block[segment], met.their_slots[index])
        assert met.begins[segment] <= position < met.ends[segment]
    assert (met.ends[:-1] <= met.begins[1:]).all()
    assert met.period == met.own_blocks * own.block_tokens == met.their_blocks * theirs.block_tokens


def box(own, theirs, first=0, stop=4):
    return Box.of(own, theirs, first, stop)


NHD = Part(0, "k", 0, 4, 32, 0, 4, 8, 8)
HND = Part(0, "k", 0, 4, 8, 0, 4, 32, 8)


@pytest.mark.parametrize(
    ("own", "theirs", "heads", "expected"),
    [
        (NHD, NHD, (0, 4), [(0, 0, 128)]),
        (HND, HND, (0, 4), [(0, 0, 128)]),
        (HND, HND, (1, 3), [(32, 32, 64)]),
        (NHD, NHD, (1, 3), [(8 + 32 * token, 8 + 32 * token, 16) for token in range(4)]),
        (NHD, HND, (0, 1), [(32 * token, 8 * token, 8) for token in range(4)]),
    ],
)
def test_runs_are_as_long_as_both_sides_are_contiguous(own, theirs, heads, expected):
    axis = Axis(4)
    runs = pattern(axis, axis, (box(own, theirs, *heads),)).whole
    assert expected == list(zip(runs.own.tolist(), runs.theirs.tolist(), runs.nbytes.tolist(), strict=True))


def test_components_that_are_neighbors_on_both_sides_are_one_run():
    boxes = [Box(at, 16, 0, at, 16, 0, 1, 8) for at in (0, 8)]
    assert [64] == pattern(Axis(4), Axis(4), tuple(boxes)).whole.nbytes.tolist()
    assert [16] * 4 == pattern(Axis(4), Axis(4), tuple(boxes)).single.nbytes.tolist()


@st.composite
def places(draw):
    """Runs at places that do not overlap, and pages around them."""
    count = draw(st.integers(1, 6))
    lengths = [draw(st.sampled_from([4, 8, 12, 16, 5])) for _ in range(count)]
    sides = []
    for _ in range(2):
        order = draw(st.permutations(range(count)))
        gaps = [draw(st.sampled_from([0, 4, 8, 3])) for _ in range(count)]
        ends = list(itertools.accumulate(gaps[index] + lengths[index] for index in order))
        at = dict(zip(order, [end - lengths[index] for end, index in zip(ends, order, strict=True)], strict=True))
        stride = ends[-1] + draw(st.sampled_from([0, 1, 4, 64]))
        sides.append(([at[index] for index in range(count)], Room(stride, 3, 2 * stride + ends[-1])))
    return lengths, sides


@settings(deadline=None)
@given(places())
def test_units_are_the_runs_and_nothing_else_in_every_page(case):
    lengths, ((own_at, own_room), (their_at, their_room)) = case
    boxes = tuple(Box(a, 0, 0, b, 0, 0, 1, n) for a, b, n in zip(own_at, their_at, lengths, strict=True))
    runs = pattern(Axis(0), Axis(0), boxes).whole
    expected = {
        (own_room.stride * page + a + byte, their_room.stride * page + b + byte)
        for page in range(3)
        for a, b, n in zip(own_at, their_at, lengths, strict=True)
        for byte in range(n)
    }
    found = []
    for unit in units(runs, own_room, their_room):
        for page in range(3):
            starts = []
            for column, add, room in (
                (unit.own, unit.own_add, own_room),
                (unit.theirs, unit.their_add, their_room),
            ):
                ids = page * column.scale + add
                assert ids.max() < column.count
                assert column.offset + column.stride * (column.count - 1) + unit.nbytes <= room.nbytes
                starts.append(column.offset + ids * column.stride)
            found += [
                (mine + byte, its + byte)
                for mine, its in zip(*map(np.ndarray.tolist, starts), strict=True)
                for byte in range(unit.nbytes)
            ]
    assert len(found) == len(set(found))
    assert expected == set(found)


def test_units_are_whole_runs_where_pages_allow_and_few_tables_where_not():
    def shapes(stride, *rows):
        boxes = tuple(Box(a, 0, 0, b, 0, 0, 1, n) for a, b, n in rows)
        runs, room = pattern(Axis(0), Axis(0), boxes).whole, Room(stride, 4, 4 * stride)
        return [(unit.nbytes, unit.own.stride, len(unit.step)) for unit in units(runs, room, room)]

    assert [(64, 64, 2)] == shapes(128, (0, 64, 64), (64, 0, 64))
    assert [(64, 72, 1)] == shapes(72, (0, 0, 64))
    assert [(8, 8, 3)] == shapes(24, (0, 8, 16), (16, 0, 8))
    halves = [(n * 2048, (63 - n) * 2048, 2048) for n in range(64)]
    scales = [(1 << 17 | n * 4, 1 << 17 | (63 - n) * 4, 4) for n in range(64)]
    assert [(4, 4, 64), (2048, 2048, 64)] == shapes(1 << 18, *halves, *scales)
    # One table with as many ids as there are blocks of 4 bytes in 2**40 is more than a table can have.
    wide = [(0, 4, 4), (1 << 30, 1 << 30, 4)]
    assert [(4, 1 << 31, 1)] * 2 == shapes(1 << 31, *wide)
