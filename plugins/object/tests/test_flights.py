"""Many requests of one call, without a store."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from tensorway.errors import Closed
from tensorway_object.flights import Flights

LONG = 60.0


@pytest.fixture
def flights():
    made = Flights(4)
    yield made
    made.close(LONG)


def until(seconds):
    return time.monotonic() + seconds


def test_all_is_done_with_so_many_at_once(flights):
    now, most, done = 0, 0, []

    async def one(number):
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        await asyncio.sleep(0.001)
        now -= 1
        done.append(number)

    assert "done" == flights.run(one, 50, until(LONG))
    assert list(range(50)) == sorted(done)
    assert 4 == most


def test_calls_share_what_there_is(flights):
    began, over, now, most = threading.Event(), threading.Event(), 0, 0

    async def first(number):
        began.set()
        while not over.is_set():
            await asyncio.sleep(0.001)

    async def second(number):
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        await asyncio.sleep(0.001)
        now -= 1

    thread = threading.Thread(target=flights.run, args=(first, 4, until(LONG)))
    thread.start()
    assert began.wait(LONG)
    assert "done" == flights.run(second, 20, until(LONG))
    shared, most = most, 0
    over.set()
    thread.join(LONG)
    assert "done" == flights.run(second, 20, until(LONG))

    assert (2, 4) == (shared, most)


def test_late_means_that_nothing_runs_any_more(flights):
    ran = []

    async def one(number):
        try:
            await asyncio.sleep(LONG if number else 0)
        finally:
            ran.append(number)

    assert "late" == flights.run(one, 3, until(0.05))
    assert [0, 1, 2] == sorted(ran)
    assert "late" == flights.run(one, 3, until(-1.0))


def test_what_one_raises_is_raised_when_the_others_have_ended(flights):
    done = []

    async def one(number):
        if number == 1:
            raise ZeroDivisionError
        await asyncio.sleep(0.01)
        done.append(number)

    with pytest.raises(ZeroDivisionError):
        flights.run(one, 6, until(LONG))
    assert [0, 2, 3, 4, 5] == sorted(done)
    assert "done" == flights.run(one, 1, until(LONG))


def test_closing_ends_calls_and_admits_no_other(flights):
    ends, started = [], threading.Event()

    async def one(number):
        started.set()
        await asyncio.sleep(LONG)

    thread = threading.Thread(target=lambda: ends.append(flights.run(one, 2, until(LONG))))
    thread.start()
    assert started.wait(LONG)
    assert flights.close(LONG)
    thread.join(LONG)

    assert ["closed"] == ends
    with pytest.raises(Closed):
        flights.run(one, 1, until(LONG))
    assert flights.close(0.0)


def test_nothing_to_do_is_done(flights):
    async def one(number):
        raise AssertionError

    assert "done" == flights.run(one, 0, until(LONG))


def test_a_call_that_was_interrupted_does_not_go_on_in_the_next_one(flights):
    done = []

    async def interrupted(number):
        if number == 3:
            raise KeyboardInterrupt
        await asyncio.sleep(0.01)
        done.append(number)

    async def quiet(number):
        await asyncio.sleep(0.1)

    with pytest.raises(KeyboardInterrupt):
        flights.run(interrupted, 8, until(LONG))
    before = list(done)
    assert "done" == flights.run(quiet, 1, until(LONG))
    assert before == done
