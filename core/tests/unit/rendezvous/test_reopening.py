"""Watches that begin anew, over connections of our own making; the ends of ranges that stores are asked for."""

from __future__ import annotations

import threading
import time

import pytest

from tensorway.errors import DeadlineExceeded
from tensorway.rendezvous.contract import Event, end_of
from tensorway.rendezvous.reopening import Reopening


class Connection:
    """Events that arrive one by one; it is cut when there are no more, unless it is told to stay silent."""

    def __init__(self, *events, silent=False):
        self.events = list(events)
        self.silent = silent
        self.woken = threading.Event()
        self.closed = False


class Changes(Reopening):
    """Connects to each of `connections` in turn; None stands for a server that is away."""

    def __init__(self, *connections):
        self.forgotten = []
        super().__init__("/p/", self.forgotten.append)
        self.connections = list(connections)
        self.asked = []

    def _open(self, seconds):
        self.asked.append(seconds)
        connection = self.connections.pop(0) if self.connections else None
        if connection is None:
            raise DeadlineExceeded("It was to be watched.", "Nobody answered.", "Wait.")
        return connection

    def _told(self, connection, until):
        if connection.events:
            return [connection.events.pop(0)]
        if connection.silent:
            connection.woken.wait(max(0.0, until - time.monotonic()))
        else:
            self._cut()
        return []

    def _shut(self, connection):
        connection.closed = True

    def _wake(self, connection):
        connection.woken.set()


def opened(*connections):
    changes = Changes(*connections)
    changes.begin(5)
    return changes


PUT, RESET = Event("put", "/p/a"), Event("reset", "/p/")


def test_what_is_told_is_passed_on_and_silence_is_bounded():
    changes = opened(Connection(PUT, silent=True))
    assert [PUT] == changes.next(5)
    started = time.monotonic()
    assert [] == changes.next(0.1)
    assert 0.1 <= time.monotonic() - started < 2


def test_a_connection_that_is_cut_is_closed_and_begun_anew_with_a_reset():
    first, second = Connection(), Connection(PUT)
    changes = opened(first, None, second)
    assert [RESET] == changes.next(5)
    assert (True, False) == (first.closed, second.closed)
    assert [PUT] == changes.next(5)


def test_a_server_that_stays_away_costs_the_time_that_was_given():
    changes = opened(Connection())
    started = time.monotonic()
    assert [] == changes.next(0.9)
    assert 0.9 <= time.monotonic() - started < 5
    assert len(changes.asked) > 2 and max(changes.asked[1:]) <= 0.9


def test_an_attempt_takes_a_second_at_most_so_that_it_can_be_closed():
    changes = opened(Connection(), Connection())
    assert [RESET] == changes.next(60)
    assert [5, 1.0] == changes.asked


def test_closing_wakes_who_waits_with_a_reset_and_tells_the_store():
    connection = Connection(silent=True)
    changes = opened(connection)
    told = []
    thread = threading.Thread(target=lambda: told.extend(changes.next(60)))
    thread.start()
    changes.close()
    thread.join(10)
    assert [RESET] == told
    assert connection.closed
    assert [changes] == changes.forgotten
    assert [RESET] == changes.next(60)


def test_a_watch_that_cannot_begin_says_so():
    with pytest.raises(DeadlineExceeded):
        opened(None)


@pytest.mark.parametrize(("prefix", "end"), [("/a/", "/a0"), ("a", "b"), ("/a~", "/a\x7f")])
def test_a_range_of_keys_ends_after_the_last_that_begins_with_the_prefix(prefix, end):
    assert end == end_of(prefix)
    assert prefix <= prefix + "~" * 200 < end
