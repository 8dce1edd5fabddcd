"""The service of `direct` among strangers: who does not know the secret, who talks nonsense, what does not answer."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import zmq

import tensorway
from tensorway.errors import AddressInvalid, DeadlineExceeded, RecordRefused, Unauthenticated
from tensorway.process import resident_bytes
from tensorway.rendezvous import frames
from tensorway.rendezvous.direct import DirectStore
from tensorway.rendezvous.frames import Request
from tensorway.testing.crowd import SECRET as CROWDED
from tensorway.testing.crowd import direct
from tensorway.testing.servers import free_port

SECRET = "a secret of the tests"


@pytest.fixture
def service():
    with tensorway.create("rendezvous", "direct", {"secret": SECRET, "port": free_port()}) as rendezvous:
        rendezvous.put("/kept", b"value")
        yield rendezvous


@pytest.fixture
def sockets():
    """Make sockets of a context that is destroyed in the end."""
    with zmq.Context() as context:
        made = []

        def make():
            made.append(context.socket(zmq.DEALER))
            return made[-1]

        yield make
        for each in made:
            each.close(0)


def enter(address, secret=SECRET):
    return tensorway.create("rendezvous", "direct", {"address": address, "secret": secret})


def dealer(sockets, address, secret=SECRET):
    """A socket that knows the secret, and will say what it likes."""
    made = sockets()
    public, private = zmq.curve_keypair()
    made.curve_serverkey, made.curve_publickey, made.curve_secretkey = frames.service_keys(secret)[0], public, private
    made.connect(f"tcp://{address}")
    return made


def test_a_wrong_secret_gets_nothing_and_is_told_at_once(service):
    with enter(service.address, "another secret of tests") as stranger:
        started = time.monotonic()
        with pytest.raises(Unauthenticated, match="the secret differs"):
            stranger.get("/kept", deadline=10)
        assert time.monotonic() - started < 5
        with pytest.raises(Unauthenticated):
            stranger.put("/kept", b"mine", deadline=10)
    assert service.get("/kept").value == b"value"


def test_a_peer_without_a_secret_learns_nothing(service, sockets):
    plain = sockets()
    plain.connect(f"tcp://{service.address}")
    plain.send(frames.encode(Request(frames.PROTOCOL, 1, "list", key="/")))
    assert plain.poll(500) == 0
    host, port = service.address.split(":")
    with socket.create_connection((host, int(port)), 5) as raw:
        raw.settimeout(7)
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + random.Random(1).randbytes(4096))
        heard = b""
        try:
            while chunk := raw.recv(65536):
                heard += chunk
        except (TimeoutError, ConnectionResetError):
            pass
    assert b"value" not in heard
    assert len(heard) <= 64  # ZeroMQ's greeting, which is the same for everybody
    assert service.get("/kept").value == b"value"


@pytest.mark.parametrize("mechanism", [b"CURVE", b"NULL", b"PLAIN"])
@pytest.mark.parametrize("flags", [0x02, 0x06], ids=["message", "command"])
def test_a_stranger_who_says_that_gigabytes_follow_is_cut_off_and_costs_no_memory(service, mechanism, flags):
    host, port = service.address.split(":")
    before = resident_bytes()
    with socket.create_connection((host, int(port)), 5) as raw:
        # ZeroMQ's greeting, and a frame of 2 GiB.
        raw.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32))
        sent = 0
        with contextlib.suppress(ConnectionError):
            raw.sendall(bytes([flags]) + (2 << 30).to_bytes(8, "big"))
            for _ in range(512):
                sent += raw.send(bytes(1 << 16))
    assert sent < 16 << 20
    assert resident_bytes() - before < 32 << 20
    assert service.get("/kept").value == b"value"


def test_a_stranger_who_only_connects_stops_nobody(service):
    host, port = service.address.split(":")
    held = [socket.create_connection((host, int(port)), 5) for _ in range(200)]
    try:
        with enter(service.address) as client:
            assert client.get("/kept", deadline=10).value == b"value"
    finally:
        for each in held:
            each.close()


@pytest.mark.parametrize(
    "frame",
    [b"", b"\xff", b"\x90", b"\x93\x01\x01", os.urandom(1000), b"\x91" * 100_000, frames.encode({"call": "get"})],
    ids=["empty", "ff", "empty list", "cut", "random", "nested", "a map"],
)
def test_who_talks_nonsense_is_not_heard_again_and_hurts_nobody(service, sockets, frame):
    odd = dealer(sockets, service.address)
    odd.send(frame)
    odd.send(frames.encode(Request(frames.PROTOCOL, 7, "get", key="/kept")))
    assert odd.poll(300) == 0
    with enter(service.address) as client:
        assert client.get("/kept").value == b"value"


@pytest.mark.parametrize(
    "request_",
    [
        Request(frames.PROTOCOL + 1, 1, "get", key="/kept"),
        Request(frames.PROTOCOL, 1, "explode"),
        Request(frames.PROTOCOL, 1, "put", key="no\nkey", value=b"x"),
        Request(frames.PROTOCOL, 1, "grant", ttl=float("nan")),
        Request(frames.PROTOCOL, 1, "grant", ttl=1e300),
        Request(frames.PROTOCOL, 1, "watch", key=""),
    ],
)
def test_what_cannot_be_done_is_refused_with_three_lines(service, sockets, request_):
    odd = dealer(sockets, service.address)
    odd.send(frames.encode(request_))
    assert odd.poll(5000)
    answer = frames.decode_reply(odd.recv())
    assert answer.error == "RecordRefused"
    assert all(answer.refused)


def test_fuzzed_frames_hurt_nobody(service, sockets):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    calls = ["put", "get", "list", "delete", "grant", "keep", "revoke", "watch", "unwatch", "ping"]
    odd = dealer(sockets, service.address)
    for turn in range(400):
        request = Request(frames.PROTOCOL, turn, rng.choice(calls), key="/fuzz", value=rng.randbytes(8), ttl=1.0)
        frame = bytearray(frames.encode(request))
        for _ in range(rng.randrange(4)):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        odd.send(bytes(frame[: rng.randrange(1, len(frame) + 1)]))
        if turn % 10 == 9:  # by now it is ignored
            odd.close(0)
            odd = dealer(sockets, service.address)
    assert service.get("/kept", deadline=10).value == b"value"
    with enter(service.address) as client:
        assert client.get("/kept", deadline=10).value == b"value"


def test_a_port_in_use_is_told_in_the_caller_s_thread(service):
    port = int(service.address.rpartition(":")[2])
    with pytest.raises(AddressInvalid, match="Address already in use"):
        tensorway.create("rendezvous", "direct", {"secret": SECRET, "port": port})


def test_an_address_that_is_none_is_told():
    with pytest.raises(AddressInvalid, match="That is no address"):
        enter("no address at all")


def test_a_service_that_comes_late_is_found():
    port = free_port()
    with enter(f"127.0.0.1:{port}") as early:
        with pytest.raises(DeadlineExceeded, match=r"Nothing answered there within 0\.3 s"):
            early.get("/a", deadline=0.3)
        with tensorway.create("rendezvous", "direct", {"secret": SECRET, "port": port}) as late:
            late.put("/a", b"x")
            assert early.wait("/a", 10).value == b"x"


def test_without_a_secret_nothing_begins(monkeypatch):
    monkeypatch.delenv("TENSORWAY_SECRET", raising=False)
    with pytest.raises(Unauthenticated, match="No secret was given"):
        tensorway.create("rendezvous", "direct")
    monkeypatch.setenv("TENSORWAY_SECRET", "short")
    with pytest.raises(Unauthenticated, match="fewer than 16"):
        tensorway.create("rendezvous", "direct")


def test_a_list_that_is_too_long_for_one_answer_is_refused(service):
    for index in range(3):
        service.put(f"/long/{index}", bytes(6 << 20))
    with pytest.raises(RecordRefused, match="one answer"):
        service.list("/long/")
    assert len(service.list("/long/1")) == 1


SERVICE = """
    import time, tensorway
    service = tensorway.create("rendezvous", "direct", {"secret": "a secret of the tests"})
    service.put("/kept", b"value")
    print(service.address, flush=True)
    time.sleep(60)
"""


def test_a_service_that_is_stopped_or_killed_costs_its_clients_their_deadlines_only():
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SERVICE)], stdout=subprocess.PIPE)
    try:
        with enter(process.stdout.readline().decode().strip()) as client:
            assert client.get("/kept", deadline=10).value == b"value"
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)  # until it has stopped: a busy machine lets it answer before
            started = time.monotonic()
            with pytest.raises(DeadlineExceeded, match="No answer came"):
                client.get("/kept", deadline=0.5)
            assert time.monotonic() - started < 3
            process.send_signal(signal.SIGCONT)
            assert client.get("/kept", deadline=10).value == b"value"
            process.kill()
            with pytest.raises(DeadlineExceeded):
                client.put("/kept", b"x", expected=1, deadline=1)
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def test_a_watch_is_told_that_it_may_have_missed_something(service):
    port = int(service.address.rpartition(":")[2])
    with enter(service.address) as client, client.watch("/") as watch:
        service.close()
        with tensorway.create("rendezvous", "direct", {"secret": SECRET, "port": port}) as again:
            assert [event.kind for event in watch.next(10)] == ["reset"]
            again.put("/new", b"x")
            events = watch.next(5)
            assert [(event.kind, event.key) for event in events if event.kind != "reset"] == [("put", "/new")]


@pytest.fixture
def pausing(tmp_path):
    """A service that can be paused, so that what is sent meanwhile is there all at once."""
    store = direct(tmp_path)
    store.server.start()
    yield store
    store.server.kill()


def test_changes_of_one_turn_are_told_in_few_frames_and_none_is_missed(pausing, sockets):
    stores = [DirectStore(pausing.options["address"], CROWDED) for _ in range(4)]
    try:
        watches = [store.changes("/burst/", 30) for store in stores]
        writer = dealer(sockets, pausing.options["address"], CROWDED)
        writer.send(frames.encode(Request(frames.PROTOCOL, 0, "get", key="/burst/0")))
        assert writer.poll(30_000)  # it is connected
        pausing.server.pause()
        for number in range(200):
            writer.send(frames.encode(Request(frames.PROTOCOL, number, "put", key=f"/burst/{number}", value=b"x")))
        pausing.server.resume()
        for watch in watches:
            seen = []
            until = time.monotonic() + 30
            while len(seen) < 200 and time.monotonic() < until:
                seen += watch.next(1)
            assert [(event.kind, event.key) for event in seen] == [("put", f"/burst/{number}") for number in range(200)]
        said = stores[0].status("/", 30)
        assert said.changes == 4 * 200
        assert said.changes_frames <= said.changes / 4
    finally:
        for store in stores:
            store.close()


def test_a_watch_that_begins_between_two_changes_of_one_turn_sees_the_second_only(pausing):
    store = DirectStore(pausing.options["address"], CROWDED)
    try:
        assert store.get("/a", 30) is None
        pausing.server.pause()
        seen = []

        def watch():
            changes = store.changes("/", 30)
            seen.extend(changes.next(30))

        steps = [lambda: store.put("/a", b"x", "", None, 30), watch, lambda: store.put("/b", b"x", "", None, 30)]
        threads = [threading.Thread(target=step) for step in steps]
        for number, thread in enumerate(threads):
            thread.start()
            until = time.monotonic() + 30
            while len(store._pending) <= number and time.monotonic() < until:
                time.sleep(0.005)  # in this order, over one connection
        pausing.server.resume()
        for thread in threads:
            thread.join(30)
        assert [event.key for event in seen] == ["/b"]
    finally:
        store.close()


def test_changes_of_one_turn_that_are_too_large_for_one_frame_all_arrive(service, sockets, monkeypatch):
    decode, free = frames.decode_request, threading.Event()
    with enter(service.address) as client, client.watch("/large/") as watch:
        writer = dealer(sockets, service.address)
        monkeypatch.setattr(frames, "decode_request", lambda frame: decode(frame) if free.wait(30) else None)
        # It waits at the first, and by the time it goes on the others are there.
        for number in range(4):
            request = Request(frames.PROTOCOL, number, "put", key=f"/large/{number}", value=bytes(6 << 20))
            writer.send(frames.encode(request))
        time.sleep(2.0)
        free.set()
        seen, until = [], time.monotonic() + 30
        while len(seen) < 4 and time.monotonic() < until:
            seen += watch.next(1)
        assert [(event.kind, len(event.record.value)) for event in seen] == [("put", 6 << 20)] * 4


def test_who_watches_and_says_nothing_else_is_not_forgotten_by_the_service(service, monkeypatch):
    monkeypatch.setattr("tensorway.rendezvous.service._SILENCE", 3.0)
    monkeypatch.setattr("tensorway.rendezvous.lines._PING", 0.2)
    with enter(service.address) as client, client.watch("/quiet") as watch:
        time.sleep(4.0)
        service.put("/quiet", b"x")
        assert [event.kind for event in watch.next(10)] == ["put"]


def test_a_watch_of_who_says_nothing_is_dropped(service, sockets, monkeypatch):
    monkeypatch.setattr("tensorway.rendezvous.service._SILENCE", 0.5)
    silent = dealer(sockets, service.address)
    silent.send(frames.encode(Request(frames.PROTOCOL, 1, "watch", key="/")))
    assert silent.poll(5000)
    silent.recv()
    with enter(service.address) as client:
        until = time.monotonic() + 20
        while client._store.status("/", 5).watches and time.monotonic() < until:
            time.sleep(0.1)
        assert client._store.status("/", 5).watches == 0


@pytest.mark.parametrize("port", [65_536, 99_999, -5])
def test_a_port_that_there_is_not_is_refused_and_no_other_taken(port):
    with pytest.raises(AddressInvalid, match="no port has that number"):
        tensorway.create("rendezvous", "direct", {"secret": SECRET, "port": port})
