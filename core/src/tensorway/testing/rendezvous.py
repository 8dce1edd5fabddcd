"""What every rendezvous must do: records, revisions, waits, watches, leases of processes that are killed and stopped.

Room `testing`. Subclass `RendezvousSuite`, set `name` and say in the fixture `options` how one more client enters the
store that your fixture started. Declared abilities are the gates: what is declared must work, what is not must raise
`Unsupported`. Where the store is a server in a process of its own, subclass `ServedRendezvousSuite`: it also kills,
restarts and stops one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from tensorway.errors import (
    Closed,
    DeadlineExceeded,
    LeaseLost,
    RecordRefused,
    Unsupported,
)
from tensorway.rendezvous.contract import MAX_VALUE
from tensorway.rendezvous.rendezvous import Rendezvous
from tensorway.testing.possessions import left_of
from tensorway.testing.servers import Server
from tensorway.testing.suite import Suite
from tensorway.testing.waiting import eventually

#: The shortest lease of the suite; stores count in seconds.
TTL = 2.0
#: How much later than it should a thing may happen on a busy machine, or in a store that looks twice a second.
SLACK = 4.0
#: How long a call that is given half a second may take while the server is stopped, and how long a watch may, which may
#: have more than one thing to give up. Nobody waits for anything then, so there is less slack than elsewhere.
LATEST, LATEST_WATCH = 3.0, 3.5


class RendezvousSuite(Suite):
    """The contract of `tensorway.rendezvous.rendezvous.Rendezvous` over one store."""

    #: The backend's name, as `tensorway.create("rendezvous", name)` takes it.
    name: str

    @pytest.fixture
    def options(self) -> dict[str, object]:
        """How a client enters the store; every client that is made with these sees the same records."""
        raise NotImplementedError("say how a client enters your store: override the fixture `options`")

    @pytest.fixture
    def enter(self, options: dict[str, object]) -> Iterator[Callable[[], Rendezvous]]:
        """Make one more client of the store; all are closed in the end."""
        import tensorway

        with contextlib.ExitStack() as stack:
            yield lambda: stack.enter_context(tensorway.create("rendezvous", self.name, options))

    @pytest.fixture
    def one(self, enter: Callable[[], Rendezvous]) -> Rendezvous:
        """A client."""
        return enter()

    @pytest.fixture
    def other(self, enter: Callable[[], Rendezvous]) -> Rendezvous:
        """Another client of the same store."""
        return enter()

    @pytest.fixture
    def root(self) -> str:
        """A prefix that no other test uses: the store may outlive them."""
        return f"/{uuid.uuid4().hex}/"

    # -- records

    def test_what_one_puts_another_gets(self, one: Rendezvous, other: Rendezvous, root: str) -> None:
        """Any bytes, also none, also many; the last put wins.

        *If this fails:* see that values are stored as bytes, not as text.
        """
        assert other.get(root + "a") is None
        values = [b"", bytes(range(256)), random.Random(1).randbytes(100_000), b"last"]
        for value in values:
            one.put(root + "a", value)
            record = other.get(root + "a")
            assert record is not None and (record.key, record.value) == (root + "a", value)

    def test_revisions_grow(self, one: Rendezvous, other: Rendezvous, root: str) -> None:
        """Each put has a higher revision than the one before, and `get` tells it.

        *If this fails:* return the store's own revision, or count under a lock of the store's.
        """
        seen = [one.put(root + "a", b"x") for _ in range(5)]
        assert seen == sorted(set(seen)) and seen[0] > 0
        assert other.get(root + "a").revision == seen[-1]  # type: ignore[union-attr]

    def test_a_list_is_what_is_below_a_prefix(self, one: Rendezvous, other: Rendezvous, root: str) -> None:
        """All of them, by key, and nothing else.

        *If this fails:* see that a prefix is one of characters, and that special characters of the store are escaped.
        """
        for name in ("b", "a", "ab", "c/d", "*", "[x]", "%", "\\"):
            one.put(root + "in/" + name, name.encode())
        one.put(root + "inside", b"not below")
        listed = other.list(root + "in/")
        names = sorted(("b", "a", "ab", "c/d", "*", "[x]", "%", "\\"))
        assert [(record.key, record.value) for record in listed] == [(root + "in/" + n, n.encode()) for n in names]
        assert [record.key for record in other.list(root + "in/*")] == [root + "in/*"]

    def test_what_is_deleted_is_gone(self, one: Rendezvous, other: Rendezvous, root: str) -> None:
        """And the second delete says that nothing was there.

        *If this fails:* return whether the key existed.
        """
        one.put(root + "a", b"x")
        assert other.delete(root + "a") is True
        assert one.get(root + "a") is None
        assert one.delete(root + "a") is False

    def test_one_of_many_writers_wins(self, enter: Callable[[], Rendezvous], root: str) -> None:
        """Ten clients create one key at once: one succeeds, the others learn that they did not.

        *If this fails:* compare and write in one step of the store, not in two.
        """
        clients = [enter() for _ in range(10)]
        if "compare" not in clients[0].abilities:
            with pytest.raises(Unsupported):
                clients[0].put(root + "a", b"x", expected=0)
            return
        barrier = threading.Barrier(10)

        def create(index: int) -> bool:
            barrier.wait(30)
            try:
                clients[index].put(root + "a", str(index).encode(), expected=0, deadline=30)
            except RecordRefused:
                return False
            return True

        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            won = list(pool.map(create, range(10)))
        assert won.count(True) == 1
        assert clients[0].get(root + "a").value == str(won.index(True)).encode()  # type: ignore[union-attr]

    def test_a_change_at_another_revision_is_refused(self, one: Rendezvous, other: Rendezvous, root: str) -> None:
        """Put and delete with an old revision change nothing; with the present one they do.

        *If this fails:* pass `expected` to the store.
        """
        if "compare" not in one.abilities:
            with pytest.raises(Unsupported):
                one.delete(root + "a", expected=1)
            return
        first = one.put(root + "a", b"1", expected=0)
        second = other.put(root + "a", b"2", expected=first)
        with pytest.raises(RecordRefused):
            one.put(root + "a", b"3", expected=first)
        with pytest.raises(RecordRefused):
            one.delete(root + "a", expected=first)
        assert one.get(root + "a").value == b"2"  # type: ignore[union-attr]
        assert one.delete(root + "a", expected=second) is True

    @pytest.mark.parametrize("key", ["", "with space", "snow☃", "x" * 257, "new\nline", "nul\0"])
    def test_what_is_no_key_is_refused(self, one: Rendezvous, key: str) -> None:
        """Before it reaches the store.

        *If this fails:* do not override `Rendezvous`.
        """
        for call in (lambda: one.put(key, b"x"), lambda: one.get(key), lambda: one.list(key), lambda: one.delete(key)):
            with pytest.raises(RecordRefused):
                call()

    def test_what_is_too_large_is_refused(self, one: Rendezvous, root: str) -> None:
        """And the client goes on.

        *If this fails:* do not override `Rendezvous`.
        """
        with pytest.raises(RecordRefused):
            one.put(root + "a", bytes(MAX_VALUE + 1))
        one.put(root + "a", b"small")

    # -- waiting

    def test_a_wait_ends_when_the_record_comes(self, one: Rendezvous, other: Rendezvous, root: str) -> None:
        """A record that is there, and one that comes while somebody waits.

        *If this fails:* look at the record after the watch has begun, not before.
        """
        one.put(root + "there", b"1")
        assert other.wait(root + "there", 5).value == b"1"
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(other.wait, root + "late", 30)
            time.sleep(0.2)
            one.put(root + "late", b"2")
            assert waiting.result(SLACK).value == b"2"

    def test_a_wait_keeps_its_deadline(self, one: Rendezvous, root: str) -> None:
        """Nobody puts it: `DeadlineExceeded`, in time.

        *If this fails:* bound every call to the store by the seconds that it is given.
        """
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            one.wait(root + "never", 0.5)
        assert 0.4 < time.monotonic() - started < 0.5 + SLACK

    # -- watching

    def test_a_watch_tells_what_happens_below_its_prefix(self, one: Rendezvous, other: Rendezvous, root: str) -> None:
        """Puts with their values, deletions, in order; nothing from elsewhere, nothing from before.

        *If this fails:* begin the watch before `changes` returns.
        """
        if "watch" not in one.abilities:
            with pytest.raises(Unsupported):
                one.watch(root)
            return
        one.put(root + "w/before", b"0")
        with other.watch(root + "w/") as watch:
            one.put(root + "w/a", b"1")
            one.put(root + "elsewhere", b"2")
            one.put(root + "w/a", b"3")
            one.delete(root + "w/a")
            events = collect(watch, 3)
            told = [(event.kind, event.key, event.record.value if event.record else None) for event in events]
            assert told == [("put", root + "w/a", b"1"), ("put", root + "w/a", b"3"), ("deleted", root + "w/a", None)]
            started = time.monotonic()
            assert watch.next(0.3) == []
            assert time.monotonic() - started < 0.3 + SLACK

    # -- leases

    def test_a_lease_that_is_held_keeps_its_records(self, one: Rendezvous, other: Rendezvous, root: str) -> None:
        """For longer than its time; and when its holder ends it, its records go.

        *If this fails:* see that `keep` begins the lease's time anew.
        """
        if "lease" not in one.abilities:
            with pytest.raises(Unsupported):
                one.lease(TTL)
            return
        lease = one.lease(2 * TTL)
        one.put(root + "a", b"x", lease=lease)
        one.put(root + "stays", b"y")
        time.sleep(3 * TTL)
        assert lease.lost == "" and other.get(root + "a") is not None
        one.end(lease)
        eventually(lambda: other.get(root + "a") is None, 2 * TTL + SLACK)
        assert other.get(root + "stays") is not None
        with pytest.raises(LeaseLost):
            one.put(root + "b", b"x", lease=lease)

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
    def test_the_records_of_a_dead_process_go(
        self, other: Rendezvous, options: dict[str, object], root: str, number: int
    ) -> None:
        """A member that is killed, or stopped, is missed within the time of its lease.

        *If this fails:* leave the ending of leases to the store, never to its clients.
        """
        if "lease" not in other.abilities:
            pytest.skip("needs a store with leases; that it has none is tested above")
        watch = other.watch(root) if "watch" in other.abilities else None
        with member(self.name, options, root + "member") as process:
            assert other.wait(root + "member", 30).value == str(process.pid).encode()
            began = time.monotonic()
            process.send_signal(number)
            eventually(lambda: other.get(root + "member") is None, TTL + SLACK)
            assert time.monotonic() - began < TTL + SLACK
        if watch is not None:
            assert {event.kind for event in collect(watch, 2)} <= {"put", "expired", "deleted"}
            watch.close()

    def test_a_lease_of_a_closed_client_ends(
        self, enter: Callable[[], Rendezvous], other: Rendezvous, root: str
    ) -> None:
        """Its records are gone without waiting for the lease's time.

        *If this fails:* revoke on close.
        """
        if "lease" not in other.abilities:
            pytest.skip("needs a store with leases; that it has none is tested above")
        client = enter()
        client.put(root + "a", b"x", lease=client.lease(60))
        client.close()
        eventually(lambda: other.get(root + "a") is None, SLACK)

    @pytest.mark.parametrize("ttl", [0, -1, 0.1, float("nan"), float("inf"), 1e9])
    def test_what_is_no_time_is_refused(self, one: Rendezvous, ttl: float) -> None:
        """A lease without an end would be a leak, one without a beginning a lie.

        *If this fails:* do not override `Rendezvous`.
        """
        with pytest.raises((RecordRefused, Unsupported)):
            one.lease(ttl)

    # -- threads and ends

    def test_threads_share_a_client(self, one: Rendezvous, root: str) -> None:
        """Eight threads at once, each sees what it put.

        *If this fails:* the store's client library is not safe for threads: guard it, or use one for each.
        """

        def work(index: int) -> None:
            for turn in range(20):
                one.put(f"{root}{index}", f"{index} {turn}".encode(), deadline=30)
                assert one.get(f"{root}{index}", 30).value == f"{index} {turn}".encode()  # type: ignore[union-attr]

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))

    def test_a_closed_client_says_so(self, one: Rendezvous, root: str) -> None:
        """Twice closed is closed; every call raises `Closed`.

        *If this fails:* do not override `Rendezvous`.
        """
        one.close()
        one.close()
        for call in (lambda: one.get(root), lambda: one.put(root, b""), lambda: one.lease(5), lambda: one.watch(root)):
            with pytest.raises(Closed):
                call()

    def test_a_forked_child_does_not_use_its_parents_client(self, one: Rendezvous, root: str) -> None:
        """It is told so, and the parent goes on.

        *If this fails:* do not override `Rendezvous`.
        """
        one.put(root + "a", b"x")
        child = os.fork()
        if child == 0:
            try:
                one.get(root + "a")
            except Closed:
                one.close()
                os._exit(7)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert one.get(root + "a") is not None

    def test_clients_leave_no_thread_and_no_file(self, enter: Callable[[], Rendezvous], root: str) -> None:
        """After they are closed.

        *If this fails:* close what the store's client opened; count /proc/self/fd.
        """

        def once() -> None:
            client = enter()
            if "lease" in client.abilities:
                client.put(root + "a", b"x", lease=client.lease(60))
            if "watch" in client.abilities:
                client.watch(root)
            client.close()

        def some() -> None:
            for _ in range(5):
                once()

        once()
        assert [] == left_of(some, SLACK)


class ServedRendezvousSuite(RendezvousSuite):
    """The same, and what becomes of a client while its server is away, for a store with a server of its own.

    Say in the fixture `server` how a server of one test's own is started, and in `entrance` how one is entered. Where
    starting one takes long, override `options` as well, with a server that all tests share: only those that ask for
    `server` do it harm.
    """

    #: A value that the store takes, and the buffers of a socket do not: sending that is what can block. Fewer bytes
    #: where the store takes fewer.
    large: ClassVar[int] = 8 << 20

    @pytest.fixture
    def server(self) -> Server:
        """A server that runs, and that the test may harm."""
        raise NotImplementedError("start a server of the test's own: override the fixture `server`; see `launching`")

    def entrance(self, server: Any) -> dict[str, object]:
        """The options with which a client enters that server."""
        raise NotImplementedError("say how a client enters a server: override `entrance`")

    @pytest.fixture
    def options(self, server: Server) -> dict[str, object]:
        """How a client enters the store: a server of this test's own."""
        return self.entrance(server)

    @pytest.fixture
    def visitor(self, server: Server) -> Iterator[Rendezvous]:
        """A client of the server that the test may harm."""
        import tensorway

        with tensorway.create("rendezvous", self.name, self.entrance(server)) as client:
            yield client

    # -- a server that is away

    def test_a_watch_goes_on_after_its_server_was_killed_and_says_that_it_may_have_missed_something(
        self, visitor: Rendezvous, server: Server
    ) -> None:
        """Who waits is told `reset` when the server is back, and after that what changes; `durable` keeps its records.

        A durable store may know what happened meanwhile: then there need be no `reset`.

        *If this fails:* begin the watch anew when its connection is cut, and return a `reset` as soon as it has begun.
        """
        if "watch" not in visitor.abilities:
            pytest.skip("needs a store with watches; that it has none is tested above")
        with visitor.watch("/w/") as watch:
            visitor.put("/w/a", b"1")
            assert ["put"] == [event.kind for event in watch.next(5)]
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(watch.next, 60)
                server.kill()
                time.sleep(0.3)
                server.start()
                if "durable" in visitor.abilities:
                    assert b"1" == visitor.get("/w/a", 30).value  # type: ignore[union-attr]
                    visitor.put("/w/b", b"2")
                events = waiting.result(30)
            if ["reset"] == [event.kind for event in events]:
                visitor.put("/w/b", b"3")
                events = watch.next(10)
            assert [("put", "/w/b")] == [(event.kind, event.key) for event in events]

    def test_a_call_waits_for_its_server_to_come_back_within_its_deadline(
        self, visitor: Rendezvous, server: Server
    ) -> None:
        """A put that may be done twice is done when the server is back, and so is what comes after.

        *If this fails:* connect anew, and send again what does not compare, until the deadline.
        """
        visitor.put("/a", b"1")
        server.kill()
        restart = threading.Timer(0.5, server.start)
        restart.start()
        assert visitor.put("/a", b"2", deadline=30) > 0
        if "compare" in visitor.abilities:
            assert visitor.put("/a", b"3", expected=visitor.get("/a").revision) > 0  # type: ignore[union-attr]
        restart.join()

    def test_a_deadline_is_kept_while_its_server_is_stopped(self, visitor: Rendezvous, server: Server) -> None:
        """Connections are there, and nobody answers: every call ends in time, and a watch is silent.

        *If this fails:* bound the sending, the answer and the connecting of each call by what is left of its seconds.
        """
        abilities = visitor.abilities
        with visitor.watch("/a") if "watch" in abilities else contextlib.nullcontext() as watch:
            revision = visitor.put("/a", b"1")
            if watch is not None:
                watch.next(5)
            server.pause()
            calls: list[Callable[[], object]] = [
                lambda: visitor.get("/a", 0.5),
                lambda: visitor.put("/a", b"2", deadline=0.5),
                lambda: visitor.put("/a", bytes(self.large), deadline=0.5),
                lambda: visitor.list("/a", 0.5),
                lambda: visitor.wait("/c", 0.5),
            ]
            if "compare" in abilities:
                calls.append(lambda: visitor.put("/a", b"2", expected=revision, deadline=0.5))
            if "lease" in abilities:
                calls.append(lambda: visitor.lease(5, deadline=0.5))
            if "watch" in abilities:
                calls.append(lambda: visitor.watch("/b", deadline=0.5))
            for call in calls:
                started = time.monotonic()
                with pytest.raises(DeadlineExceeded):
                    call()
                assert time.monotonic() - started < LATEST
            if watch is not None:
                started = time.monotonic()
                assert [] == watch.next(0.5)
                assert time.monotonic() - started < LATEST_WATCH
            server.resume()
            assert visitor.get("/a", 10) is not None


def collect(watch: Any, count: int) -> list[Any]:
    """So many events of a watch."""
    events: list[Any] = []
    until = time.monotonic() + SLACK
    while len(events) < count and time.monotonic() < until:
        events += watch.next(until - time.monotonic())
    return events


@contextlib.contextmanager
def member(name: str, options: dict[str, object], key: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that puts its number under a key, with a lease that it keeps until it is killed."""
    command = [sys.executable, "-m", "tensorway.testing.rendezvous", name, json.dumps(options), key, str(TTL)]
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


def _member(name: str, options: str, key: str, ttl: str) -> None:
    import tensorway

    client = tensorway.create("rendezvous", name, json.loads(options))
    client.put(key, str(os.getpid()).encode(), lease=client.lease(float(ttl)))
    time.sleep(120)


if __name__ == "__main__":
    _member(*sys.argv[1:])
