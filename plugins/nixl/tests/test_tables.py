from __future__ import annotations

from array import array

import pytest

from tensorway.transport import BlockTable

pytestmark = pytest.mark.usefixtures("real_nixl")

TABLE = BlockTable((1 << 20, 1 << 30, 3 << 40), 512, 4096, 100, "cuda:2")


def test_the_rows_are_the_blocks_of_the_table_plane_by_plane():
    from tensorway_nixl import tables

    rows = tables.expanded(TABLE)

    assert [(a, n, 2) for a, n in TABLE.pieces(range(100))] == [tuple(map(int, row)) for row in rows]


def test_the_short_form_says_the_same_in_a_row_per_plane():
    from tensorway_nixl import tables

    rows = [tuple(map(int, row)) for row in tables.strided(TABLE)]

    assert [(base, 512, 2, 4096, 100) for base in TABLE.bases] == rows


def test_an_index_names_a_block_of_a_plane():
    from tensorway_nixl import tables

    chosen = tables.indices(TABLE, array("q", [7, 0, 99]))

    assert "int32" == str(chosen.dtype)
    assert [(a, 512, 2) for a, _ in TABLE.pieces([7, 0, 99])] == [
        tuple(map(int, row)) for row in tables.expanded(TABLE)[chosen]
    ]


@pytest.mark.parametrize("count", [1, 32, 33, 100])
def test_ids_of_one_plane_are_indices_however_many(count):
    from tensorway_nixl import tables

    ids = array("q", range(count - 1, -1, -1))

    assert [*ids] == [*map(int, tables.indices(BlockTable((1 << 20,), 512, 512, 100), ids))]


LONG = 3 << 20
ONE = BlockTable((1 << 40,), LONG, LONG + 4096, 90)
PLANES = BlockTable((1 << 41, 1 << 42, 1 << 43), LONG, LONG, 30)
STACKED = BlockTable((1 << 44, 1 << 45, 1 << 46), LONG, LONG + 512, 30, stacked=True)
IDS = {id(ONE): [2, 88, 31], id(PLANES): [0, 29, 3], id(STACKED): [89, 0, 45]}


@pytest.mark.parametrize(("here", "there"), [(ONE, STACKED), (STACKED, ONE), (STACKED, STACKED), (PLANES, PLANES)])
def test_parts_of_blocks_are_where_the_blocks_are_and_meet_their_own(here, there):
    from tensorway_nixl import tables

    parts = tables.parts(here, there)
    assert 6 == parts
    sides = []
    for table in (here, there):
        pieces = tables.expanded(tables.cut(table, parts))
        assert {LONG // parts} == set(pieces[:, 1])
        starts = [start for plane in table.starts(IDS[id(table)]) for start in plane]
        chosen = pieces[tables.indices(tables.cut(table, parts), array("q", IDS[id(table)]), parts)][:, 0].tolist()
        within = [
            next((block, at - start) for block, start in enumerate(starts) if 0 <= at - start < LONG) for at in chosen
        ]
        assert sorted(within) == [
            (block, part * LONG // parts) for block in range(len(starts)) for part in range(parts)
        ]
        sides.append(within)
    assert sides[0] == sides[1]


@pytest.mark.parametrize(
    ("nbytes", "parts"),
    [
        (1, 1),
        (512 << 10, 1),
        ((512 << 10) + 2, 2),
        (1 << 20, 2),
        (3 * (512 << 10), 3),
        (5 * 7919 * 128, 10),
        (8388617, 1),
    ],
)
def test_a_block_is_cut_into_as_few_equal_parts_as_are_short_enough(nbytes, parts):
    from tensorway_nixl import tables

    assert parts == tables.parts(BlockTable((1 << 20,), nbytes, nbytes, 4))


def test_what_would_be_too_many_pieces_is_not_cut():
    from tensorway_nixl import tables

    assert 1 == tables.parts(BlockTable((1 << 20,), LONG, LONG, 1 << 20))
    assert 1 == tables.parts(BlockTable(tuple((1 << 40) + i * LONG for i in range(20_000)), LONG, LONG, 1))


@pytest.mark.parametrize(("device", "index"), [("cpu", 0), ("cuda", 0), ("cuda:3", 3)])
def test_a_device_has_an_index(device, index):
    from tensorway_nixl import tables

    assert index == tables.device_index(device)
