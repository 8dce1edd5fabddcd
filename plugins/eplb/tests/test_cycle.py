"""One member's cycle against members that only say things: who leaves after its part is not lost to the rebalance."""

from __future__ import annotations

import time

import msgspec
import numpy as np
import pytest

from tensorway.eplb import Capabilities, ExpertLayout, PeerFailed, Staging
from tensorway_eplb.agreement import Report, Status
from tensorway_eplb.cycle import Cycle, Terms
from tensorway_eplb.placement import Placement
from tensorway_eplb.plan import TransferPlan
from tensorway_eplb.policy import Topology
from tensorway_eplb.rows import Rows

#: Slots change places within each of two ranks: nothing has to be fetched.
OLD = Placement(np.array([[0, 1, 2, 3]]), 4, 2)
NEW = Placement(np.array([[1, 0, 3, 2]]), 4, 2)
GONE = PeerFailed(1, "it said goodbye")


class Other:
    """Session and control of rank 0, by which rank 1 says what a test wants: turn by turn, events and reports."""

    capabilities = Capabilities(frozenset({"cpu"}), "receiver")

    def __init__(self, plan, turns):
        self.plan, self.turns, self.now = plan, list(turns), ((), ())

    def poll(self, seconds):
        time.sleep(1e-3)
        self.now = self.turns.pop(0) if self.turns else ((), ())
        return list(self.now[0])

    def receive(self):
        statuses = self.now[1]
        return [(1, msgspec.msgpack.encode(Report(0, 1, self.plan.digest, (), bytes([status])))) for status in statuses]

    def send(self, peer, payload, deadline):
        pass

    begin = serve = post = cancel = send


class Later:
    """A commit that is done when it was looked at so often."""

    def __init__(self, write, looks):
        self.write, self.looks = write, looks

    @property
    def done(self):
        self.looks -= 1
        if self.looks == 0:
            self.write()
        return self.looks <= 0

    def withdraw(self):
        return False


class Engine:
    def __init__(self, looks, seconds):
        self.looks, self.seconds = looks, seconds

    def commit(self, layer, experts, write):
        time.sleep(self.seconds)
        return Later(write, self.looks)


def run(turns, looks=1, patience=2.0, commits=0.0):
    weights = np.arange(2, dtype=np.uint8).repeat(64).reshape(2, 64)
    layout = ExpertLayout.of([{"w13": weights}], 4)
    staging = Staging.on_host(layout.kinds, 4)
    plan = TransferPlan.make(OLD, NEW, Topology.flat(2))
    other = Other(plan, turns)
    terms = Terms(other, other, staging, Rows(layout, staging), Engine(looks, commits), 0, 1, 0, patience=patience)
    outcome = Cycle(plan, terms, 5.0).run()
    return outcome, weights[:, 0].tolist()


BEGUN, READY, DONE = (((), (status,)) for status in (Status.WORKING, Status.READY, Status.COMMITTED))


@pytest.mark.parametrize(
    "end",
    [
        [DONE, ((GONE,), ())],
        [((GONE,), (Status.COMMITTED,))],  # its last word and its goodbye at once
    ],
    ids=["after", "at once"],
)
@pytest.mark.parametrize("looks", [1, 20])
def test_who_leaves_after_its_part_has_left_and_is_not_lost(end, looks):
    outcome, rows = run([BEGUN, READY, *end], looks)
    assert ((0,), {}, {}, [1, 0]) == (outcome.committed, outcome.aborted, outcome.lost, rows)
    assert outcome.left in ({1: GONE.why}, {})  # {}: it left when nobody listened any more


def test_what_is_heard_while_the_engine_takes_its_time_is_remembered():
    outcome, _ = run([BEGUN, READY, ((GONE,), (Status.COMMITTED,))], looks=20)
    assert {1: GONE.why} == outcome.left


def test_who_leaves_before_its_part_is_lost():
    outcome, rows = run([BEGUN, ((GONE,), ())])
    assert {1: GONE.why} == outcome.lost and {} == outcome.left
    assert [1, 0] == rows  # this rank loses no expert of its own with it


def test_who_has_ended_may_be_silent():
    outcome, rows = run([BEGUN, ((), (Status.READY, Status.COMMITTED))], looks=300, patience=0.1)
    assert ((0,), {}, [1, 0]) == (outcome.committed, outcome.lost, rows)


def test_who_stood_still_itself_misses_nobody_whose_words_lie_unread():
    outcome, rows = run([BEGUN, READY, DONE], patience=0.2, commits=0.4)
    assert ((0,), {}, [1, 0]) == (outcome.committed, outcome.lost, rows)
