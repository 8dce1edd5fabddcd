"""A rebalance beside serving loops in real processes: every layer changes at the same step on every rank."""

from __future__ import annotations

import random
import signal
import time

import numpy as np
import pytest

from tensorway.errors import DeadlineExceeded
from tensorway.testing.ranks import Ranks
from tensorway_eplb.background import Background, State
from tensorway_eplb.placement import Placement
from tensorway_eplb.testing import campaign, engine
from tensorway_eplb.testing.engine import Model

MODEL = Model(layers=6, experts=8, slots=4)


@pytest.fixture
def world():
    with Ranks(3) as ranks:
        yield ranks


def entered(world, path):
    start = Placement.linear(MODEL.layers, MODEL.experts, 3, MODEL.slots)
    world.enter([0, 1, 2], engine.join, path, 0, MODEL, start)
    return start


class Lockstep:
    """What an engine's all-reduce does in each step: here through the rendezvous."""

    def __init__(self, rank, path):
        self.rank, self.path, self.number = rank, path, 0
        self.group = rank.notes["rebalancer"].group

    def __call__(self, mine):
        store = self.rank.rendezvous()
        self.number += 1
        prefix = f"{self.path}/steps/{self.number}"
        store.put(f"{prefix}/{self.group.name}", str(mine).encode())
        return min(int(store.wait(f"{prefix}/{name}", 10.0).value) for name in self.group.members)


def serve(rank, path, rows, serves=True, cancel_at=None, slow=0.0, deadline=20.0):
    """Serve while a rebalance goes on anywhere; at which step each layer changed, and how it ended."""
    rebalancer, held = rank.notes["rebalancer"], rank.notes["engine"]
    background = Background(rebalancer, held, Lockstep(rank, path))
    changed = []

    def propose(current):
        time.sleep(slow * rebalancer.group.me)
        return Placement(rows, MODEL.experts, 3)

    background.start(propose, deadline)
    everybody, step = Lockstep(rank, f"{path}/over"), 0
    while serves and not everybody(int(background.state not in (State.PLANNING, State.MOVING))):
        if step == cancel_at:
            background.cancel()
        changed += [(layer, step) for layer in background.step()]
        step += 1
    error = ""
    try:
        background.wait(30.0)
    except Exception as failure:
        error = type(failure).__name__
    state = background.state.value
    background.close()
    return (
        changed,
        error,
        state,
        rebalancer.placement.map.tobytes(),
        held.wrong(rebalancer.placement.by_rank[:, rebalancer.group.me]),
    )


def test_every_layer_changes_at_the_same_step_everywhere(world):
    entered(world, "/background/experts")
    rows = campaign.random_rows(random.Random(1), MODEL, 3)
    answers = world.each([0, 1, 2], serve, "/background", rows, True, None, 0.05)
    changed = answers[0][0]
    assert list(range(6)) == [layer for layer, _ in changed]
    for answer in answers:
        assert (changed, "", "idle", rows.tobytes(), []) == answer


@pytest.mark.parametrize("slow", [0.0, 0.3], ids=["moving", "still planning on some"])
def test_a_cancelled_rebalance_stops_between_layers_and_alike_everywhere(world, slow):
    start = entered(world, "/cancelled/experts")
    rows = campaign.random_rows(random.Random(2), MODEL, 3)
    answers = world.each([0, 1, 2], serve, "/cancelled", rows, True, 1, slow)
    layers = [layer for layer, _ in answers[0][0]]
    expected = start.map.copy()
    expected[layers] = rows[layers]
    for answer in answers:
        assert (answers[0][0], "", "idle", expected.tobytes(), []) == answer


def test_a_layer_that_the_engine_does_not_take_over_in_time_is_taken_back(world):
    """The engines make no step: nothing may change behind their backs, and the deadline ends it."""
    start = entered(world, "/stuck/experts")
    rows = campaign.random_rows(random.Random(3), MODEL, 3)
    for answer in world.each([0, 1, 2], serve, "/stuck", rows, False, None, 0.0, 2.0):
        assert ([], "idle", start.map.tobytes(), []) == (answer[0], *answer[2:])


def lose(rank, rows):
    """Serve alone beside a rank that dies; the thread ends with an error, and can be started again."""
    rebalancer, held = rank.notes["rebalancer"], rank.notes["engine"]
    background = Background(rebalancer, held, lambda mine: 0)
    background.start(lambda current: Placement(rows, MODEL.experts, len(rebalancer.group.members)), 5.0)
    error = ""
    try:
        background.wait(30.0)
    except Exception as failure:
        error = type(failure).__name__
    return error, background.state.value


def test_a_lost_rank_ends_the_thread_with_an_error_and_not_the_engine(world):
    entered(world, "/dying/experts")
    world[2].signal(signal.SIGKILL)
    rows = campaign.random_rows(random.Random(4), MODEL, 3)
    assert [("PeerLost", "failed")] * 2 == world.each([0, 1], lose, rows)
    for report in world.each([0, 1], engine.regroup, None, 10.0):
        assert "" == report.error and () == report.wrong


class Stub:
    """A rebalancer that waits, and raises what it is told."""

    def __init__(self, error=None):
        self.placement, self.outcome, self.error = Placement.linear(2, 4, 2, 2), None, error

    def rebalance(self, new, deadline, *, engine, stop):
        if self.error is not None:
            raise self.error
        stop.wait(deadline)


def test_one_at_a_time_and_the_next_after_the_worker_died():
    stub = Stub()
    background = Background(stub, None, lambda mine: mine)
    background.start(lambda current: current, 5.0)
    with pytest.raises(DeadlineExceeded, match="still"):
        background.start(lambda current: current)
    with pytest.raises(DeadlineExceeded):
        background.wait(0.05)
    background.cancel()
    assert background.wait(5.0) is None and State.IDLE is background.state
    stub.error = RuntimeError("the worker died")
    background.start(lambda current: current)
    with pytest.raises(RuntimeError, match="died"):
        background.wait(5.0)
    assert State.FAILED is background.state
    stub.error = None
    background.start(lambda current: None)  # a policy that leaves everything as it is
    assert background.wait(5.0) is None
    assert {"idle_seconds", "planning_seconds", "moving_seconds", "failed_seconds", "waiting_layers"} == set(
        background.statistics()
    )
    assert np.isfinite(list(background.statistics().values())).all()
    background.close()
