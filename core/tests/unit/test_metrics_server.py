"""`GET /metrics` of a process: who asks is a stranger, and sources may fail."""

from __future__ import annotations

import contextlib
import gc
import http.client
import socket
import threading
import time

import pytest

from tensorway import metrics_server
from tensorway.errors import AddressInvalid, DeadlineExceeded
from tensorway.metrics import Counters, Metric, vocabulary
from tensorway.metrics_server import MAX_HEAD, MOST, Latest, MetricsServer
from tensorway.testing.possessions import open_files
from tensorway.testing.waiting import eventually

WORDS = vocabulary(Metric("jobs_total", "counter", ("peer",), "Jobs."))


@pytest.fixture
def server():
    with MetricsServer(WORDS) as made:
        yield made


def counted(jobs):
    counts = Counters(WORDS)
    counts.add("jobs_total", jobs, peer="p")
    return counts.samples


def ask(server, method="GET", path="/metrics"):
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), dict(answer.getheaders())
    finally:
        connection.close()


def say(server, data, *, end=False):
    """Raw bytes, and all that comes back."""
    with socket.create_connection(server.address, timeout=60) as connection:
        connection.sendall(data)
        if end:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while chunk := connection.recv(65536):
                answer += chunk
        except ConnectionResetError:  # what it did not read
            pass
        return answer


def test_all_sources_are_one_page(server):
    server.add("a", counted(1))
    server.add("b", counted(2))
    server.add("b", counted(3))
    status, text, headers = ask(server)
    assert (200, "text/plain; version=0.0.4; charset=utf-8") == (status, headers["Content-Type"])
    assert 'tensorway_jobs_total{peer="p"} 4.0\n' in text
    assert 'tensorway_source_up{source="a"} 1.0\n' in text
    server.remove("b")
    assert 'tensorway_jobs_total{peer="p"} 1.0\n' in ask(server, path="/metrics?a=b")[1]


def test_it_listens_on_this_host_only_unless_it_is_told_otherwise(server):
    host, port = server.address
    assert "127.0.0.1" == host and port > 0


def test_a_source_that_raises_costs_its_own_values_only(server, caplog):
    def broken():
        raise ValueError("it is broken")

    server.add("broken", broken)
    server.add("good", counted(2))
    for _ in range(2):
        status, text, _ = ask(server)
        assert 200 == status
        assert 'tensorway_jobs_total{peer="p"} 2.0\n' in text
        assert 'tensorway_source_up{source="broken"} 0.0\n' in text
    assert 1 == sum("it is broken" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/metrics/../etc", 404), ("POST", "/metrics", 405), ("HEAD", "/metrics", 405)],
)
def test_nothing_else_is_there(server, method, path, status):
    assert status == ask(server, method, path)[0]


@pytest.mark.parametrize(
    "data",
    [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET /metrics HTTP/9.9\r\n\r\n", b"\r\n\r\n", b"x" * 200 + b"\r\n\r\n"],
)
def test_what_is_no_request_is_answered_or_hung_up_on(server, data):
    answer = say(server, data)
    assert not answer or b"200 OK" not in answer
    assert 200 == ask(server)[0]


def test_a_request_is_small(server):
    assert b" 431 " in say(server, b"GET /metrics HTTP/1.1\r\nX: " + b"x" * (MAX_HEAD + 1), end=True)
    assert 200 == ask(server)[0]


def test_what_follows_a_request_is_no_second_one(server):
    assert 1 == say(server, b"GET /metrics HTTP/1.1\r\n\r\n" * 3).count(b"200 OK")


def test_who_trickles_is_hung_up_on_and_nobody_else_waits(server, monkeypatch):
    monkeypatch.setattr(metrics_server, "PATIENCE", 0.5)
    slow = [socket.create_connection(server.address, timeout=60) for _ in range(MOST - 1)]
    try:
        for _ in range(3):
            for one in slow:
                with contextlib.suppress(ConnectionError):  # it was hung up on already
                    one.sendall(b"G")
            eventually(lambda: server._server._slots._value)  # what the answer before took is free again
            assert 200 == ask(server)[0]
            time.sleep(0.1)
        assert [b""] * len(slow) == [hung_up(one) for one in slow]
    finally:
        for one in slow:
            one.close()


def hung_up(connection):
    try:
        return connection.recv(1)
    except ConnectionResetError:
        return b""


def test_only_so_many_are_answered_at_once(server):
    release, entered = threading.Event(), threading.Semaphore(0)

    def slow():
        entered.release()
        release.wait(60)
        return ()

    server.add("slow", slow)
    waiting = [socket.create_connection(server.address, timeout=60) for _ in range(MOST)]
    try:
        for one in waiting:
            one.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert all(entered.acquire(timeout=60) for _ in waiting)
        assert b"" == say(server, b"")
        release.set()
        assert all(one.recv(65536).startswith(b"HTTP/1.0 200") for one in waiting)
    finally:
        release.set()
        for one in waiting:
            one.close()
    server.remove("slow")
    assert 200 == ask(server)[0]


def test_what_one_thread_alone_may_ask_is_put_there(server):
    latest = Latest()
    server.add("planner", latest)
    assert "jobs_total" not in ask(server)[1]
    latest.put(counted(5)())
    assert 'tensorway_jobs_total{peer="p"} 5.0\n' in ask(server)[1]


def test_closed_twice_also_while_a_source_hangs():
    release, entered = threading.Event(), threading.Event()

    def slow():
        entered.set()
        release.wait(60)
        return ()

    server = MetricsServer(WORDS)
    address = server.address
    server.add("slow", slow)
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert entered.wait(60)
        server.close()
        server.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=60)
        release.set()


def test_a_thread_that_does_not_end_is_said(server, monkeypatch):
    release = threading.Event()
    stuck = threading.Thread(target=release.wait, args=(60,))
    stuck.start()
    try:
        monkeypatch.setattr(server, "_thread", stuck)
        with pytest.raises(DeadlineExceeded):
            server.close(0.01)
    finally:
        release.set()
        stuck.join(60)


def test_an_address_that_cannot_be_had_is_refused(server):
    with pytest.raises(AddressInvalid, match="in use"):
        MetricsServer(WORDS, port=server.address[1])
    with pytest.raises(AddressInvalid):
        MetricsServer(WORDS, host="192.0.2.1")


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("127.0.0.1", -1), ("a" * 70, 0)])
def test_what_is_no_port_or_name_at_all_is_refused_like_any_other(host, port):
    with pytest.raises(AddressInvalid, match="It cannot be"):
        MetricsServer(WORDS, host, port)


def test_threads_that_cannot_begin_cost_no_later_request(server, monkeypatch):
    def refused(thread):
        if "process_request" in thread.name:
            raise RuntimeError("can't start new thread")
        started(thread)

    started = threading.Thread.start
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        assert [b""] * MOST == [say(server, b"GET /metrics HTTP/1.0\r\n\r\n") for _ in range(MOST)]
    assert 200 == ask(server)[0]


def test_nothing_is_left_of_servers():
    def used():
        gc.collect()
        return threading.active_count(), open_files().total()

    counts = []
    for _ in range(4):
        with MetricsServer(WORDS) as server:
            assert 200 == ask(server)[0]
        until = time.monotonic() + 30
        while counts and used() > counts[0] and time.monotonic() < until:
            time.sleep(0.01)
        counts.append(used())
    assert counts[-1][0] <= counts[0][0] and counts[-1][1] <= counts[0][1], counts
