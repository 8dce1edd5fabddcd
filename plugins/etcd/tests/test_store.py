"""The suite against a real etcd, and what is particular to it: restarts, pauses, users, TLS, foreign records."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from base64 import b64encode

import pytest

import tensorway
from tensorway.errors import DeadlineExceeded, LeaseLost, RecordRefused, Unauthenticated
from tensorway.testing import ServedRendezvousSuite
from tensorway.testing.waiting import eventually

SECRET = "a secret of the tests"


def enter(*servers, **options):
    endpoints = [getattr(server, "url", server) for server in servers]
    return tensorway.create("rendezvous", "etcd", {"endpoints": endpoints, "secret": SECRET} | options)


def encoded(text):
    return b64encode(text.encode()).decode()


class TestEtcd(ServedRendezvousSuite):
    name = "etcd"
    large = 1 << 20

    def entrance(self, server):
        return {"endpoints": [server.url], "secret": SECRET}

    @pytest.fixture
    def options(self, shared):
        return self.entrance(shared)

    @pytest.fixture
    def server(self, launch):
        return launch()


def test_a_watch_that_was_cut_goes_on_where_it_was(launch):
    server = launch()
    with enter(server) as client, enter(server) as other, client.watch("/w/") as watch:
        client.put("/w/a", b"1")
        assert ["put"] == [event.kind for event in watch.next(5)]
        server.kill()
        server.start()
        other.put("/w/a", b"2", deadline=30)
        other.delete("/w/a")
        told = []
        while len(told) < 2:
            told += [(event.kind, event.key) for event in watch.next(30)] or ["nothing"]
        assert [("put", "/w/a"), ("deleted", "/w/a")] == told


def test_a_watch_of_an_etcd_that_has_lost_everything_says_so(launch):
    server = launch()
    with enter(server) as client, client.watch("/w/") as watch:
        for _ in range(5):
            client.put("/w/a", b"1")
        told = []
        while len(told) < 5:
            told += watch.next(5)
        server.kill()
        shutil.rmtree(server.command[server.command.index("--data-dir") + 1])
        server.start()
        assert ["reset"] == [event.kind for event in watch.next(30)]
        client.put("/w/b", b"1")
        assert [("put", "/w/b")] == [(event.kind, event.key) for event in watch.next(10)]


def test_a_watch_whose_past_was_compacted_says_so(launch):
    server = launch()
    with enter(server) as client, client.watch("/w/") as watch:
        client.put("/w/a", b"1")
        assert ["put"] == [event.kind for event in watch.next(5)]
        server.kill()
        server.start()
        # What nobody has asked for again yet is thrown away.
        revision = max(client.put("/w/a", bytes([number]), deadline=30) for number in range(5))
        server.call("kv/compaction", json.dumps({"revision": str(revision), "physical": True}).encode())
        assert ["reset"] == [event.kind for event in watch.next(30)]
        client.put("/w/b", b"1")
        assert [("put", "/w/b")] == [(event.kind, event.key) for event in watch.next(10)]


def test_more_records_than_one_answer_has_are_all_listed(shared, monkeypatch):
    monkeypatch.setattr("tensorway_etcd.store._PAGE", 3)
    with enter(shared) as client:
        keys = [f"/pages/{name}" for name in "abcdefg"]
        for key in keys:
            client.put(key, key.encode())
        assert keys == [record.key for record in client.list("/pages/")]


def test_more_than_memory_should_hold_is_not_listed(shared, monkeypatch):
    monkeypatch.setattr("tensorway_etcd.store._PAGE", 1)
    monkeypatch.setattr("tensorway_etcd.store.MAX_ANSWER", 1000)
    with enter(shared) as client:
        for name in "ab":
            client.put(f"/large/{name}", bytes(600))
        with pytest.raises(RecordRefused, match="more than 1,000 bytes"):
            client.list("/large/")


def test_without_a_secret_nobody_enters(monkeypatch):
    monkeypatch.delenv("TENSORWAY_SECRET", raising=False)
    with pytest.raises(Unauthenticated, match="No secret was given"):
        tensorway.create("rendezvous", "etcd")


def test_a_record_that_nobody_of_ours_wrote_is_passed_over(shared):
    with enter(shared) as client, client.watch("/foreign/") as watch:
        client.put("/foreign/ours", b"x")
        body = {"key": encoded("/foreign/theirs"), "value": encoded("x" * 64)}
        shared.call("kv/put", json.dumps(body).encode())
        # A key that could not be ours must not harm those that are.
        for key in (b"/foreign/\xff\xfe", b"/foreign/" + b"k" * 70_000):
            body = {"key": b64encode(key).decode(), "value": ""}
            shared.call("kv/put", json.dumps(body).encode())
        client.put("/foreign/last", b"y")

        assert ["/foreign/last", "/foreign/ours"] == [record.key for record in client.list("/foreign/")]
        assert client.get("/foreign/theirs") is None
        seen = []
        eventually(lambda: seen.extend(event.key for event in watch.next(0.2)) or "/foreign/last" in seen, 5)
        assert ["/foreign/ours", "/foreign/last"] == seen


def test_records_of_another_secret_are_passed_over(shared):
    with enter(shared) as client, enter(shared, secret="another secret altogether") as stranger:
        stranger.put("/other/a", b"x")
        assert client.get("/other/a") is None


def test_a_value_larger_than_a_request_is_refused_before_it_travels(shared):
    with enter(shared) as client, enter(shared, max_request_bytes=64 << 20) as hopeful:
        with pytest.raises(RecordRefused, match="1,572,864"):
            client.put("/large", bytes(1_572_864))
        client.put("/large", bytes(1_400_000))
        for size in (1_700_000, 12_000_000):  # the first is refused by etcd, the second by its gateway
            with pytest.raises(RecordRefused, match="larg"):
                hopeful.put("/large", bytes(size), deadline=20)
        assert 1_400_000 == len(hopeful.get("/large").value)


def test_a_put_under_a_lease_that_etcd_does_not_know_is_lost(shared):
    with enter(shared) as client:
        lease = client.lease(5)
        shared.call("lease/revoke", json.dumps({"ID": lease.name}).encode())
        with pytest.raises(LeaseLost):
            client.put("/leased", b"x", lease=lease)
        eventually(lambda: lease.lost, 5)


def test_a_deadline_is_kept_by_a_name_server_that_does_not_answer(monkeypatch):
    asked = threading.Event()
    real = socket.getaddrinfo

    def slow(host, *arguments, **options):
        if host == "etcd.example" and not options.get("flags"):  # asking whether it is an address needs no server
            asked.wait(30)
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with enter("http://etcd.example:2379") as client:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="no name server"):
            client.get("/a", 0.5)
        taken = time.monotonic() - started
    asked.set()
    assert taken < 10


def test_the_next_endpoint_is_asked_when_one_is_away_or_silent(shared, launch):
    silent = launch()
    silent.pause()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # nobody listens
        away = f"http://127.0.0.1:{bound.getsockname()[1]}"
        for first in (away, silent):
            with enter(first, shared) as client:
                started = time.monotonic()
                client.put("/failover", b"x", deadline=6)
                assert client.get("/failover", 1).value == b"x"
                assert time.monotonic() - started < 6
    silent.resume()


def test_what_is_no_etcd_is_said():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"

        def serve():
            sock, _ = listener.accept()
            with sock:
                sock.recv(4096)
                sock.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        client = enter(f"http://127.0.0.1:{listener.getsockname()[1]}")
        with client, pytest.raises(RecordRefused, match="no gateway of etcd"):
            client.get("/a")
        thread.join()


# -- users


@pytest.fixture
def guarded(launch):
    server = launch()
    for path, body in (
        ("auth/user/add", {"name": "root", "password": "the root's"}),
        ("auth/user/grant", {"user": "root", "role": "root"}),
        ("auth/role/add", {"name": "member"}),
        ("auth/user/add", {"name": "member", "password": "the member's"}),
        ("auth/user/grant", {"user": "member", "role": "member"}),
        (
            "auth/role/grant",
            {"name": "member", "perm": {"permType": 2, "key": encoded("/d/"), "range_end": encoded("/d0")}},
        ),
    ):
        if path == "auth/user/grant" and body["role"] == "root":
            server.call("auth/role/add", json.dumps({"name": "root"}).encode())
        server.call(path, json.dumps(body).encode())
    server.call("auth/enable", b"{}")
    return server


def test_who_gives_no_password_or_a_wrong_one_is_told(guarded, tmp_path):
    (tmp_path / "wrong").write_text("a guess\n")
    for given, says in (
        ({}, "nobody by name"),
        ({"user": "member"}, "'member'"),
        ({"user": "member", "password_file": str(tmp_path / "wrong")}, "user ID or password"),
        ({"user": "member", "password_file": str(tmp_path / "absent")}, "cannot be"),
    ):
        with enter(guarded, **given) as client:
            for call in (lambda client=client: client.get("/d/a"), lambda client=client: client.watch("/d/")):
                with pytest.raises(Unauthenticated, match=says):
                    call()


def test_who_gives_the_password_may_do_what_their_role_may(guarded, tmp_path):
    (tmp_path / "password").write_text("the member's\n")
    with enter(guarded, user="member", password_file=str(tmp_path / "password")) as client:
        client.put("/d/a", b"x", lease=client.lease(60))
        with pytest.raises(Unauthenticated, match="permission denied"):
            client.put("/elsewhere", b"x")
        with pytest.raises(Unauthenticated, match="permission denied"):
            client.watch("/elsewhere")
        for use in (lambda: client.get("/d/a"), lambda: client.watch("/d/").close()):
            client._store._gateway._token = "stale.1"  # of another life of etcd; one that it replays is good again
            use()
        with client.watch("/d/") as watch:
            guarded.kill()
            guarded.start()
            assert b"x" == client.get("/d/a", 10).value
            client.put("/d/a", b"y")
            assert [b"y"] == [event.record.value for event in watch.next(10)]


# -- TLS


@pytest.fixture
def certificate(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=etcd"]
    subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return key, cert


def test_over_tls_calls_and_watches_work_for_who_trusts_the_certificate(launch, certificate):
    key, cert = map(str, certificate)
    server = launch("--cert-file", cert, "--key-file", key, scheme="https")
    with enter(server, ca_file=cert) as client, client.watch("/tls/") as watch:
        client.put("/tls/a", b"x" * 100_000)
        assert 100_000 == len(client.get("/tls/a").value)
        assert [100_000] == [len(event.record.value) for event in watch.next(5)]
        assert [] == watch.next(0.1)
    with enter(server) as client, pytest.raises(Unauthenticated, match="certificate was not accepted"):
        client.get("/tls/a")
    with pytest.raises(Exception, match="cannot be loaded"):
        enter(server, ca_file=str(certificate[0].parent / "absent.pem"))
