"""Rows that have to come, with a session that only remembers what it was asked: where each is taken from, and when not.

The memory is real, so that what is verified and what is written are bytes.
"""

from __future__ import annotations

import ctypes
import threading
import time
from array import array
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tensorway import memory
from tensorway.eplb import Capabilities, ExpertLayout, Fetch, Staging
from tensorway.errors import StagingFull, TransferFailed
from tensorway_eplb.arrivals import Arrivals, Counts, Supply
from tensorway_eplb.placement import Placement
from tensorway_eplb.plan import LayerPlan, PeerRows
from tensorway_eplb.rows import Rows, digest

TENSORS = {"w13": 96, "scale": 8}
SLOTS, RANKS, EXPERTS = 3, 4, 9
#: This is rank 3. Experts 0 and 1 have two other holders, 4 has one, 8 has none.
OLD = Placement(np.array([[0, 1, 2, 0, 3, 1, 4, 5, -1, 6, 7, 6]]), EXPERTS, RANKS)


class Session:
    """Moves nothing, and remembers what it was asked for."""

    def __init__(self, initiator="receiver"):
        self.capabilities = Capabilities(frozenset({"cpu"}), initiator)
        self.posted, self.deadlines = [], []

    def post(self, fetch, deadline):
        self.posted.append(fetch)
        self.deadlines.append(deadline)

    def asked(self):
        """Peer, slots and staging rows of each fetch."""
        return [(fetch.peer, list(fetch.slots), list(fetch.rows)) for fetch in self.posted]


class Copies:
    """A copy of some experts outside of the group."""

    def __init__(self, world, experts, error=None, wrong=()):
        self.world, self.experts, self.error, self.wrong = world, set(experts), error, wrong
        self.go, self.loaded, self.threads = threading.Event(), [], set()
        self.go.set()

    def has(self, layer, expert):
        return expert in self.experts

    def load(self, layer, expert, into):
        assert self.go.wait(20)
        self.threads.add(threading.current_thread())
        if self.error:
            raise self.error
        self.world.fill(into.values(), expert + 100 * (expert in self.wrong))
        self.loaded.append(expert)


class World:
    """One rank's memory and all that arrivals of a layer share."""

    def __init__(self, rows=6, initiator="receiver", verify=True):
        self.weights = {
            name: np.frombuffer(memory.shared(SLOTS * n), np.uint8).reshape(SLOTS, n) for name, n in TENSORS.items()
        }
        for slot, expert in enumerate((6, 7, 6)):
            for tensor in self.weights.values():
                tensor[slot] = expert
        layout = ExpertLayout.of([self.weights], EXPERTS)
        self.session, self.staging = Session(initiator), Staging.on_host(layout.kinds, rows)
        self.rows, self.lost, self.counts = Rows(layout, self.staging), set(), Counts()
        self.loader = ThreadPoolExecutor(1)
        self.digests = np.array([[self.digest(expert) for expert in range(EXPERTS)]], np.uint64) if verify else None

    @staticmethod
    def fill(regions, expert):
        for region in regions:
            ctypes.memset(region.address, expert, region.nbytes)

    def digest(self, expert):
        buffers = {name: memory.Region.of(bytearray([expert]) * n) for name, n in TENSORS.items()}
        return digest((buffers[name].address, buffers[name].nbytes) for name in sorted(TENSORS))

    def supply(self, source=None):
        return Supply(
            self.session, self.staging, self.rows, OLD, self.digests, source, self.loader, 5,
            lambda: frozenset(self.lost), lambda nbytes: 1 + nbytes / 1000, self.rows.nbytes, self.counts,
        )  # fmt: skip

    def fill_rows(self, fetch, *experts):
        """What a fabric does."""
        for row, expert in zip(fetch.rows, experts, strict=True):
            self.fill(self.rows.regions(0, row).values(), expert)

    def live(self):
        return [int(self.weights["w13"][slot][0]) for slot in range(SLOTS)]


@pytest.fixture
def world():
    world = World()
    yield world
    world.loader.shutdown()


def plan(fetches=((0, (0, 1), (0, 1)), (2, (0,), (4,))), loads=(), copies=(), writes=((0, 0), (1, 1), (2, 2)), spare=0):
    """Experts 0 and 1 of rank 0, and 4 of rank 2, unless something else is said."""
    rows = tuple(PeerRows(peer, array("q", slots), array("q", experts)) for peer, slots, experts in fetches)
    count = sum(len(row.slots) for row in rows) + len(loads)
    return LayerPlan(0, rows, (), tuple(loads), copies, writes, count + spare, True)


def started(world, given=None, source=None):
    arrivals = Arrivals(given or plan(), world.supply(source))
    arrivals.start()
    return arrivals


def ended(arrivals):
    """Look until no load is under way."""
    until = time.monotonic() + 20
    while arrivals._loads and time.monotonic() < until:
        arrivals.look()
        time.sleep(0.005)
    assert not arrivals._loads


# -- as planned


def test_everything_is_asked_for_as_the_plan_says_and_written_when_it_is_there(world):
    arrivals = started(world)
    first, second = world.session.posted
    rows = list(arrivals.rows.values())
    assert [(0, [0, 1], rows[:2]), (2, [0], rows[2:])] == world.session.asked()
    assert [(0, 5, 1), (0, 5, 2)] == [(fetch.layer, fetch.cycle, fetch.attempt) for fetch in (first, second)]
    assert [1 + 2 * 104 / 1000, 1 + 104 / 1000] == world.session.deadlines
    world.fill_rows(first, 0, 1)
    arrivals.filled(first)
    assert {2} == arrivals.missing
    world.fill_rows(second, 4)
    arrivals.filled(second)
    assert (set(), "") == (arrivals.missing, arrivals.failed)
    assert [6, 7, 6] == world.live(), "nothing is written before the group has decided"
    arrivals.write()
    assert [0, 1, 4] == world.live()
    assert [] == arrivals.release()
    assert (6, 0) == (world.staging.free, world.staging.quarantined)
    counts = world.counts
    assert (3, 312, 0, 0) == (counts.fetched_rows, counts.fetched_bytes, counts.resourced_rows, counts.failed_fetches)


def test_what_arrives_is_listed_once_and_not_for_each_row(world, monkeypatch):
    listed, made = LayerPlan.arrivals.fget, []
    monkeypatch.setattr(LayerPlan, "arrivals", property(lambda plan: made.append(plan) or listed(plan)))
    counts = []
    for slots in ((0,), (0, 1, 0)):
        given = plan([(0, slots, (0,) * len(slots))], writes=())
        arrivals = started(world, given)
        fetch = world.session.posted[-1]
        world.fill_rows(fetch, *(0,) * len(slots))
        made.clear()
        arrivals.filled(fetch)
        arrivals.write()
        assert (set(), "") == (arrivals.missing, arrivals.failed)
        counts.append(len(made))
        arrivals.release()
    assert [0, 0] == counts


def test_copies_within_the_rank_go_by_way_of_the_temporary_row(world):
    given = plan([(0, (0,), (0,))], copies=((0, -1), (1, 0), (-1, 1)), writes=((0, 2),), spare=1)
    arrivals = started(world, given)
    assert arrivals.temporary not in arrivals.rows.values()
    world.fill_rows(world.session.posted[0], 0)
    arrivals.filled(world.session.posted[0])
    arrivals.write()
    assert [7, 6, 0] == world.live()


def test_a_pool_that_is_too_small_is_refused_and_keeps_what_it_has():
    world = World(rows=2)
    with pytest.raises(StagingFull):
        Arrivals(plan(), world.supply())
    assert 2 == world.staging.free


# -- from elsewhere


def test_a_failed_fetch_is_taken_from_another_replica_then_a_copy_then_given_up(world):
    copies = Copies(world, {4})
    arrivals = started(world, source=copies)
    first, second = world.session.posted
    arrivals.fetch_failed(first, "rank 0 is gone", True)
    assert [(1, [0, 2], [arrivals.rows[0], arrivals.rows[1]])] == world.session.asked()[2:], "one fetch for each peer"
    arrivals.fetch_failed(second, "rank 2 is gone", True)
    ended(arrivals)
    assert ([4], {0, 1}, "") == (copies.loaded, arrivals.missing, arrivals.failed)
    arrivals.fetch_failed(world.session.posted[2], "rank 1 is gone", True)
    assert "expert 0 cannot be had: rank 1 is gone, and there is no other copy" == arrivals.failed
    assert 3 == len(world.session.posted), "nobody is asked twice"
    assert (3, 1) == (world.counts.failed_fetches, world.counts.loaded_rows)


def test_who_is_lost_is_not_asked(world):
    world.lost = {0}
    arrivals = started(world)
    assert [(1, [0, 2]), (2, [0])] == [(peer, slots) for peer, slots, _ in world.session.asked()]
    world.lost = {0, 1}
    arrivals.fetch_failed(world.session.posted[1], "x", True)
    assert "expert 4 cannot be had: x" in arrivals.failed


def test_fetches_of_a_member_that_is_lost_are_those_to_cancel(world):
    arrivals = started(world)
    assert [[world.session.posted[0]], [], [world.session.posted[1]]] == [arrivals.lose(rank) for rank in range(3)]


def test_an_expert_that_the_plan_loads_comes_from_a_copy_in_a_thread_of_its_own(world):
    copies = Copies(world, {8})
    arrivals = started(world, plan([(0, (0,), (0,))], loads=(8,), writes=((0, 0), (1, 1))), copies)
    ended(arrivals)
    assert {0} == arrivals.missing
    assert threading.current_thread() not in copies.threads
    world.fill_rows(world.session.posted[0], 0)
    arrivals.filled(world.session.posted[0])
    arrivals.write()
    assert [0, 8, 6] == world.live()
    assert (1, 0) == (world.counts.loaded_rows, world.counts.resourced_rows)


@pytest.mark.parametrize("source", [None, "nothing"])
def test_an_expert_that_nobody_holds_and_of_which_there_is_no_copy_is_given_up(world, source):
    copies = Copies(world, ()) if source else None
    arrivals = started(world, plan([], loads=(8,), writes=((0, 0),)), copies)
    assert "expert 8 cannot be had: nobody holds it, and there is no other copy" == arrivals.failed


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("the disk is full"), "OSError: the disk is full"),
        (TransferFailed("a.", "The checkpoint is gone.", "c."), "The checkpoint is gone."),
        (KeyError(3), "KeyError: 3"),
    ],
)
def test_a_load_that_fails_gives_the_layer_up_and_says_why(world, error, said):
    arrivals = started(world, plan([], loads=(8,), writes=((0, 0),)), Copies(world, {8}, error))
    ended(arrivals)
    assert f"expert 8 cannot be loaded: {said}" == arrivals.failed
    assert {0} == arrivals.missing


def test_where_both_sides_start_a_move_nobody_else_can_be_asked():
    world = World(initiator="both")
    copies = Copies(world, {0, 1})
    arrivals = started(world, source=copies)
    arrivals.fetch_failed(world.session.posted[0], "x", True)
    ended(arrivals)
    assert ([0, 1], 2) == (copies.loaded, len(world.session.posted))
    assert {2} == arrivals.missing


# -- what is not what it should be


def test_a_row_that_differs_is_asked_for_elsewhere_and_the_others_count(world):
    arrivals = started(world)
    first = world.session.posted[0]
    world.fill_rows(first, 0, 77)
    arrivals.filled(first)
    assert {1, 2} == arrivals.missing
    assert (1, [2], [arrivals.rows[1]]) == world.session.asked()[-1]
    assert (1, 2) == (world.counts.mismatched_rows, world.counts.fetched_rows)
    world.fill_rows(world.session.posted[-1], 88)
    arrivals.filled(world.session.posted[-1])
    assert "expert 1 cannot be had: what rank 1 has is not what was loaded" in arrivals.failed


def test_a_copy_that_differs_is_given_up(world):
    arrivals = started(world, plan([], loads=(8,), writes=((0, 0),)), Copies(world, {8}, wrong={8}))
    ended(arrivals)
    assert "the copy of expert 8 is not what was loaded" == arrivals.failed
    assert (1, 0) == (world.counts.mismatched_rows, world.counts.loaded_rows)


@pytest.mark.parametrize("unknown", ["all", "one"])
def test_what_nobody_knows_the_digest_of_is_taken_as_it_is(unknown):
    world = World(verify=unknown == "one")
    if unknown == "one":
        world.digests[0, 1] = 0
    arrivals = started(world)
    world.fill_rows(world.session.posted[0], 0, 77)
    arrivals.filled(world.session.posted[0])
    assert {2} == arrivals.missing


# -- rows that a fabric has not let go of


def test_rows_in_quarantine_are_replaced(world):
    arrivals = started(world)
    first, before = world.session.posted[0], dict(arrivals.rows)
    arrivals.fetch_failed(first, "too late", False)
    assert 2 == world.staging.quarantined
    assert {before[0], before[1]}.isdisjoint({arrivals.rows[0], arrivals.rows[1]})
    assert (1, [0, 2], [arrivals.rows[0], arrivals.rows[1]]) == world.session.asked()[-1]
    world.fill_rows(first, 99, 99)  # it writes after all
    for fetch, experts in zip(world.session.posted[1:], [(4,), (0, 1)], strict=True):
        world.fill_rows(fetch, *experts)
        arrivals.filled(fetch)
    arrivals.write()
    assert [0, 1, 4] == world.live()
    assert [] == arrivals.release()
    assert (4, 2) == (world.staging.free, world.staging.quarantined)
    world.staging.drained(first.rows)
    assert (6, 0) == (world.staging.free, world.staging.quarantined)


def test_without_other_rows_the_layer_is_given_up():
    world = World(rows=4)
    arrivals = started(world)
    arrivals.fetch_failed(world.session.posted[0], "too late", False)
    assert "rows are in quarantine, and there are no others: 1 of 4 are free, and 2 in quarantine." == arrivals.failed
    assert 2 == len(world.session.posted)


def test_rows_of_a_layer_that_is_given_up_already_stay_in_quarantine():
    """Both fetches fail in one poll, and the first of them ends the layer: the fabric still has the second's rows."""
    world = World(rows=4)
    arrivals = started(world)
    for fetch in list(world.session.posted):
        arrivals.fetch_failed(fetch, "too late", False)
    arrivals.release()
    assert (1, 3) == (world.staging.free, world.staging.quarantined)


# -- the end


def test_a_layer_that_is_decided_early_holds_back_the_rows_of_what_is_under_way(world):
    arrivals = started(world)
    first, second = world.session.posted
    world.fill_rows(first, 0, 1)
    arrivals.filled(first)
    assert [second] == arrivals.release()
    assert (5, 1) == (world.staging.free, world.staging.quarantined)
    arrivals.fetch_failed(second, "the layer is decided", True)
    assert 2 == len(world.session.posted), "nothing is asked for any more"
    world.staging.drained(second.rows)
    assert 6 == world.staging.free


def test_a_row_that_a_load_may_write_to_comes_back_when_the_load_has_ended(world):
    copies = Copies(world, {8, 2})
    copies.go.clear()
    arrivals = started(world, plan([], loads=(8, 2), writes=((0, 0), (1, 1))), copies)
    deadline = time.monotonic() + 10
    while not any(future.running() for future in arrivals._loads) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert [] == arrivals.release()
    assert (5, 1) == (world.staging.free, world.staging.quarantined), "the second had not begun, and never does"
    copies.go.set()
    world.loader.shutdown(wait=True)
    assert (6, 0, [8]) == (world.staging.free, world.staging.quarantined, copies.loaded)


def test_a_fetch_that_is_told_of_twice_or_was_never_posted_changes_nothing(world):
    arrivals = started(world)
    first = world.session.posted[0]
    world.fill_rows(first, 0, 1)
    arrivals.filled(first)
    arrivals.filled(first)
    arrivals.filled(Fetch(0, 1, array("q"), array("q")))
    assert ({2}, "") == (arrivals.missing, arrivals.failed)
