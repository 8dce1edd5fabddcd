"""A placement never changes, is checked when it is made, and is read whole or not at all."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorway.errors import PlacementInvalid
from tensorway_eplb.placement import EMPTY, Placement

LOADS = np.array([[4.0, 2.0, 1.0, 1.0]])


def test_the_linear_start_is_the_one_of_engines_and_its_balance_the_published_one():
    weights = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    start = Placement.linear(2, 12, 8, 2)
    assert [*range(12), 0, 1, 2, 3] == start.map[0].tolist()
    assert 0.4464 == round(start.balancedness(weights), 4)


def test_replicas_share_an_expert_s_load_and_speeds_count():
    placement = Placement(np.array([[0, 1, 0, 2]]), 4, 2)
    assert [[4.0, 3.0]] == placement.rank_loads(LOADS).tolist()
    assert 3.5 / 4 == placement.balancedness(LOADS)
    assert pytest.approx(7 / 3 / 3) == placement.balancedness(LOADS, (2.0, 1.0))
    assert 1.0 == placement.balancedness(np.zeros((1, 4)))


@pytest.mark.parametrize(
    ("rows", "experts", "ranks"),
    [
        ([0, 1], 2, 1),
        ([[0, 1, 2]], 3, 2),
        ([[0, 2]], 2, 1),
        ([[-2, 0]], 2, 1),
        ([[0.5, 1]], 2, 1),
        ([[]], 1, 1),
        ([[0]], 1, 0),
        ([[0]], 0, 1),
    ],
)
def test_what_no_group_can_have_is_refused(rows, experts, ranks):
    with pytest.raises(PlacementInvalid):
        Placement(np.array(rows), experts, ranks)


def test_it_cannot_be_changed_and_does_not_change_with_what_it_was_made_from():
    rows = np.array([[0, 1]], dtype=np.int32)
    placement = Placement(rows, 2, 1)
    rows[0, 0] = 1
    assert [[0, 1]] == placement.map.tolist()
    with pytest.raises(ValueError, match="read-only"):
        placement.map[0, 0] = 1


def test_ranks_go_and_come_with_the_experts_that_only_they_held():
    placement = Placement(np.array([[0, 1, 2, 3]]), 4, 2, epoch=3)
    left = placement.without([0])
    assert ([[2, 3]], 1, 3, [(0, 0), (0, 1)]) == (left.map.tolist(), left.ranks, left.epoch, left.lost)
    assert [[2, 3, EMPTY, EMPTY]] == left.with_empty(1).map.tolist()
    with pytest.raises(PlacementInvalid):
        placement.without([0, 1])


def test_the_table_of_slots_lists_every_replica_once():
    placement = Placement(np.array([[2, 0, 2, EMPTY]]), 3, 2)
    assert [[[1, EMPTY], [EMPTY, EMPTY], [0, 2]]] == placement.slots_of().tolist()
    assert (1, 3, 3) == placement.slots_of(3).shape
    with pytest.raises(PlacementInvalid):
        placement.slots_of(1)


def test_a_saved_placement_is_read_back_and_its_digest_does_not_depend_on_the_epoch(tmp_path):
    placement = Placement(np.array([[2, 0, 2, EMPTY]]), 3, 2, epoch=7)
    placement.save(tmp_path / "p.json")
    read = Placement.load(tmp_path / "p.json")
    assert (placement, 7) == (read, read.epoch)
    assert placement == Placement(placement.map, 3, 2)
    assert ["p.json"] == [path.name for path in tmp_path.iterdir()]


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_file_with_any_byte_changed_is_refused_or_the_same(tmp_path_factory, at, byte):
    folder = tmp_path_factory.mktemp("placement")
    placement = Placement.linear(2, 5, 3, 2)
    placement.save(folder / "p.json")
    data = bytearray((folder / "p.json").read_bytes())
    data[at % len(data)] = byte
    (folder / "p.json").write_bytes(data)
    try:
        assert placement == Placement.load(folder / "p.json")
    except PlacementInvalid:
        pass


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"digest": 1}', "[" * 100_000, '{"schema": "tensorway.placement/1", "digest": ""}', "7"]
)
def test_files_of_something_else_are_refused(tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(PlacementInvalid):
        Placement.load(tmp_path / "p.json")


def test_a_file_with_a_digest_of_its_own_making_is_still_checked(tmp_path):
    placement = Placement.linear(1, 2, 1, 2)
    placement.save(tmp_path / "p.json")
    fields = json.loads((tmp_path / "p.json").read_text())
    from tensorway_eplb.placement import _file_digest

    for change in ({"ranks": 3}, {"experts": 1}, {"map": [[0, 9]]}, {"map": [[0], [0, 1]]}, {"epoch": -1}, {"map": {}}):
        changed = {key: value for key, value in fields.items() if key != "digest"} | change
        changed["digest"] = _file_digest(changed)
        (tmp_path / "p.json").write_text(json.dumps(changed))
        with pytest.raises(PlacementInvalid):
            Placement.load(tmp_path / "p.json")
