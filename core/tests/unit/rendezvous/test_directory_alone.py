"""A member whose store is slow, refuses or has a defect, and what it leaves behind when that ends it."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from tensorway.errors import Closed, DeadlineExceeded, TensorwayError, Unauthenticated
from tensorway.rendezvous.directory import Directory
from tensorway.rendezvous.leases import keeper
from tensorway.rendezvous.records import Records
from tensorway.rendezvous.rendezvous import Rendezvous


class Store:
    """Records in this process. `before`, where it is set, is called with each call's name and what it was given."""

    name = "scripted"
    authenticates = True

    def __init__(self, *abilities):
        self.records, self.lock = Records(lambda event: None), threading.Lock()
        self.abilities = frozenset(abilities)
        self.before = lambda call, *given: None
        self.watches = 0

    def __getattr__(self, name):
        if name not in ("put", "get", "list", "delete", "grant", "keep", "revoke"):
            raise AttributeError(name)

        def call(*given):
            self.before(name, *given)
            given = given[:-1] + ((time.monotonic(),) if name in ("grant", "keep") else ())
            with self.lock:
                return getattr(self.records, name)(*given)

        return call

    def changes(self, prefix, seconds):
        self.watches += 1
        return SimpleNamespace(next=lambda seconds: time.sleep(min(max(0, seconds), 0.02)) or [], close=self.unwatch)

    def unwatch(self):
        self.watches -= 1

    def close(self):
        """Nothing to let go of."""


class Peer:
    """A connection."""

    lost = broken = ""


class End:
    """An endpoint whose connections are names only."""

    name = "local"

    def __init__(self, incarnation):
        self.incarnation = incarnation * 32
        self.made, self.dropped = [], []
        #: Where so many threads that connect meet.
        self.together = None

    def describe(self):
        return b"described"

    def connect(self, described, deadline):
        if self.together is not None:
            self.together.wait(30)
        peer = Peer()
        self.made.append(peer)
        return peer

    def disconnect(self, peer):
        self.dropped.append(peer)


def held(store):
    return [lease for lease, its in list(keeper()._leases.items()) if its is store]


def late(*_given):
    raise DeadlineExceeded("The store was asked.", "It did not answer.", "Wait.")


@pytest.fixture
def rendezvous():
    """Of a store without watches: what a member reads it reads when the test says so, or every half a second."""
    with Rendezvous(Store("lease")) as made:
        yield made


def test_nobody_keeps_the_lease_of_a_member_whose_goodbye_was_not_heard(rendezvous):
    store = rendezvous._store
    with Directory(rendezvous, End("a"), "x") as directory:
        directory.live()
        assert 1 == len(held(store))
        store.before = late
        directory.close(0.2)
        store.before = lambda *given: None
    assert [] == held(store)


def test_a_defect_of_a_store_does_not_end_the_thread_that_follows_the_group(rendezvous, caplog):
    def defective(call, *given):
        if call == "list":
            seen.set()
            raise ZeroDivisionError("a store's own")

    store, seen = rendezvous._store, threading.Event()
    with Directory(rendezvous, End("a"), "one") as one:
        store.before = defective
        assert seen.wait(30)
        store.before = lambda *given: None
        with Directory(rendezvous, End("b"), "two") as two:
            two.live()
            assert one.connect("two", 10)
            assert one._thread.is_alive()
    assert any("ZeroDivisionError" in record.getMessage() for record in caplog.records)


def test_a_group_below_is_another_group(rendezvous, caplog):
    mine, other = End("m"), End("o")
    with (
        Directory(rendezvous, mine, "me", "/g") as me,
        Directory(rendezvous, End("a"), "x", "/g") as x,
        Directory(rendezvous, other, "me", "/g/sub") as below,
    ):
        x.live()
        peer = me.connect("x", 10)
        below.live()
        with Directory(rendezvous, End("b"), "x", "/g/sub") as another:
            another.live()
            for each in (me, below):
                each._look()
            assert ({"x": "a" * 32}, "") == ({name: at.incarnation for name, at in me.members().items()}, peer.lost)
            assert {"x": "b" * 32} == {name: at.incarnation for name, at in below.members().items()}
        me._look()
        assert me.connect("x", 10) is peer and not mine.dropped
    assert [] == [record.getMessage() for record in caplog.records if "was read" in record.getMessage()]


def test_a_name_with_a_slash_is_one_of_its_own_group(rendezvous):
    with Directory(rendezvous, End("m"), "me", "/g") as me, Directory(rendezvous, End("a"), "host/0", "/g") as other:
        other.live()
        me._look()
        assert ["host/0"] == list(me.members())


def test_nothing_is_left_of_a_member_that_could_not_be_made():
    def refuses(call, *given):
        if call == "list":
            raise Unauthenticated("The group was to be read.", "It was refused.", "Ask for the secret.")

    store, before = Store("lease", "watch"), threading.active_count()
    store.before = refuses
    with Rendezvous(store) as rendezvous:
        with pytest.raises(Unauthenticated):
            Directory(rendezvous, End("a"), "x")
        assert ([], 0, 0) == (store.records.list("/default"), store.records.leases, store.watches)
        assert [] == held(store)
    assert threading.active_count() <= before + 1  # that of the leases, for as long as it takes it to see


def test_nothing_is_left_of_a_member_whose_thread_cannot_begin(rendezvous, monkeypatch):
    def refused(thread):
        if thread.name == "tensorway-directory":
            raise RuntimeError("can't start new thread")
        started(thread)

    started = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError):
        Directory(rendezvous, End("a"), "x")
    assert ([], []) == (rendezvous.list("/default"), held(rendezvous._store))


def test_who_enters_a_state_waits_for_another_thread_no_longer_than_they_said(rendezvous):
    def slow(call, *given):
        if call == "put":
            writing.set()
            assert release.wait(30)

    writing, release = threading.Event(), threading.Event()
    with Directory(rendezvous, End("a"), "x") as directory:
        rendezvous._store.before = slow
        other = threading.Thread(target=directory.live)
        other.start()
        try:
            assert writing.wait(30)
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded, match="Another thread"):
                directory.drain(0.1)
            assert time.monotonic() - began < 5
        finally:
            release.set()
            other.join(30)


def test_a_lease_that_comes_when_its_member_is_closed_is_kept_by_nobody(rendezvous, caplog):
    """Written anew by its thread, or by one that says that it is live, while the goodbye does not wait any longer."""

    def slow(call, *given):
        if call == "grant":
            asked.set()
            assert release.wait(30)

    asked, release, ends = threading.Event(), threading.Event(), []

    def live():
        try:
            directory.live()
        except TensorwayError as error:
            ends.append(error)

    store = rendezvous._store
    for use in (live, None):
        asked.clear()
        release.clear()
        directory = Directory(rendezvous, End("a"), "x")
        store.before = slow
        (lease,) = held(store)
        keeper().let_go(lease, "the store was restarted")
        other = directory._thread
        if use is not None:
            other = threading.Thread(target=use)
            other.start()
        assert asked.wait(30)
        directory.close(0.2)
        release.set()
        for thread in (other, directory._thread):  # which may have been about to write it anew, too
            thread.join(30)
            assert not thread.is_alive()
        assert [] == held(store)
        store.before = lambda *given: None
    assert [Closed] == [type(error) for error in ends]
    assert [] == [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert 0 == store.records.leases - 2, "those that were let go of behind the store's back"


def test_threads_that_connect_at_once_have_one_connection(rendezvous):
    mine = End("m")
    with Directory(rendezvous, mine, "me") as me, Directory(rendezvous, End("a"), "x") as other:
        other.live()
        found, together = [], threading.Barrier(4)
        me._look()
        mine.together = together

        def connect():
            found.append(me.connect("x", 40))

        threads = [threading.Thread(target=connect) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(30)
        mine.together = None
        assert [me.connect("x", 10)] * 4 == found
        assert 4 == len(mine.made) == 1 + len(mine.dropped) and found[0] not in mine.dropped
        found[0].lost = "the line was cut"
        assert me.connect("x", 10) is not found[0] and found[0] in mine.dropped


def test_a_store_of_a_parent_or_one_that_is_closed_is_not_asked_to_watch(monkeypatch):
    store = Store("watch")
    rendezvous = Rendezvous(store)
    monkeypatch.setattr(store, "changes", lambda prefix, seconds: pytest.fail("it was asked"))
    with monkeypatch.context() as patch:
        patch.setattr(rendezvous, "_pid", -1)
        with pytest.raises(Closed, match="forked"):
            rendezvous.wait("/k", 0.1)
    rendezvous.close()
    with pytest.raises(Closed):
        rendezvous.wait("/k", 0.1)


def test_who_waits_for_a_record_is_told_that_nobody_put_it_unless_the_store_never_answered(rendezvous):
    asked = []

    def later(call, *given):
        asked.append(call)
        if len(asked) > 1:
            late()

    rendezvous._store.before = later
    with pytest.raises(DeadlineExceeded, match="Nobody put it within 1 s"):
        rendezvous.wait("/k", 1.0)
    assert ["get", "get"] == asked
    rendezvous._store.before = late
    with pytest.raises(DeadlineExceeded, match="It did not answer"):
        rendezvous.wait("/k", 1.0)
    rendezvous._store.before = lambda *given: None
