"""The suite against a real Redis, and what is particular to it: restarts, pauses, passwords, TLS, foreign records."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
import time

import pytest

import tensorway
from tensorway.errors import DeadlineExceeded, LeaseLost, RecordRefused, Unauthenticated
from tensorway.testing import ServedRendezvousSuite
from tensorway.testing.rendezvous import collect
from tensorway.testing.waiting import eventually

SECRET = "a secret of the tests"


def enter(server, **options):
    given = {"url": getattr(server, "url", server), "secret": SECRET} | options
    return tensorway.create("rendezvous", "redis", given)


class TestRedis(ServedRendezvousSuite):
    name = "redis"

    def entrance(self, server):
        return {"url": server.url, "secret": SECRET}

    @pytest.fixture
    def options(self, shared):
        return self.entrance(shared)

    @pytest.fixture
    def server(self, launch):
        return launch()


def test_without_a_secret_nobody_enters(client, monkeypatch):
    monkeypatch.delenv("TENSORWAY_SECRET", raising=False)
    with pytest.raises(Unauthenticated, match="No secret was given"):
        tensorway.create("rendezvous", "redis")


def test_the_address_tells_no_password(client):
    with enter("redis://user:hidden@cache.example:6379/1?client_name=us") as entered:
        assert "redis://cache.example:6379/1" == entered.address


@pytest.mark.parametrize(
    "answer",
    [b"*1\r\n" * 5000, b"HTTP/1.1 200 OK\r\n\r\n", bytes(4096), b"*one\r\n"],
    ids=["deep", "http", "zeros", "word"],
)
def test_what_is_no_redis_is_said_in_time(client, answer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    accepted, _ = server.accept()
                    with accepted:
                        accepted.recv(4096)
                        accepted.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with enter(f"redis://127.0.0.1:{server.getsockname()[1]}") as entered:
            started = time.monotonic()
            with pytest.raises(DeadlineExceeded, match="No answer came"):
                entered.get("/x", deadline=1.0)
            assert time.monotonic() - started < 5
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def test_a_record_that_nobody_of_ours_wrote_is_passed_over(client, shared):
    raw = client.Redis.from_url(shared.url)
    with enter(shared) as entered, entered.watch("/foreign/") as watch:
        entered.put("/foreign/ours", b"x")
        for key in (b"/foreign/theirs", b"/foreign/\xff\xfe", b"/foreign/" + b"k" * 70_000):
            raw.hset("{tensorway}:values", key, b"x" * 64)
            raw.hset("{tensorway}:about", key, b"7:")
            raw.zadd("{tensorway}:index", {key: 0})
            raw.publish(b"{tensorway}:0:" + key, b"p7:\n" + b"x" * 64)
        raw.publish("{tensorway}:0:/foreign/nonsense", b"\0")
        entered.put("/foreign/last", b"y")

        assert ["/foreign/last", "/foreign/ours"] == [record.key for record in entered.list("/foreign/")]
        assert entered.get("/foreign/theirs") is None
        seen = []
        eventually(lambda: seen.extend(event.key for event in watch.next(0.2)) or "/foreign/last" in seen, 5)
        assert ["/foreign/ours", "/foreign/last"] == seen
    raw.flushall()
    raw.close()


def test_records_of_another_secret_or_namespace_or_database_are_not_ours(shared):
    elsewhere = (
        {"secret": "another secret altogether"},
        {"namespace": "another"},
        {"url": shared.url.replace("/0", "/1")},
    )
    for other in elsewhere:
        with enter(shared) as entered, entered.watch("/other/") as watch, enter(shared, **other) as stranger:
            stranger.put("/other/a", b"x")
            assert entered.get("/other/a") is None
            assert [] == watch.next(0.1)


def test_special_characters_of_a_prefix_mean_themselves_to_a_watch(shared):
    with enter(shared) as entered:
        for name in ("*", "?", "[ab]", "\\", "^", "-"):
            with entered.watch(f"/special/{name}") as watch:
                entered.put("/special/a", b"x")
                entered.put(f"/special/{name}", b"y")
                assert [f"/special/{name}"] == [event.key for event in watch.next(5)]


def test_a_put_under_a_lease_that_redis_does_not_know_is_lost(client, shared):
    raw = client.Redis.from_url(shared.url)
    with enter(shared) as entered:
        lease = entered.lease(5)
        raw.zrem("{tensorway}:leases", lease.name)
        raw.hdel("{tensorway}:ttls", lease.name)
        with pytest.raises(LeaseLost):
            entered.put("/leased", b"x", lease=lease)
        eventually(lambda: lease.lost, 5)
    raw.close()


def test_a_record_that_was_put_again_without_its_lease_stays(shared):
    with enter(shared) as entered:
        lease = entered.lease(60)
        entered.put("/unleased", b"x", lease=lease)
        entered.put("/unleased", b"y")
        entered.end(lease)
        assert b"y" == entered.get("/unleased").value


def test_a_watch_tells_promptly_that_a_lease_ended_though_nobody_calls(shared):
    with enter(shared) as entered, enter(shared) as dying, entered.watch("/dying/") as watch:
        dying._store.keep = lambda lease, seconds: True  # it does not keep its lease
        dying.put("/dying/a", b"x", lease=dying.lease(3.0))
        started, told = time.monotonic(), collect(watch, 2)
        assert [("put", "/dying/a"), ("expired", "/dying/a")] == [(event.kind, event.key) for event in told]
        assert time.monotonic() - started < 3.0 + 2.5


def test_a_redis_that_writes_to_disk_knows_after_it_was_killed_what_it_was_told(launch):
    server = launch("--appendonly", "yes", "--appendfsync", "always")
    with enter(server) as entered:
        entered.put("/w/a", b"1")
        server.kill()
        server.start()
        assert b"1" == entered.get("/w/a").value


def test_a_deadline_is_kept_by_a_name_server_that_does_not_answer(client, monkeypatch):
    asked = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: asked.wait(30) and [])
    with enter("redis://redis.example:6379/0") as entered:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="could not be connected to in time"):
            entered.get("/a", 0.5)
        taken = time.monotonic() - started
    asked.set()
    assert taken < 10


def test_what_redis_has_no_memory_for_is_refused(launch):
    server = launch("--maxmemory", "8mb")

    def fill():
        for number in range(16):
            entered.put(f"/large/{number}", bytes(1 << 20))

    with enter(server) as entered:
        with pytest.raises(RecordRefused, match="maxmemory"):
            fill()
        assert entered.get("/large/0") is not None


# -- passwords


def test_who_gives_no_password_or_a_wrong_one_is_told(launch, tmp_path):
    guarded = launch("--requirepass", "the password")
    (tmp_path / "right").write_text("the password\n")
    (tmp_path / "wrong").write_text("a guess\n")
    with_guess = guarded.url.replace("//", "//:a%20guess@")
    for url, given in (
        (guarded.url, {}),
        (with_guess, {}),
        (guarded.url, {"password_file": str(tmp_path / "wrong")}),
    ):
        with enter(url, **given) as entered:
            for call in (lambda entered=entered: entered.get("/a"), lambda entered=entered: entered.watch("/a")):
                started = time.monotonic()
                with pytest.raises(Unauthenticated, match="It refused"):
                    call()
                assert time.monotonic() - started < 4
    with enter(guarded, password_file=str(tmp_path / "right")) as entered, entered.watch("/a") as watch:
        entered.put("/a", b"x")
        assert ["put"] == [event.kind for event in watch.next(5)]
    with pytest.raises(Exception, match="cannot be"):
        enter(guarded, password_file=str(tmp_path / "absent"))


# -- TLS


def test_over_tls_calls_and_watches_work_for_who_trusts_the_certificate(launch, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=redis"]
    subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    server = launch()
    server.kill()
    server.command += ["--port", "0", "--tls-port", str(server.port), "--tls-auth-clients", "no"]
    server.command += ["--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", cert]
    server.start()
    url = server.url.replace("redis:", "rediss:")
    with enter(url, ca_file=cert) as entered, entered.watch("/tls/") as watch:
        entered.put("/tls/a", b"x" * 100_000)
        assert 100_000 == len(entered.get("/tls/a").value)
        assert [100_000] == [len(event.record.value) for event in watch.next(5)]
        assert [] == watch.next(0.1)
    with enter(url) as entered, pytest.raises(Unauthenticated, match="certificate was not accepted"):
        entered.get("/tls/a")


def test_many_that_watch_look_for_ended_leases_together_and_not_each_as_often_as_one(client, launch):
    server = launch()
    raw = client.Redis.from_url(server.url)

    def calls():
        stats = raw.info("commandstats")
        return sum(row["calls"] for name, row in stats.items() if name.startswith("cmdstat_eval"))

    count, seconds = 20, 6.0
    entered = [enter(server) for _ in range(count)]
    watches = [each.watch("/many/") for each in entered]
    threads = [threading.Thread(target=watch.next, args=(30 + seconds,)) for watch in watches]
    try:
        for thread in threads:
            thread.start()
        time.sleep(2.0)  # until each knows how many they are
        before, began = calls(), time.monotonic()
        time.sleep(seconds)
        looked, alone = calls() - before, (time.monotonic() - began) / 0.4
        assert looked < count * alone / 3
        # And a lease that nobody keeps is told in time all the same.
        with enter(server) as other, other.watch("/many/") as watch:
            lease = entered[0]._store.grant(3.0, 5)
            entered[0]._store.put("/many/mortal", b"x" * 64, lease, None, 5)
            eventually(lambda: any(event.kind == "expired" for event in watch.next(0.1)), 30)
    finally:
        for each in entered:
            each.close()
        for thread in threads:
            thread.join(30)
        raw.close()
