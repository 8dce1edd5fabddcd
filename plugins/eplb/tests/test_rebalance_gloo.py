"""Rebalances over `gloo`: both sides start a move, and the rendezvous carries what members say to each other."""

from __future__ import annotations

import importlib.util
import random
import signal

import attrs
import numpy as np
import pytest

from tensorway.testing.ranks import Place
from tensorway_eplb.control import StoreControl
from tensorway_eplb.placement import EMPTY
from tensorway_eplb.testing import campaign, engine, groups
from tensorway_eplb.testing.engine import Model
from tensorway_eplb.testing.groups import swapped

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason='needs torch: pip install "tensorway[gloo]"'
)

MODEL = Model(layers=4, experts=8, slots=4, communicator="gloo", options={}, patience=2.0)
DEADLINE = 6.0


def entered(world, processes, path, model=MODEL):
    return groups.entered(world, processes, path, model)


def together(world, processes, rows, deadline=DEADLINE):
    return groups.together(world, processes, rows, deadline)


def random_rows(seed, ranks):
    return campaign.random_rows(random.Random(seed), MODEL, ranks)


def reached(reports, rows):
    """Every rank has this placement, to the byte."""
    return [("", (), rows.tobytes())] * len(reports) == [(each.error, each.wrong, each.placement) for each in reports]


def control(rank):
    return type(rank.notes["rebalancer"]._control).__name__


def counts(rank):
    return dict(rank.notes["rebalancer"].statistics())


# -- what arrives


def test_any_placement_is_reached_exactly(world):
    entered(world, [0, 1, 2], "/gloo-exact/experts")
    assert [StoreControl.__name__] * 3 == world.each([0, 1, 2], control)
    for seed in range(6):
        rows = random_rows(seed, 3)
        reports = together(world, [0, 1, 2], rows)
        assert reached(reports, rows), reports


def test_a_group_of_some_processes_has_ranks_of_its_own(world):
    groups = {(3, 1): "/gloo-sub/first", (0, 2): "/gloo-sub/second"}
    for processes, path in groups.items():
        entered(world, list(processes), path)
    rows = random_rows(8, 2)
    for processes in groups:
        for index in processes:
            world[index].start(engine.rebalance, rows, DEADLINE)
    for processes in groups:
        reports = [world[index].result() for index in processes]
        assert reached(reports, rows), reports


# -- a row that is not what was loaded


def spoil(rank, layer, slot):
    """Damage a live row, as a torn write or a wrong load would."""
    rank.notes["engine"].weights[layer][0][slot, 17] ^= 1


def test_a_damaged_row_is_loaded_from_a_copy(world):
    """No other replica can be asked: nobody there would send. The copy can."""
    start = entered(world, [0, 1, 2], "/gloo-copied/experts")
    assert 1 == start.map[2, 1] == start.map[2, 9], "expert 1 has a replica on rank 2"
    world[0].call(spoil, 2, 1)
    world[2].call(spoil, 2, 1)
    rows = start.map.copy()
    rows[:, 6] = 1  # rank 1 wants it
    rows[:, 8] = 6  # and rank 2 has what it has overwritten
    reports = together(world, [0, 1, 2], rows)
    for rank, report in enumerate(reports):
        assert ("", rows.tobytes()) == (report.error, report.placement)
        spoilt = [] if rank == 1 else ["layer 2 slot 1 is not expert 1 in w13"]
        assert spoilt == list(report.wrong)
    found = world[1].call(counts)
    assert (1, 1, 0) == (found["mismatched_rows"], found["loaded_rows"], found["failed_fetches"])


def test_a_layer_whose_row_is_damaged_and_has_no_copy_keeps_its_old_weights_everywhere(world):
    model = attrs.evolve(MODEL, copies=False)
    start = entered(world, [0, 1], "/gloo-kept/experts", model)
    world[0].call(spoil, 2, 1)
    rows = swapped(start, 1, 6)
    expected = rows.copy()
    expected[2] = start.map[2]
    for rank, report in enumerate(together(world, [0, 1], rows)):
        assert ("", (0, 1, 3), expected.tobytes()) == (report.error, report.committed, report.placement)
        assert ([] if rank else ["layer 2 slot 1 is not expert 1 in w13"]) == list(report.wrong)
    back = together(world, [0, 1], start.map)
    assert [("", start.map.tobytes())] * 2 == [(report.error, report.placement) for report in back]


# -- who dies, stops, or comes


def missed(reports, name, start):
    """Survivors name who is missing, have the same layers, and every row is what the map says."""
    assert 1 == len({report.placement for report in reports}), reports
    for report in reports:
        assert ("PeerLost", (name,), ()) == (report.error, report.lost, report.wrong), report
        assert name in report.text and report.seconds <= DEADLINE + campaign.SLACK
    assert len(start.map.tobytes()) == len(reports[0].placement)


def go_on(world, processes, members, seed):
    """Survivors regroup, and move again."""
    for report in world.each(processes, engine.regroup, members, 20.0):
        assert ("", ()) == (report.error, report.wrong), report
    rows = random_rows(seed, len(processes))
    reports = together(world, processes, rows)
    assert reached(reports, rows), reports


@pytest.mark.parametrize("victim", [0, 2])
def test_survivors_of_a_killed_rank_name_it_and_go_on(world, victim):
    """Rank 0 is who lets the others find each other; it may die as any other."""
    start = entered(world, [0, 1, 2], f"/gloo-killed-{victim}/experts")
    left = [index for index in range(3) if index != victim]
    for index in left:
        world[index].start(engine.rebalance, random_rows(20, 3), DEADLINE)
    world[victim].signal(signal.SIGKILL)
    missed([world[index].result() for index in left], f"p{victim}", start)
    go_on(world, left, None, 21)


def test_survivors_of_a_stopped_rank_name_it_and_it_learns_that_they_went_on(world):
    start = entered(world, [0, 1, 2], "/gloo-stopped/experts")
    world[2].start(engine.rebalance, random_rows(30, 3), DEADLINE)
    world[2].signal(signal.SIGSTOP)
    try:
        missed(together(world, [0, 1], random_rows(30, 3)), "p2", start)
        go_on(world, [0, 1], None, 31)
    finally:
        world[2].signal(signal.SIGCONT)
    report = world[2].result(30)
    assert report.error in ("Excluded", "PeerLost") and () == report.wrong
    assert "Excluded" == world[2].call(engine.regroup, None, 10.0).error


def lose_lease(rank):
    """End the lease of its messages at the service, as it does with those of a process that was stopped for long."""
    control = rank.notes["rebalancer"]._control
    rank.rendezvous()._store.revoke(control._records._lease.name, 5.0)
    return control._records._lease.lost


def test_who_was_stopped_for_longer_than_its_messages_live_can_speak_again(world):
    entered(world, [0, 1], "/gloo-lease/experts")
    rows = random_rows(34, 2)
    assert reached(together(world, [0, 1], rows), rows)
    assert "" == world[1].call(lose_lease), "it does not know yet"
    rows = random_rows(35, 2)
    reports = together(world, [0, 1], rows)
    assert reached(reports, rows), reports


def test_a_member_is_invited_later_and_is_filled(world):
    entered(world, [0, 1], "/gloo-invited/experts")
    world.grow(3)
    world[2].start(engine.join, Place("/gloo-invited/experts", ("p2",), 0), MODEL, None)
    reports = world.each([0, 1], engine.regroup, ["p1", "p2", "p0"], 20.0)  # and ranks change
    world[2].result(30.0)
    assert [("", ())] * 2 == [(report.error, report.wrong) for report in reports]
    held = np.frombuffer(reports[0].placement, np.int32).reshape(MODEL.layers, -1)
    assert (held[:, MODEL.slots : 2 * MODEL.slots] == EMPTY).all()
    rows = random_rows(40, 3)
    reports = together(world, [1, 2, 0], rows)
    assert reached(reports, rows), reports


def test_a_killed_rank_is_replaced_by_one_of_its_name(world):
    start = entered(world, [0, 1, 2], "/gloo-replaced/experts")
    for index in (0, 1):
        world[index].start(engine.rebalance, random_rows(50, 3), DEADLINE)
    world[2].signal(signal.SIGKILL)
    missed([world[index].result() for index in (0, 1)], "p2", start)
    go_on(world, [0, 1], None, 51)
    world.grow(3)
    world[2].start(engine.join, Place("/gloo-replaced/experts", ("p2",), 0), MODEL, None)
    for index in (0, 1):
        world[index].start(engine.regroup, ["p0", "p1", "p2"], 20.0)
    reports = [world[index].result() for index in (0, 1)]
    world[2].result(30.0)
    assert [("", ())] * 2 == [(report.error, report.wrong) for report in reports]
    rows = random_rows(52, 3)
    reports = together(world, [0, 1, 2], rows)
    assert reached(reports, rows), reports


def test_deaths_and_stops_at_random_moments():
    """A slice of the campaign; `nox -s campaign -- eplb` runs hundreds, of any communicator."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    running = campaign.Campaign(seed, 3, MODEL)
    try:
        for _ in range(2):
            running.moment()
    finally:
        running.close()


# -- what is left behind


def test_many_rebalances_and_regroups_leave_nothing_behind(world):
    entered(world, [0, 1], "/gloo-many/experts")

    def some(seeds):
        for seed in seeds:
            rows = random_rows(seed, 2)
            reports = together(world, [0, 1], rows)
            assert reached(reports, rows), reports
        for report in world.each([0, 1], engine.regroup, None, 10.0):
            assert ("", ()) == (report.error, report.wrong)

    some(range(8))
    before = world.each([0, 1], engine.resources)
    for first in range(100, 150, 10):
        some(range(first, first + 10))
    for first, last in zip(before, world.each([0, 1], engine.resources), strict=True):
        # gloo keeps a thread for each fetch or send that was under way at once, until the group changes.
        assert last["files"] <= first["files"] + 1 and last["threads"] <= first["threads"] + 2
        assert last["kilobytes"] < first["kilobytes"] + 8192
