"""What the clients of one process share: the thread of their sockets, and the threads that keep their leases."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest

import tensorway
from tensorway.errors import DeadlineExceeded, Unauthenticated
from tensorway.rendezvous import leases
from tensorway.rendezvous.leases import Keeper, Lease
from tensorway.testing.rendezvous import collect
from tensorway.testing.waiting import eventually

SECRET = "a secret of the tests"
MANY = 24


@pytest.fixture
def service():
    with tensorway.create("rendezvous", "direct", {"secret": SECRET}) as service:
        yield service


def enter(service, secret=SECRET):
    return tensorway.create("rendezvous", "direct", {"address": service.address, "secret": secret})


def threads(name):
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_many_clients_have_one_thread_for_their_sockets_and_some_for_their_leases(service):
    clients = [enter(service) for _ in range(MANY)]
    try:
        held = [client.lease(5.0) for client in clients]
        granted = [lease._kept for lease in held]
        for number, client in enumerate(clients):
            client.put(f"/many/{number:02}", b"x", lease=held[number])
        assert len(threads("tensorway-rendezvous-clients")) == 1
        assert len(threads("tensorway-leases")) <= leases._MOST_THREADS
        eventually(lambda: all(lease._kept > at for lease, at in zip(held, granted, strict=True)))
        assert [lease.lost for lease in held] == [""] * MANY
        assert len(service.list("/many/")) == MANY
    finally:
        for client in clients:
            client.close()
    assert service.list("/many/") == []
    eventually(lambda: not threads("tensorway-leases"), 10)


def test_a_client_that_is_closed_twice_leaves_once(service):
    first, second = enter(service), enter(service)
    first._store.close()
    first._store.close()
    second.put("/a", b"x")
    service.get("/a")
    assert len(threads("tensorway-rendezvous-clients")) == 1
    for client in (first, second):
        client.close()
    assert service.get("/a").value == b"x"


def test_the_thread_ends_with_the_last_client_and_begins_with_the_next():
    for _ in range(2):
        with tensorway.create("rendezvous", "direct", {"secret": SECRET}) as service, enter(service) as client:
            client.put("/a", b"x")
            assert len(threads("tensorway-rendezvous-clients")) == 1
        assert threads("tensorway-rendezvous-clients") == []


def test_a_client_that_fails_harms_no_other_of_its_process(service):
    with enter(service) as client, enter(service, "another secret of the tests") as stranger:
        with pytest.raises(Unauthenticated, match="the secret differs"):
            stranger.get("/a")
        with pytest.raises(tensorway.errors.AddressInvalid):
            tensorway.create("rendezvous", "direct", {"address": "no address", "secret": SECRET})
        assert client.put("/a", b"x") > 0
    assert service.get("/a").value == b"x"


def test_a_child_that_was_forked_has_clients_of_its_own(service):
    with enter(service) as client, client.watch("/child/") as watch:
        lease = client.lease(3.0)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with enter(service) as mine:
                    mine.put("/child/a", b"x", lease=mine.lease(30.0))
                    code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert ["put", "deleted"] == [event.kind for event in collect(watch, 2)]
        kept = lease._kept
        eventually(lambda: lease._kept > kept)
        assert not lease.lost


def test_a_service_that_is_ending_while_one_connects_is_not_taken_for_one_that_refuses():
    with socket.create_server(("127.0.0.1", 0)) as ending:
        address = f"127.0.0.1:{ending.getsockname()[1]}"
        with tensorway.create("rendezvous", "direct", {"address": address, "secret": SECRET}) as client:
            ending.accept()[0].close()
            second, _ = ending.accept()
            port = ending.getsockname()[1]
            ending.close()  # before the client hears that it was refused again, and connects a third time
            second.close()
            with tensorway.create("rendezvous", "direct", {"port": port, "secret": SECRET}):
                assert client.put("/a", b"x", deadline=30) > 0


class Fake:
    """A store whose answer to `keep` may be late."""

    name = "fake"

    def __init__(self, hangs=False):
        self.kept = []
        self.hangs = hangs

    def keep(self, lease, seconds):
        self.kept.append(lease)
        if self.hangs:
            time.sleep(seconds)
            raise DeadlineExceeded("A lease was to be kept.", "Nobody answered.", "Wait.")
        return True


def test_a_store_that_hangs_holds_up_no_lease_in_another():
    keeper, hanging, well = Keeper(), Fake(hangs=True), Fake()
    ttl, began = 1.5, time.monotonic()
    lost = [Lease(f"lost {number}", ttl, began) for number in range(8)]
    kept = Lease("kept", ttl, began)
    for lease in lost:
        keeper.hold(lease, hanging)
    keeper.hold(kept, well)
    eventually(lambda: any(lease.lost for lease in lost), 30)
    seconds = time.monotonic() - began
    assert not kept.lost
    assert len(well.kept) > seconds / ttl, "it was not kept in time"
    keeper.let_all_go(well, "the test is over")
    assert kept.lost == "the test is over"
    assert not keeper.let_go(kept, "again")
    keeper.let_all_go(hanging, "the test is over")
    eventually(lambda: not keeper._threads)  # else what it logs is logged in the tests that follow
