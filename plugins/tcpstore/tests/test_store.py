"""The suite against a real TCPStore, and what is particular to it: restarts, pauses, foreign records, its limits."""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import tensorway
from tensorway.errors import AddressInvalid, DeadlineExceeded, RecordRefused, Unauthenticated, Unsupported
from tensorway.testing import RendezvousSuite, ServedRendezvousSuite
from tensorway_tcpstore import store as store_module

SECRET = "a secret of the tests"


def enter(address="", **options):
    return tensorway.create("rendezvous", "tcpstore", {"address": address, "secret": SECRET} | options)


class TestTcpStore(ServedRendezvousSuite):
    name = "tcpstore"
    large = 7 << 20

    def entrance(self, server):
        return {"address": server.address, "secret": SECRET}

    @pytest.fixture
    def options(self, shared):
        return self.entrance(shared)

    @pytest.fixture
    def server(self, launch):
        return launch()


class TestServedHere(RendezvousSuite):
    """The same, with the store in this process."""

    name = "tcpstore"

    @pytest.fixture
    def options(self, torch_version):
        with enter() as server:
            yield {"address": server.address, "secret": SECRET}


@pytest.fixture
def raw(shared):
    import torch.distributed as dist

    return dist.TCPStore("127.0.0.1", shared.port, wait_for_workers=False)


def test_without_a_secret_nobody_enters(torch_version, monkeypatch):
    monkeypatch.delenv("TENSORWAY_SECRET", raising=False)
    with pytest.raises(Unauthenticated, match="No secret was given"):
        tensorway.create("rendezvous", "tcpstore")


def test_a_record_that_nobody_of_ours_wrote_is_passed_over(shared, raw):
    with enter(shared.address) as client, enter(shared.address, secret="another secret altogether") as stranger:
        client.put("/foreign/ours", b"x")
        stranger.put("/foreign/theirs", b"x")
        raw.set("/foreign/torch", "x" * 100)
        raw.set("tensorway:/foreign/short", "x")
        raw.set("tensorway:/foreign/long", "x" * 100)
        raw.set("tensorway:/foreign/" + "k" * 300, "x" * 100)

        assert ["/foreign/ours"] == [record.key for record in client.list("/foreign/")]
        assert client.get("/foreign/theirs") is client.get("/foreign/short") is client.get("/foreign/long") is None
        assert client.put("/foreign/short", b"ours now") == 1
        assert b"ours now" == client.get("/foreign/short").value


def test_revisions_go_on_after_a_record_was_deleted(shared):
    with enter(shared.address) as client:
        first = client.put("/again", b"x")
        assert client.delete("/again", expected=first) is True
        assert [] == client.list("/again")
        with pytest.raises(RecordRefused):
            client.put("/again", b"y", expected=first)
        assert client.put("/again", b"y", expected=0) > first


def test_no_change_is_lost_among_many_that_compare(shared):
    """Each adds one to a number that all share, until it has done so twenty times."""

    def add(client):
        for _ in range(20):
            while True:
                record = client.get("/sum")
                try:
                    client.put("/sum", str(int(record.value) + 1).encode(), expected=record.revision)
                except RecordRefused:
                    continue
                break

    clients = [enter(shared.address) for _ in range(4)]
    clients[0].put("/sum", b"0")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(add, clients))
    assert b"80" == clients[0].get("/sum").value
    for client in clients:
        client.close()


def test_a_key_that_somebody_else_removes_can_be_put_again(shared, raw):
    with enter(shared.address) as client:
        client.put("/removed", b"x")
        raw.delete_key("tensorway:/removed")
        assert client.get("/removed") is None
        client.put("/removed", b"y")
        assert b"y" == client.get("/removed").value


def test_a_key_that_vanishes_between_reading_and_writing_is_put_as_a_new_one():
    """`compare_set` says of such a key what was expected, which looks as if somebody had put just that."""

    class Vanishing:
        values = {}

        def check(self, names):
            return True

        def get(self, name):
            return store_module._HEAD.pack(7, b"somebody", True) + b"old"

        def compare_set(self, name, expected, desired):
            if not expected:
                self.values[name] = desired
            return self.values.get(name, expected)

    assert 1 == store_module._change(Vanishing(), "/a", b"new", None, None)
    assert Vanishing.values["tensorway:/a"].endswith(b"new")
    Vanishing.values.clear()
    with pytest.raises(RecordRefused):
        store_module._change(Vanishing(), "/a", b"new", 7, None)


def test_a_value_that_a_tcpstore_does_not_take_is_refused_before_it_travels(shared):
    with enter(shared.address) as client:
        client.put("/large", bytes((8 << 20) - 8192))
        with pytest.raises(RecordRefused, match="8,388,608"):
            client.put("/large", bytes(8 << 20))
        assert (8 << 20) - 8192 == len(client.get("/large").value)


def test_what_it_cannot_do_is_unsupported_whoever_asks(shared):
    with enter(shared.address) as client:
        for call in (
            lambda: client._store.grant(5, 1),
            lambda: client._store.keep("a", 1),
            lambda: client._store.revoke("a", 1),
            lambda: client._store.changes("/a", 1),
            lambda: client._store.put("/a", b"x", "a", None, 1),
        ):
            with pytest.raises(Unsupported):
                call()


def test_a_call_connects_anew_when_the_store_was_restarted(launch):
    server = launch()
    with enter(server.address) as client:
        revision = client.put("/a", b"1")
        server.kill()
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.put("/a", b"2", expected=revision, deadline=1)
        with pytest.raises(DeadlineExceeded):
            client.get("/a", 0.5)
        assert time.monotonic() - started < 10
        restart = threading.Thread(target=server.start)
        restart.start()
        assert client.get("/a", 60) is None  # it keeps nothing
        assert client.put("/a", b"3", deadline=30) == 1
        restart.join()


def test_a_deadline_is_kept_while_the_store_is_stopped(launch):
    server = launch()
    with enter(server.address) as client, enter(server.address) as other:
        revision = client.put("/a", b"1")
        server.pause()
        started = time.monotonic()
        fresh = enter(server.address, connect_s=0.2)
        assert time.monotonic() - started < 10
        calls = [
            lambda: client.get("/a", 0.5),
            lambda: client.put("/a", b"2", deadline=0.5),
            lambda: client.put("/a", b"2", expected=revision, deadline=0.5),
            lambda: client.list("/a", 0.5),
            lambda: client.wait("/c", 0.5),
            lambda: other.delete("/a", deadline=0.5),
            lambda: fresh.get("/a", 0.5),
        ]
        before = threading.active_count()
        for call in calls:
            started = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                call()
            assert time.monotonic() - started < 10
        assert threading.active_count() <= before + 2, "a thread for each call that came too late"
        server.resume()
        assert client.list("/", 20) is not None
        assert fresh.get("/", 20) is None
        fresh.close()


def test_a_store_of_this_process_listens_where_it_is_told_to(torch_version):
    with enter() as server:
        assert server.address.startswith("127.0.0.1:")
        port = int(server.address.rpartition(":")[2])
        table = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        listening = [row[1] for row in map(str.split, table.splitlines()) if row[3] == "0A"]
        assert ["0100007F"] == [at.split(":")[0] for at in listening if int(at.split(":")[1], 16) == port]
        with pytest.raises(AddressInvalid, match="It cannot"):
            enter(port=port)


def test_a_process_whose_store_does_not_answer_can_end(launch):
    server = launch()
    code = """
import json, sys
import tensorway
from tensorway.errors import DeadlineExceeded
client = tensorway.create("rendezvous", "tcpstore", json.loads(sys.argv[1]))
client.put("/a", b"x", deadline=60)
print("ready", flush=True)
sys.stdin.readline()
try:
    client.get("/a", 0.5)
except DeadlineExceeded:
    client.close()
"""
    options = json.dumps({"address": server.address, "secret": SECRET})
    command = [sys.executable, "-c", code, options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        server.pause()
        process.stdin.write("\n")
        process.stdin.flush()
        try:
            assert 0 == process.wait(20)
        finally:
            process.kill()
            server.resume()
