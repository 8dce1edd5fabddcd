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


@pytest.mark.parametrize(("device", "index"), [("cpu", 0), ("cuda", 0), ("cuda:3", 3)])
def test_a_device_has_an_index(device, index):
    from tensorway_nixl import tables

    assert index == tables.device_index(device)
