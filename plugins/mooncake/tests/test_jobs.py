"""How a transfer becomes operations; with a stand-in for the engine, and no Mooncake."""

from __future__ import annotations

import socket
import threading
from array import array
from collections import deque

import pytest

from tensorway.errors import PeerLost, TransferFailed
from tensorway.testing.servers import free_port
from tensorway.transport import BlockTable
from tensorway_mooncake.engine import DONE, FAILED, PENDING
from tensorway_mooncake.jobs import WINDOW, Job, Jobs, Remote, pieces
from tensorway_mooncake.library import patience


class Engine:
    """Operations end when a test says so."""

    def __init__(self):
        self.live, self.ended, self.most, self.refuse, self.poisoned = {}, {}, 0, False, ""

    def submit(self, operation, segment, *piece):
        if self.refuse:
            return 0
        handle = len(self.live) + len(self.ended) + 1
        self.live[handle] = PENDING
        self.most = max(self.most, len(self.live))
        return handle

    def check(self, handle):
        status = self.live[handle]
        if status in (DONE, FAILED):
            self.ended[handle] = self.live.pop(handle)
        return status

    def end(self, status=DONE, count=1 << 20):
        for handle in list(self.live)[:count]:
            self.live[handle] = status

    def poison(self, reason):
        self.poisoned = reason


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def remote(listener):
    return Remote("engine-1", "abc", "127.0.0.1", listener, 1, b"")


def job(remote, count):
    return Job(remote, "read", "Asked.", deque((1 + i, 1 + i, 1) for i in range(count)))


def ids(*numbers):
    return array("q", numbers)


def test_neighbors_here_that_are_neighbors_there_are_one_piece():
    local, far = BlockTable((1000, 5000), 10, 10, 100), BlockTable((2000, 9000), 10, 10, 100)
    assert [(1000, 2020, 30), (1050, 2050, 10), (5000, 9020, 30), (5050, 9050, 10)] == list(
        pieces(local, far, ids(0, 1, 2, 5), ids(2, 3, 4, 5))
    )
    # Neighbors on one side only.
    assert 6 == len(list(pieces(local, far, ids(0, 1, 2), ids(4, 3, 2))))


def test_blocks_that_do_not_touch_are_not_joined():
    local, far = BlockTable((1000,), 10, 10, 100), BlockTable((2000,), 10, 16, 100)
    assert [(1000, 2000, 10), (1010, 2016, 10)] == list(pieces(local, far, ids(0, 1), ids(0, 1)))


def test_no_blocks_are_no_job(engine, remote):
    assert Jobs(engine, 60.0).start(job(remote, 0)) is None


def test_two_jobs_together_stay_within_the_peer_s_window(engine, remote):
    moving, both = Jobs(engine, 60.0), [job(remote, 2 * WINDOW), job(remote, 2 * WINDOW)]
    for one in both:
        moving.start(one)
    while [one for one in both if not moving.done(one)]:
        engine.end(count=100)
    assert WINDOW == engine.most
    assert (0, 4 * WINDOW) == (remote.active, len(engine.ended))


def test_a_part_that_fails_fails_the_job_and_nothing_more_is_handed_over(engine, remote):
    moving, one = Jobs(engine, 60.0), job(remote, 2 * WINDOW)
    moving.start(one)
    engine.end(FAILED, 1)
    with pytest.raises(TransferFailed, match="refuses no connection"):
        moving.done(one)
    assert not moving.settled(one), "the others may still write"
    engine.end()
    assert moving.settled(one)
    assert (0, WINDOW) == (remote.active, len(engine.ended))


def test_a_failure_is_a_lost_peer_when_nobody_listens_any_more(engine):
    remote = Remote("engine-1", "abc", "127.0.0.1", free_port(), 1, b"")
    moving, one = Jobs(engine, 60.0), job(remote, 3)
    moving.start(one)
    engine.end(FAILED)
    with pytest.raises(PeerLost, match="Connection refused"):
        moving.done(one)
    assert moving.settled(one)
    assert remote.lost


def test_a_failure_is_a_lost_peer_when_it_is_being_killed(engine, monkeypatch):
    monkeypatch.setattr("tensorway_mooncake.jobs._KNOCK", 10.0)
    server = socket.create_server(("127.0.0.1", 0))
    moving, one = Jobs(engine, 60.0), job(Remote("engine-1", "abc", *server.getsockname(), 1, b""), 3)
    moving.start(one)
    engine.end(FAILED)
    # The end of a process closes its sockets one after the other: what failed is seen before nobody listens any more.
    dying = threading.Timer(0.1, server.close)
    dying.start()
    with pytest.raises(PeerLost, match="Connection refused"):
        moving.done(one)
    dying.join()


def test_an_operation_that_mooncake_does_not_take_leaves_its_place(engine, remote):
    engine.refuse = True
    with pytest.raises(TransferFailed):
        Jobs(engine, 60.0).start(job(remote, 3))
    assert 0 == remote.active


def test_a_job_that_is_given_up_hands_over_no_more_and_is_settled_when_all_is_over(engine, remote):
    moving, one = Jobs(engine, 60.0), job(remote, 2 * WINDOW)
    moving.start(one)
    assert not moving.settled(one)
    engine.end()
    assert moving.settled(one)
    assert WINDOW == len(engine.ended)


@pytest.mark.parametrize(("set_to", "seconds"), [(None, 120), ("5", 20), ("600", 2400), ("", 120), ("-1", 120)])
def test_an_operation_has_four_times_what_mooncake_gives_it(monkeypatch, set_to, seconds):
    name = "MC_TCP_PROGRESS_TIMEOUT_SEC"
    monkeypatch.delenv(name, raising=False) if set_to is None else monkeypatch.setenv(name, set_to)
    assert seconds == patience()


def test_an_operation_that_never_ends_poisons_the_engine(engine, remote):
    moving, one = Jobs(engine, 60.0), job(remote, 1)
    moving.start(one)
    assert not moving.settled(one)
    assert "" == engine.poisoned
    moving._patience = -1.0
    assert not moving.settled(one)
    assert "engine-1 is not over" in engine.poisoned


def test_an_answer_that_is_none_fails_the_job_and_keeps_its_memory(engine, remote):
    moving, one = Jobs(engine, 60.0), job(remote, 1)
    moving.start(one)
    engine.end(-2)
    with pytest.raises(TransferFailed):
        moving.done(one)
    assert not moving.settled(one)
    assert 1 == remote.active
