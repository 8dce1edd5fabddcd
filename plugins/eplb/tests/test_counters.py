"""What a rebalance counts: why layers kept their old weights, by cause, and the time in which nothing happened."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import attrs
import pytest

from tensorway.metrics import total
from tensorway.testing.ranks import Ranks
from tensorway_eplb.cycle import Cause
from tensorway_eplb.placement import Placement
from tensorway_eplb.testing import campaign, engine
from tensorway_eplb.testing.engine import Model
from tensorway_eplb.testing.groups import swapped

MODEL = Model(layers=3, experts=8, slots=4)
NO_COPIES = attrs.evolve(MODEL, copies=False)


@pytest.fixture
def world():
    with Ranks(2) as ranks:
        yield ranks


def entered(world, path, model=MODEL):
    start = Placement.linear(model.layers, model.experts, 2, model.slots)
    world.enter([0, 1], engine.join, path, 0, model, start)
    return start


def spoil(rank, layer, slot):
    rank.notes["engine"].weights[layer][0][slot, 17] ^= 1


def counted(rank):
    return dict(rank.notes["rebalancer"].statistics())


def causes(counts):
    """The causes that were counted, and that they are all layers that were aborted."""
    found = {cause: counts[f"layers_aborted_{cause.value}"] for cause in Cause}
    assert counts["layers_aborted"] == sum(found.values())
    return {cause: count for cause, count in found.items() if count}


def stopped(rank, rows, deadline):
    """Rebalance with a stop that is set before it begins."""
    stop, held = threading.Event(), rank.notes["rebalancer"]
    stop.set()
    held.rebalance(Placement(rows, MODEL.experts, 2), deadline, stop=stop)


def load_slowly(rank, seconds):
    """From now on a copy takes so long."""
    held = rank.notes["engine"]
    load = held.load

    def slowly(layer, expert, into):
        time.sleep(seconds)
        load(layer, expert, into)

    held.load = slowly


class Never:
    """An engine that will take a layer over later, and does not."""

    def commit(self, layer, experts, write):
        return self

    done = False

    def withdraw(self):
        return True


def never_taken(rank, rows, deadline):
    rank.notes["rebalancer"].rebalance(Placement(rows, MODEL.experts, 2), deadline, engine=Never())


def test_what_was_moved_is_counted_and_what_is_there_already_is_skipped(world):
    start = entered(world, "/moved/experts")
    rows = swapped(start, 1, 6)
    for _ in range(2):
        assert ["", ""] == [report.error for report in world.each([0, 1], engine.rebalance, rows, 10.0)]
    for counts in world.each([0, 1], counted):
        assert {} == causes(counts)
        assert (2, 1, 3) == tuple(counts[name] for name in ("rebalances", "rebalances_skipped", "layers_committed"))
        assert (3, 3 * sum(nbytes for _, nbytes in MODEL.tensors)) == (counts["fetched_rows"], counts["fetched_bytes"])
        phases = [counts[f"{phase}_seconds"] for phase in ("begin", "move", "commit", "end")]
        assert all(seconds >= 0 for seconds in phases) and counts["move_seconds"] > 0
        assert bool(counts["stalls"]) == bool(counts["stalled_seconds"])


def shown(rank):
    return rank.notes["rebalancer"].samples()


def test_what_is_exported_is_what_was_counted(world):
    start = entered(world, "/exported/experts", NO_COPIES)
    world[0].call(spoil, 2, 1)
    world.each([0, 1], engine.rebalance, swapped(start, 1, 6), 10.0)
    for counts, samples in zip(world.each([0, 1], counted), world.each([0, 1], shown), strict=True):
        labels = {dict(sample.labels)["group"] for sample in samples}
        assert {"/exported/experts"} == labels
        assert counts["layers_aborted"] == total(samples, "eplb_layers_aborted_total") == 1
        assert counts["layers_committed"] == total(samples, "eplb_layers_committed_total") == 2
        assert counts["fetched_rows"] == total(samples, "eplb_rows_total", what="fetched")
        assert counts["mismatched_rows"] == total(samples, "eplb_rows_total", what="mismatched")
        assert counts["fetched_bytes"] == total(samples, "eplb_fetched_bytes_total")
        assert counts["move_seconds"] == total(samples, "eplb_seconds_total", phase="move")
        told = {"stalls", "rebalances", "rebalances_skipped", "members_lost", "failed_fetches"}
        assert {name: counts[name] for name in told} == {name: total(samples, f"eplb_{name}_total") for name in told}
        assert (2, 0) == tuple(total(samples, "eplb_members", state=state) for state in ("there", "lost"))
        told_rows = {dict(sample.labels)["what"] for sample in samples if sample.metric == "eplb_rows_total"}
        assert {
            name.removesuffix("_rows") for name in counts if name.endswith("_rows") and "aborted" not in name
        } == told_rows


def test_a_row_that_cannot_be_had_is_its_rank_s_cause_and_for_the_others_elsewhere(world):
    start = entered(world, "/rows/experts", NO_COPIES)
    world[0].call(spoil, 2, 1)
    world.each([0, 1], engine.rebalance, swapped(start, 1, 6), 10.0)
    sender, receiver = world.each([0, 1], counted)
    assert ({Cause.ELSEWHERE: 1}, {Cause.ROWS: 1}) == (causes(sender), causes(receiver))


def test_a_cancelled_rebalance_is_counted_as_that(world):
    start = entered(world, "/cancelled/experts")
    world.each([0, 1], stopped, swapped(start, 1, 6), 10.0)
    for counts in world.each([0, 1], counted):
        assert causes(counts) and causes(counts).keys() <= {Cause.CANCELLED, Cause.ELSEWHERE}
        assert 0 == counts["rebalances_skipped"]
    assert any(Cause.CANCELLED in causes(counts) for counts in world.each([0, 1], counted))


def test_an_engine_that_takes_nothing_over_is_a_cause_and_a_stall(world):
    start = entered(world, "/engine/experts")
    world.each([0, 1], never_taken, swapped(start, 1, 6), 2.5)
    for counts in world.each([0, 1], counted):
        assert Cause.ENGINE in causes(counts)
        assert counts["stalls"] >= 1 and 0 < counts["stalled_seconds"] <= counts["move_seconds"] + 0.1


def test_a_copy_that_comes_late_is_a_stall_and_one_that_does_not_come_is_the_deadline(world):
    start = entered(world, "/late/experts")
    world[0].call(spoil, 2, 1)  # rank 1 has to load expert 1 of layer 2
    world[1].call(load_slowly, 1.7)
    rows = swapped(start, 1, 6)
    assert ["", ""] == [report.error for report in world.each([0, 1], engine.rebalance, rows, 20.0)]
    for counts in world.each([0, 1], counted):
        assert {} == causes(counts)
        assert counts["stalls"] >= 1 and counts["stalled_seconds"] > 1
    entered(world, "/too-late/experts")
    world[0].call(spoil, 2, 1)
    world[1].call(load_slowly, 5.0)
    world[0].start(engine.rebalance, rows, 10.0)  # it waits for the other, whose time is over first
    world[1].start(engine.rebalance, rows, 2.0)
    for process in (0, 1):
        world[process].result()
    assert Cause.DEADLINE in causes(world[1].call(counted))


def test_who_does_not_begin_and_what_is_lost_with_a_member_are_causes(world):
    start = entered(world, "/begin/experts")
    world[1].signal(signal.SIGSTOP)
    try:
        assert "PeerLost" == world[0].call(engine.rebalance, swapped(start, 1, 6), 2.0).error
    finally:
        world[1].signal(signal.SIGCONT)
    assert {Cause.NOT_BEGUN: 3} == causes(world[0].call(counted))


def die_when_it_loads(rank):
    rank.notes["engine"].load = lambda *anything: os.kill(os.getpid(), signal.SIGKILL)


def test_layers_that_would_lose_an_expert_with_a_lost_member_are_counted_as_that(world):
    """Rank 1 dies when it has agreed to nothing yet; the new layers have experts that only it would hold."""
    start = entered(world, "/lost/experts")
    world[0].call(spoil, 2, 1)
    world[1].call(die_when_it_loads)
    for process in (0, 1):
        world[process].start(engine.rebalance, swapped(start, 1, 6), 10.0)
    assert "PeerLost" == world[0].result().error
    found = causes(world[0].call(counted))
    assert {Cause.LOST} == found.keys() and found[Cause.LOST] >= 1


def test_random_rebalances_count_no_cause(world):
    entered(world, "/random/experts")
    rng = random.Random(3)
    for _ in range(5):
        world.each([0, 1], engine.rebalance, campaign.random_rows(rng, MODEL, 2), 10.0)
    for counts in world.each([0, 1], counted):
        assert {} == causes(counts) and counts["rebalances"] == 5
