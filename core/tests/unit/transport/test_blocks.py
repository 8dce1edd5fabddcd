"""Block tables and ids: five numbers that mean exactly the bytes that they say, and refusals of all others."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorway.errors import MemoryInvalid
from tensorway.memory import ADDRESS_LIMIT, Region
from tensorway.transport.blocks import MAX_BLOCKS, MAX_PLANES, BlockTable, block_ids, covered

# -- tables


@st.composite
def tables_with_ids(draw):
    block, count, planes = draw(st.integers(1, 9)), draw(st.integers(1, 12)), draw(st.integers(1, 3))
    stride = block + draw(st.sampled_from([0, 0, 1, 5]))
    bases = tuple(1000 * (plane + 1) + draw(st.integers(0, 50)) for plane in range(planes))
    table = BlockTable(bases, block, stride, count, stacked=draw(st.booleans()))
    return table, draw(st.lists(st.integers(0, count * (planes if table.stacked else 1) - 1), max_size=20))


@given(tables_with_ids())
def test_the_pieces_are_exactly_the_bytes_of_the_blocks_in_their_order(given_):
    table, ids = given_
    if table.stacked:
        rows = [base + table.stride * block for base in table.bases for block in range(table.count)]
        starts = [rows[block] for block in ids]
    else:
        starts = [base + table.stride * block for base in table.bases for block in ids]
    naive = [start + byte for start in starts for byte in range(table.block_bytes)]
    pieces = list(table.pieces(ids))
    assert naive == [start + byte for start, length in pieces for byte in range(length)]
    assert all(length > 0 for _, length in pieces)


@given(tables_with_ids())
def test_the_vector_is_the_pieces_in_one_array(given_):
    table, ids = given_
    assert [number for piece in table.pieces(ids) for number in piece] == list(table.vector(array("q", ids)))


@given(tables_with_ids())
def test_every_piece_lies_within_what_the_table_covers(given_):
    table, ids = given_
    extents = list(table.extents())
    for start, length in table.pieces(ids):
        assert any(first <= start and start + length <= first + span for first, span in extents)


def test_neighbors_of_a_dense_table_are_one_piece_and_others_are_not():
    dense, sparse = BlockTable((1000,), 8, 8, 16), BlockTable((1000,), 8, 16, 16)
    assert [(1000, 128)] == list(dense.pieces(range(16)))
    assert [(1008, 16), (1040, 8), (1000, 8)] == list(dense.pieces([1, 2, 5, 0]))
    assert [(1008, 8), (1000, 8)] == list(dense.pieces([1, 0]))
    assert [(1016, 8), (1032, 8)] == list(sparse.pieces([1, 2]))
    assert (True, False) == (dense.dense, sparse.dense)


def test_runs_of_two_planes_are_not_joined_even_if_the_planes_touch():
    assert [(1000, 16), (1016, 16)] == list(BlockTable((1000, 1016), 8, 8, 2).pieces([0, 1]))


def test_no_ids_are_no_pieces():
    assert [] == list(BlockTable((1000, 2000), 8, 8, 4).pieces([]))
    assert [] == list(BlockTable((1000,), 8, 9, 4).pieces([]))


def test_the_span_ends_behind_the_last_block_and_not_behind_its_gap():
    assert 3 * 100 + 8 == BlockTable((1000,), 8, 100, 4).span


@pytest.mark.parametrize(
    "fields",
    [
        {"bases": ()},
        {"bases": (0,)},
        {"bases": (-8,)},
        {"bases": (1.0,)},
        {"bases": (True,)},
        {"bases": (1000,) * (MAX_PLANES + 1)},
        {"block_bytes": 0},
        {"block_bytes": -8},
        {"block_bytes": 8.0},
        {"stride": 7},
        {"stride": 0},
        {"stride": True},
        {"count": 0},
        {"count": -1},
        {"count": MAX_BLOCKS + 1},
        {"count": 1.5},
        {"bases": (1000, ADDRESS_LIMIT - 31)},
        {"stride": 1 << 62, "count": 4},
        {"block_bytes": 1 << 64, "stride": 1 << 64, "count": 1},
    ],
    ids=lambda fields: str(fields)[:50],
)
def test_numbers_that_cannot_be_meant_are_refused(fields):
    given_ = {"bases": (1000,), "block_bytes": 8, "stride": 8, "count": 4}
    with pytest.raises(MemoryInvalid):
        BlockTable(**given_ | fields)


def test_the_limits_themselves_are_taken():
    assert ADDRESS_LIMIT == sum(next(BlockTable((ADDRESS_LIMIT - 32,), 8, 8, 4).extents()))
    assert MAX_PLANES == len(BlockTable((8,) * MAX_PLANES, 8, 8, 1).bases)
    assert MAX_BLOCKS == BlockTable((8,), 1, 1, MAX_BLOCKS).count


# -- over regions


def test_a_table_over_a_region_has_as_many_blocks_as_fit():
    region = Region(1000, 100, "cuda:1")
    assert BlockTable((1000,), 8, 8, 12, "cuda:1") == BlockTable.over(region, 8)
    assert BlockTable((1000,), 8, 30, 4, "cuda:1") == BlockTable.over(region, 8, stride=30)
    assert BlockTable((1000,), 10, 30, 4, "cuda:1") == BlockTable.over(region, 10, stride=30)
    assert BlockTable((1000,), 11, 30, 3, "cuda:1") == BlockTable.over(region, 11, stride=30)
    assert BlockTable((1096,), 4, 4, 1, "cuda:1") == BlockTable.over(region, 4, offset=96)
    assert BlockTable((1000,), 8, 8, 3, "cuda:1") == BlockTable.over(region, 8, count=3)


def test_regions_are_planes_in_their_order():
    assert (2000, 1000) == BlockTable.over([Region(2000, 100), Region(1000, 100)], 8).bases


@pytest.mark.parametrize(
    "regions",
    [[], [Region(1000, 100), Region(2000, 101)], [Region(1000, 100), Region(2000, 100, "cuda:0")]],
    ids=["none", "lengths", "devices"],
)
def test_planes_that_are_not_alike_are_refused(regions):
    with pytest.raises(MemoryInvalid, match="planes"):
        BlockTable.over(regions, 8)


@pytest.mark.parametrize(
    ("block", "more"), [(101, {}), (0, {}), (-1, {}), (8, {"stride": 0}), (8, {"stride": 4}), (8, {"offset": 93})]
)
def test_a_table_that_fits_no_block_is_refused(block, more):
    with pytest.raises(MemoryInvalid):
        BlockTable.over(Region(1000, 100), block, **more)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 60), st.integers(0, 320))
def test_a_table_over_a_region_is_covered_by_it_and_one_block_more_is_not(nbytes, block, gap, offset):
    region = Region(5000, nbytes)
    if offset + block > nbytes:
        with pytest.raises(MemoryInvalid):
            BlockTable.over(region, block, stride=block + gap, offset=offset)
        return
    table = BlockTable.over(region, block, stride=block + gap, offset=offset)
    more = BlockTable.over(region, block, stride=block + gap, offset=offset, count=table.count + 1)
    assert (True, False) == (covered(table, [region]), covered(more, [region]))


# -- covered


def test_a_table_is_covered_if_each_plane_lies_in_one_region_on_its_device():
    table = BlockTable((1000, 3000), 8, 8, 10)
    first, second = Region(1000, 80), Region(2990, 90)
    assert covered(table, [first, second])
    assert covered(table, iter([Region(1, 10_000)]))
    for regions in (
        [],
        [first],
        [second],
        [Region(1001, 80), second],
        [Region(1000, 79), second],
        [Region(1000, 40), Region(1040, 40), second],
        [Region(1000, 80, "cuda:0"), second],
    ):
        assert not covered(table, regions)


# -- ids


class Numbers:
    """What numpy's and torch's arrays give."""

    def __init__(self, values) -> None:
        self.values = values

    def tolist(self):
        return self.values

    def __repr__(self) -> str:  # a test of the same name wherever it is collected
        return f"Numbers({self.values})"


@pytest.mark.parametrize(
    "ids", [[3, 0, 2], (3, 0, 2), iter([3, 0, 2]), Numbers([3, 0, 2])], ids=["list", "tuple", "iterator", "array"]
)
def test_ids_of_any_kind_are_64_bit_integers_in_their_order(ids):
    values = block_ids(ids, 4, unique=True, whose="local")
    assert ("q", 8, [3, 0, 2]) == (values.typecode, values.itemsize, values.tolist())


def test_no_ids_are_ids():
    assert [] == block_ids([], 4, unique=True, whose="local").tolist()


@pytest.mark.parametrize(
    "ids",
    [
        [4],
        [-1],
        [0, 1 << 32],
        [1 << 64],
        [1.0],
        [True],
        ["0"],
        [None],
        "01",
        Numbers([[0, 1]]),
        Numbers([0.0]),
        Numbers([True]),
        Numbers(0),
        None,
        0,
    ],
    ids=repr,
)
def test_ids_that_cannot_be_meant_are_refused(ids):
    with pytest.raises(MemoryInvalid, match="remote"):
        block_ids(ids, 4, unique=False, whose="remote")


def test_a_block_is_named_twice_only_where_it_is_read():
    assert [1, 1] == block_ids([1, 1], 4, unique=False, whose="local").tolist()
    with pytest.raises(MemoryInvalid, match="twice"):
        block_ids([1, 2, 1], 4, unique=True, whose="local")


def test_many_ids_are_taken_in_no_time():
    ids = list(range(200_000))
    random.Random(1).shuffle(ids)
    assert ids == block_ids(ids, 200_000, unique=True, whose="local").tolist()
