"""Rebalances between real processes: exact to the byte, whole or not at all, and with an end when ranks die."""

from __future__ import annotations

import random
import signal
import time

import attrs
import numpy as np
import pytest

from tensorway.rendezvous import Directory
from tensorway.testing.ranks import Place, RankFailed
from tensorway_eplb.placement import EMPTY, Placement
from tensorway_eplb.testing import campaign, engine, groups
from tensorway_eplb.testing.engine import Model
from tensorway_eplb.testing.groups import swapped

MODEL = Model(layers=4, experts=8, slots=4)
DEADLINE = 10.0


def entered(world, processes, path, model=MODEL):
    return groups.entered(world, processes, path, model)


def together(world, processes, rows, deadline=DEADLINE):
    return groups.together(world, processes, rows, deadline)


# -- what arrives


def test_any_placement_is_reached_exactly(world):
    """Rows, maps and placements of all ranks are the new ones, to the byte, again and again."""
    entered(world, [0, 1, 2], "/exact/experts")
    rng = random.Random(7)
    for _ in range(8):
        rows = campaign.random_rows(rng, MODEL, 3)
        for report in together(world, [0, 1, 2], rows):
            assert ("", (), rows.tobytes()) == (report.error, report.wrong, report.placement)


def test_a_group_of_some_processes_has_ranks_of_its_own(world):
    """Ranks are of the group: processes 2 and 3 are 0 and 1 in theirs, while 0 and 1 are in another one."""
    for processes, path in [([0, 1], "/sub/first"), ([3, 2], "/sub/second")]:
        entered(world, processes, path)
    rows = campaign.random_rows(random.Random(8), MODEL, 2)
    for processes in ([0, 1], [3, 2]):
        for report in together(world, processes, rows):
            assert ("", (), rows.tobytes()) == (report.error, report.wrong, report.placement)


def test_empty_slots_stay_empty_and_can_be_filled_again(world):
    entered(world, [0, 1, 2], "/empty/experts")
    rows = campaign.random_rows(random.Random(9), MODEL, 3)
    for layer in rows:
        seen = set()
        for slot, expert in enumerate(layer):
            if expert in seen:
                layer[slot] = EMPTY
            seen.add(expert)
    assert (rows == EMPTY).any()
    for target in (rows, campaign.random_rows(random.Random(10), MODEL, 3)):
        for report in together(world, [0, 1, 2], target):
            assert ("", (), target.tobytes()) == (report.error, report.wrong, report.placement)


# -- what does not arrive


def spoil(rank, layer, slot):
    """Damage a live row, as a torn write or a wrong load would."""
    rank.notes["engine"].weights[layer][0][slot, 17] ^= 1


def audit(rank):
    return rank.notes["rebalancer"].audit()


def counts(rank):
    return dict(rank.notes["rebalancer"].statistics())


def test_a_damaged_row_is_taken_from_another_replica(world):
    model = attrs.evolve(MODEL, copies=False)
    start = entered(world, [0, 1, 2], "/damaged/experts", model)  # experts 0 to 3 are on ranks 0 and 2
    assert 0 == start.map[0, 0] == start.map[0, 8]
    rows = start.map.copy()
    rows[0, 5] = 0  # rank 1 wants expert 0
    rows[0, 9] = 5
    world[0].call(spoil, 0, 0)
    assert [(0, 0, 0)] == world[0].call(audit)
    reports = together(world, [0, 1, 2], rows)
    assert ["", "", ""] == [report.error for report in reports]
    assert () == reports[1].wrong and rows.tobytes() == reports[1].placement
    # Which of two equal sources is asked first is the plan's business; the damaged one was, or was not.
    assert world[1].call(counts)["mismatched_rows"] in (0, 1)


def test_a_layer_whose_only_source_is_damaged_keeps_its_old_weights_everywhere(world):
    model = attrs.evolve(MODEL, copies=False)
    start = entered(world, [0, 1], "/kept/experts", model)
    world[0].call(spoil, 2, 1)
    rows = swapped(start, 1, 6)  # expert 1 of rank 0 goes to rank 1, which has no other source
    reports = together(world, [0, 1], rows)
    expected = rows.copy()
    expected[2] = start.map[2]
    for rank, report in enumerate(reports):
        assert ("", (0, 1, 3), expected.tobytes()) == (report.error, report.committed, report.placement)
        # Rank 0 still has the row that the test has damaged, and nothing else is wrong.
        assert ([] if rank else ["layer 2 slot 1 is not expert 1 in w13"]) == list(report.wrong)
    assert 1 == world[1].call(counts)["mismatched_rows"]


def test_a_damaged_row_is_loaded_from_a_copy_if_there_is_one(world):
    start = entered(world, [0, 1], "/copied/experts")
    world[0].call(spoil, 2, 1)
    rows = swapped(start, 1, 6)
    reports = together(world, [0, 1], rows)
    assert [("", (), rows.tobytes())] * 2 == [(report.error, report.wrong, report.placement) for report in reports]
    assert 1 == world[1].call(counts)["loaded_rows"]


def test_an_expert_that_nobody_holds_is_an_error_before_any_byte(world):
    start = entered(world, [0, 1, 2], "/lost/experts", attrs.evolve(MODEL, copies=False))
    world[1].close()  # experts 4 to 7 were there, and nowhere else
    for report in world.each([0, 2], engine.regroup, ["p0", "p2"], 10.0):
        assert ("", ()) == (report.error, report.wrong)
    left = start.by_rank[:, [0, 2]].reshape(MODEL.layers, -1)
    for report in together(world, [0, 2], np.tile(np.arange(8, dtype=np.int32), (MODEL.layers, 1)), 2.0):
        assert "ExpertLost" == report.error and "4 of layer 0" in report.text
        assert left.tobytes() == report.placement and () == report.wrong


def test_a_placement_without_an_expert_that_is_held_is_refused(world):
    start = entered(world, [0, 1], "/left-out/experts")
    rows = start.map.copy()
    rows[1, 3] = EMPTY
    for report in together(world, [0, 1], rows):
        assert "PlacementInvalid" == report.error and "3 of layer 1" in report.text
        assert start.map.tobytes() == report.placement and () == report.wrong


def test_ranks_with_different_targets_say_so_and_change_nothing(world):
    start = entered(world, [0, 1], "/plans/experts")
    for process, pair in [(0, (0, 5)), (1, (1, 5))]:
        world[process].start(engine.rebalance, swapped(start, *pair), 3.0)
    for report in [world[process].result() for process in (0, 1)]:
        assert report.error in ("PlacementInvalid", "PeerLost") and report.seconds < 4.0
        assert start.map.tobytes() == report.placement and () == report.wrong


def join_late(rank, *joining):
    """Be seen for a while before looking who else is there."""
    connect_all = Directory.connect_all

    def late(self, *names):
        time.sleep(0.1)
        return connect_all(self, *names)

    Directory.connect_all = late
    try:
        engine.join(rank, *joining)
    finally:
        Directory.connect_all = connect_all


@pytest.mark.parametrize("second", [engine.join, join_late])
def test_ranks_with_different_weights_are_told_layer_and_tensor(world, second):
    world.grow(2)
    start = Placement.linear(MODEL.layers, MODEL.experts, 2, MODEL.slots)
    other = attrs.evolve(MODEL, tensors=(("w13", 8192), ("w2", 4096), ("w2_scale", 128)))
    for process, (join, model) in enumerate([(engine.join, MODEL), (second, other)]):
        place = Place("/weights/experts", ("p0", "p1"), process)
        world[process].start(join, place, model, start)
    for process in (0, 1):
        with pytest.raises(RankFailed, match=r"Incompatible[\s\S]*layer 0 w2_scale"):
            world[process].result()


def test_a_rank_that_does_not_begin_costs_the_deadline_and_is_named(world):
    start = entered(world, [0, 1, 2], "/late/experts")
    began = time.monotonic()
    for report in together(world, [0, 1], swapped(start, 0, 5), 2.0):
        assert "PeerLost" == report.error and "p2" in report.text
        assert start.map.tobytes() == report.placement and () == report.wrong
    assert 1.9 < time.monotonic() - began < 4.0


# -- who dies


def test_deaths_and_stops_at_random_moments():
    """A slice of the campaign; `nox -s campaign -- eplb` runs hundreds."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    running = campaign.Campaign(seed, 3, MODEL)
    try:
        for _ in range(5):
            running.moment()
    finally:
        running.close()


def test_who_was_stopped_and_comes_back_learns_that_the_others_went_on(world):
    start = entered(world, [0, 1, 2], "/excluded/experts")
    world[2].start(engine.rebalance, swapped(start, 0, 5), DEADLINE)
    time.sleep(0.3)  # it waits for the others to begin
    world[2].signal(signal.SIGSTOP)
    try:
        for report in together(world, [0, 1], swapped(start, 0, 5), 6.0):
            assert "PeerLost" == report.error and ("p2",) == report.lost
        for report in world.each([0, 1], engine.regroup, None, 10.0):
            assert "" == report.error
    finally:
        world[2].signal(signal.SIGCONT)
    report = world[2].result(30)
    assert report.error in ("Excluded", "PeerLost") and () == report.wrong
    assert "Excluded" == world[2].call(engine.regroup, None, 10.0).error


# -- reload, and what is left behind


def reload(rank, layer, expert):
    """Overwrite an expert wherever it is; how many rows that were."""
    with rank.notes["rebalancer"].reloading(layer, expert) as rows:
        for row in rows:
            rank.notes["engine"].load(layer, expert, row)
        return len(rows)


def test_a_reload_finds_an_expert_wherever_it_is_now(world):
    entered(world, [0, 1, 2], "/reload/experts")
    rows = campaign.random_rows(random.Random(11), MODEL, 3)
    together(world, [0, 1, 2], rows)
    found = world.each([0, 1, 2], reload, 1, 5)
    assert np.count_nonzero(rows[1] == 5) == sum(found)
    assert [(), (), ()] == [report.wrong for report in world.each([0, 1, 2], engine.look)]


def prepared(rank):
    """Count the routes that are prepared from now on."""
    endpoint = rank.notes["rebalancer"]._session.endpoint
    rank.notes["prepared"] = 0
    prepare = endpoint.prepare

    def counting(*arguments):
        rank.notes["prepared"] += 1
        return prepare(*arguments)

    endpoint.prepare = counting


def prepared_since(rank):
    return rank.notes["prepared"]


def test_many_rebalances_leave_nothing_behind_and_prepare_nothing_new(world):
    entered(world, [0, 1], "/many/experts")
    rng = random.Random(12)

    def some(times):
        for _ in range(times):
            rows = campaign.random_rows(rng, MODEL, 2)
            assert ["", ""] == [report.error for report in together(world, [0, 1], rows)]

    some(10)
    world.each([0, 1], prepared)
    before = world.each([0, 1], engine.resources)
    some(60)
    after = world.each([0, 1], engine.resources)
    assert [0, 0] == world.each([0, 1], prepared_since)
    for first, last in zip(before, after, strict=True):
        assert last["files"] <= first["files"] and last["threads"] <= first["threads"]
        assert last["kilobytes"] < first["kilobytes"] + 4096


def test_regroups_leave_nothing_behind(world):
    entered(world, [0, 1], "/regroups/experts")
    world.each([0, 1], engine.regroup, None, 10.0)
    before = world.each([0, 1], engine.resources)
    for _ in range(15):
        for report in world.each([0, 1], engine.regroup, None, 10.0):
            assert ("", ()) == (report.error, report.wrong)
    for first, last in zip(before, world.each([0, 1], engine.resources), strict=True):
        assert last["files"] <= first["files"] + 1 and last["threads"] <= first["threads"] + 1
