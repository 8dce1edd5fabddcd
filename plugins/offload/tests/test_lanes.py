"""Threads of a tier: calls that hang cost so many of them and no more, and nothing is stuck when they return."""

from __future__ import annotations

import threading

import pytest

from tensorway_offload.lanes import Call, Lanes
from tensorway_offload.testing.rows import PATIENCE, Clock, until


class Hanging:
    """Calls that return when the test says so."""

    def __init__(self, most=2, spare=1):
        self.clock, self.told = Clock(), []
        self.lanes = Lanes("test", most, spare, self.clock)
        self.go, self.begun = threading.Event(), []

    def call(self, seconds=5.0, hang=True):
        def work(left):
            self.begun.append(left)
            if hang:
                self.go.wait(PATIENCE)
            return left

        return Call(work, self.clock.now + seconds, lambda call: None)

    def submit(self, count, **given):
        calls = [self.call(**given) for _ in range(count)]
        return calls, [self.lanes.submit(call) for call in calls]

    def poll(self):
        self.told += self.lanes.poll(self.clock.now)

    @property
    def threads(self):
        return sum(thread.name == "tensorway-tier-test" for thread in threading.enumerate())


@pytest.fixture
def hanging():
    found = Hanging()
    yield found
    found.go.set()
    found.lanes.close()
    assert found.lanes.join(found.clock.now + PATIENCE)
    until(lambda: not found.threads)


def test_calls_wait_for_a_thread_and_are_told_when_they_are_over(hanging):
    calls, taken = hanging.submit(5)
    assert [True] * 5 == taken
    until(lambda: len(hanging.begun) == 2)
    assert 2 == hanging.threads
    hanging.go.set()
    until(lambda: len(hanging.told) == 5, hanging.poll)
    assert all(call.over and not call.late and call.value == pytest.approx(4.5) for call in calls)
    assert not hanging.lanes.busy()


def test_a_call_knows_how_much_of_its_time_is_left(hanging):
    first, _ = hanging.submit(2)
    until(lambda: len(hanging.begun) == 2)
    hanging.submit(1, seconds=20.0)
    hanging.clock.now += 10
    hanging.poll()
    assert set(first) == {call for call in hanging.told if call.late}
    until(lambda: len(hanging.begun) == 3)
    assert pytest.approx(9.0) == hanging.begun[-1]


def test_threads_that_hang_are_replaced_so_often_and_then_nothing_is_taken(hanging):
    for round_number in range(6):
        hanging.submit(2)
        until(lambda n=round_number: len(hanging.begun) >= min(2 + n, 3))
        hanging.clock.now += 6
        hanging.poll()
    assert hanging.lanes.blocked and 3 == hanging.lanes.stuck
    assert 3 == hanging.threads
    assert not hanging.lanes.submit(hanging.call())
    # What waited in vain was told that it never began, and what hangs that it is late.
    assert {"running", "dropped"} == {call.state for call in hanging.told}
    hanging.go.set()
    until(lambda: not hanging.lanes.stuck, hanging.poll)
    until(lambda: hanging.threads == 2)
    calls, taken = hanging.submit(4, hang=False)
    assert [True] * 4 == taken
    until(lambda: all(call.over for call in calls), hanging.poll)
    assert not any(call.late for call in calls)


def test_a_late_call_is_told_twice_and_any_other_once(hanging):
    calls, _ = hanging.submit(1)
    until(lambda: hanging.begun)
    for _ in range(3):
        hanging.poll()
    assert [] == hanging.told
    hanging.clock.now += 6
    for _ in range(3):
        hanging.poll()
    assert calls == hanging.told and not calls[0].over
    hanging.go.set()
    until(lambda: len(hanging.told) == 2, hanging.poll)
    assert calls * 2 == hanging.told and calls[0].over


def test_closed_lanes_take_nothing_and_drop_what_waits(hanging):
    calls, _ = hanging.submit(4)
    until(lambda: len(hanging.begun) == 2)
    hanging.lanes.close()
    assert not hanging.lanes.submit(hanging.call())
    hanging.poll()
    assert calls[2:] == hanging.told and all(call.state == "dropped" for call in hanging.told)
    assert not hanging.lanes.join(hanging.clock.now)
