"""Members of a group: found, compared, connected, missed; with real endpoints, and processes that are killed."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest

import tensorway
from tensorway.errors import Closed, DeadlineExceeded, Incompatible, PeerLost
from tensorway.rendezvous import members
from tensorway.rendezvous.directory import Directory
from tensorway.rendezvous.leases import Lease
from tensorway.rendezvous.negotiation import Fact
from tensorway.rendezvous.rendezvous import Rendezvous, Watch
from tensorway.testing.servers import free_port
from tensorway.testing.waiting import eventually
from tensorway.transport import BlockTable, Endpoint, Peer
from tensorway.transport.local import LocalFabric

SECRET = "a secret of the tests"


@pytest.fixture
def service():
    with tensorway.create("rendezvous", "direct", {"secret": SECRET, "port": free_port()}) as rendezvous:
        yield rendezvous


@pytest.fixture
def join(service):
    """Join a group with an endpoint of its own; what it registered is `memory`."""
    with contextlib.ExitStack() as stack:

        def joined(name, facts=None, live=True, ttl=30.0):
            endpoint = stack.enter_context(Endpoint(LocalFabric(), name))
            options = {"address": service.address, "secret": SECRET}
            rendezvous = stack.enter_context(tensorway.create("rendezvous", "direct", options))
            endpoint.memory = bytearray(b"%-64s" % name.encode())
            endpoint.register(endpoint.memory)
            directory = stack.enter_context(Directory(rendezvous, endpoint, name, facts=facts, ttl=ttl))
            directory.endpoint = endpoint
            if live:
                directory.live()
            return directory

        yield joined


def read(directory, peer):
    """The 64 bytes that the peer registered, read over the transport."""
    mine = bytearray(64)
    registration = directory.endpoint.register(mine)
    here, there = registration.regions[0], peer.regions[0]
    tables = (BlockTable((region.address,), 64, 64, 1) for region in (here, there))
    directory.endpoint.read(directory.endpoint.prepare(peer, *tables), [0], [0]).wait()
    return bytes(mine).split()[0]


def test_members_find_each_other_and_move_bytes(join):
    one, two = join("one"), join("two")
    assert read(one, one.connect("two", 5)) == b"two"
    assert read(two, two.connect("one", 5)) == b"one"
    assert one.connect("two", 5) is one.connect("two", 5)


def test_a_peer_that_its_transport_has_lost_is_connected_to_anew(join):
    one = join("one")
    join("two")
    broken = one.connect("two", 5)
    broken.link.channel.shutdown(socket.SHUT_RDWR)  # as a cut does, with both members there
    peer = one.connect("two", 5)
    assert (peer is broken, bool(broken.lost), peer.lost) == (False, True, "")
    assert [peer] == one.endpoint._peers
    assert read(one, peer) == b"two"


def test_many_are_connected_at_once(join):
    names = [f"m{index}" for index in range(12)]
    directories = [join(name) for name in names]
    eventually(lambda: [member.state for member in directories[0].members().values()] == ["live"] * 11)
    peers = directories[0].connect_all(deadline=10)
    assert sorted(peers) == sorted(names[1:])
    assert {read(directories[0], peer) for peer in peers.values()} == {name.encode() for name in names[1:]}


def test_one_that_cannot_be_reached_hurts_no_other(join):
    one, _ = join("one"), join("two")
    result = one.connect_all(["two", "never"], deadline=3)
    assert isinstance(result["two"], Peer)
    assert isinstance(result["never"], DeadlineExceeded)
    assert "unknown, not live" in str(result["never"])


def test_a_member_that_is_joining_is_waited_for(join):
    one, two = join("one"), join("two", live=False)
    eventually(lambda: "two" in one.members())
    with pytest.raises(DeadlineExceeded, match="It is joining, not live"):
        one.connect("two", 0.3)
    two.live()
    assert one.connect("two", 5).name == "two"


def test_what_is_registered_later_is_seen_after_live(join):
    one, two = join("one"), join("two")
    first = one.connect("two", 5)
    two.endpoint.register(bytearray(128))
    two.live()
    assert eventually(lambda: len(one.connect("two", 5).regions) == 2)
    assert read(one, first) == b"two"


def test_a_draining_member_gets_nothing_new(join):
    one, two = join("one"), join("two")
    peer = one.connect("two", 5)
    two.drain()
    eventually(lambda: one.members()["two"].state == "draining")
    with pytest.raises(PeerLost, match="draining"):
        one.connect("two", 5)
    assert read(one, peer) == b"two"


def test_a_goodbye_is_heard_at_once(join):
    one, two = join("one"), join("two")
    peer = one.connect("two", 5)
    two.close()
    two.close()
    eventually(lambda: "two" not in one.members(), 3)
    eventually(lambda: peer.lost == "it said goodbye", 3)  # a moment after it is no member any more
    with pytest.raises(Closed):
        two.live()


def test_facts_that_differ_are_told(join):
    facts = {"block_bytes": Fact(4096), "ranks": Fact(4, "divide"), "version": Fact("1", "inform")}
    one = join("one", facts)
    join("two", {"block_bytes": Fact(8192), "ranks": Fact(8, "divide"), "version": Fact("2", "inform")})
    with pytest.raises(Incompatible) as caught:
        one.connect("two", 5)
    assert "1 facts do not fit. block_bytes: 4096 here, 8192 there (must be equal)." in str(caught.value)


def test_the_older_of_two_of_one_name_gives_way_and_is_told(join):
    first, other = join("twin"), join("other")
    peer = other.connect("twin", 5)
    second = join("twin")
    eventually(lambda: peer.lost)
    assert "replaced" in peer.lost
    with pytest.raises(Closed, match="another process joined as twin"):
        eventually(lambda: first.members() is None)
    assert read(other, other.connect("twin", 5)) == b"twin"
    assert second.members()


def test_a_late_goodbye_of_one_of_the_same_name_ends_nobody(join, service):
    one, two = join("one"), join("two")
    peer = one.connect("two", 5)
    written = service.get("/default/two")
    service.put("/default/two", members.encode("two", "0" * 32, "gone", {}, b""))
    eventually(lambda: service.get("/default/two").value == written.value)
    assert one.connect("two", 5) is peer and not peer.lost
    assert two.members()


def test_a_group_is_told_little_of_a_member_and_who_connects_reads_the_rest(join, service):
    """Else all of a thousand are told what one of them connects with."""
    one = join("one")
    with service.watch("/default/") as watch:
        two = join("two")
        two.many = bytearray(1 << 20)
        for at in range(0, 1 << 20, 1 << 12):
            two.endpoint.register(memoryview(two.many)[at : at + 100])
        two.live()
        eventually(lambda: "two" in one.members())
        eventually(lambda: one.members()["two"].described == members.digest(two.endpoint.describe()))
        told = watch.next(1)
    described = two.endpoint.describe()
    assert told and len(described) > 2000
    assert max(len(event.record.value) for event in told) < 400
    assert described == service.get("/default~/two").value
    assert read(one, one.connect("two", 5)) == b"two"
    two.close()
    assert [] == service.list("/default~/two")


def test_a_description_that_is_of_another_moment_than_the_member_is_read_again(join, service):
    one, _ = join("one"), join("two")
    eventually(lambda: "two" in one.members())
    described = service.get("/default~/two").value
    service.put("/default~/two", described + b"?")
    with pytest.raises(DeadlineExceeded, match="what it described itself with is replaced"):
        one.connect("two", 3)
    service.delete("/default~/two")
    with pytest.raises(DeadlineExceeded, match="it describes itself with nothing"):
        one.connect("two", 3)
    healing = threading.Timer(0.3, service.put, ("/default~/two", described))
    healing.start()
    assert read(one, one.connect("two", 5)) == b"two"
    healing.join()


def test_a_try_that_is_cut_short_hides_no_reason(join, service, monkeypatch):
    one, _ = join("one"), join("two")
    eventually(lambda: "two" in one.members())
    service.delete("/default~/two")
    asked, answered = [], 1

    def slow(key, seconds):
        asked.append(key)
        if len(asked) > answered:
            time.sleep(max(0.0, seconds))
            raise DeadlineExceeded("What two says was to be read.", "Cut short.", "-")

    monkeypatch.setattr(one._rendezvous, "get", slow)
    with pytest.raises(DeadlineExceeded, match="it describes itself with nothing"):
        one.connect("two", 2)
    assert len(asked) == 2
    asked, answered = [], 0
    with pytest.raises(DeadlineExceeded, match="Cut short"):
        one.connect("two", 1)
    assert len(asked) == 1


def test_what_is_no_member_is_passed_over(join, service):
    one = join("one")
    service.put("/default/garbage", b"\xff" * 100)
    service.put("/default/wrong", members.encode("else", "1", "live", {}, b""))
    join("two")
    assert one.connect("two", 5).name == "two"
    assert sorted(one.members()) == ["two"]


MEMBER = """
    import sys, time, tensorway
    from tensorway.rendezvous.directory import Directory
    from tensorway.transport import Endpoint
    from tensorway.transport.local import LocalFabric
    address, secret = sys.argv[1:]
    endpoint = Endpoint(LocalFabric(), "killed")
    memory = bytearray(b"killed".ljust(64))
    endpoint.register(memory)
    rendezvous = tensorway.create("rendezvous", "direct", {"address": address, "secret": secret})
    Directory(rendezvous, endpoint, "killed", ttl=1.0).live()
    print("live", flush=True)
    time.sleep(100)
"""


def test_a_group_that_could_not_be_read_in_time_is_read_later(join, monkeypatch):
    one = join("one")
    listed, late = Rendezvous.list, []

    def busy(self, prefix, deadline=5.0):
        if len(late) < 2:
            late.append(prefix)
            raise DeadlineExceeded("The group was to be read.", "No answer came.", "Wait.")
        return listed(self, prefix, deadline)

    monkeypatch.setattr(Rendezvous, "list", busy)
    two = join("two")
    assert two.connect("one", 10).name == "one"
    assert len(late) == 2
    # And the same after changes that were missed.
    del late[0]
    one._watch._changes.reset()
    with one._lock:
        one._others.clear()
    assert one.connect("two", 10).name == "two"
    assert len(late) == 2


def test_what_a_large_group_is_told_one_by_one_is_taken_together(join, service, monkeypatch):
    """Else each of a thousand that join wakes a thousand."""
    turns = []
    told = Watch.next

    def counted(watch, seconds):
        events = told(watch, seconds)
        turns.extend([len(events)] if events else [])
        return events

    one = join("one")
    described = members.digest(one.endpoint.describe())
    prefix = one._prefix

    def more(begin, count):
        for number in range(begin, begin + count):
            name = f"m{number}"
            service.put(f"{prefix}{name}", members.encode(name, f"life-{number}", "live", {}, described))

    more(0, 200)
    eventually(lambda: len(one.members()) == 200)
    monkeypatch.setattr(Watch, "next", counted)
    more(200, 200)
    eventually(lambda: len(one.members()) == 400)
    assert 50 > len(turns), turns


def test_a_member_that_is_killed_is_missed_by_its_lease(join, service):
    one = join("one")
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(MEMBER), service.address, SECRET], stdout=subprocess.PIPE
    )
    try:
        peer = one.connect("killed", 30)
        assert read(one, peer) == b"killed"
        process.kill()
        eventually(lambda: peer.lost, 5)
        eventually(lambda: "killed" not in one.members(), 5)
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def test_members_survive_a_rendezvous_that_is_restarted(join, service):
    one, two = join("one", ttl=10.0), join("two", ttl=10.0)
    peer = one.connect("two", 5)
    port = int(service.address.rpartition(":")[2])
    service.close()
    time.sleep(0.5)
    assert read(one, peer) == b"two"  # nobody needs it for what is connected
    with tensorway.create("rendezvous", "direct", {"secret": SECRET, "port": port}) as again:
        eventually(lambda: [record.key for record in again.list("/default/")] == ["/default/one", "/default/two"], 15)
        assert not peer.lost
        assert read(one, one.connect("two", 5)) == b"two"
        join("three")
        assert read(one, one.connect("three", 5)) == b"three"
        two.close()
        eventually(lambda: peer.lost == "it said goodbye", 5)


def test_a_member_is_written_again_at_once_and_not_when_it_would_have_kept_its_lease(join, service):
    directory = join("a", ttl=120)
    watcher = join("b", ttl=120)
    eventually(lambda: "b" in directory.members() and "a" in watcher.members())
    port = int(service.address.rpartition(":")[2])
    service.close()
    with tensorway.create("rendezvous", "direct", {"secret": SECRET, "port": port}) as again:
        # A third of the lease's time, 40 s, may pass before it is kept.
        assert again.wait("/default/a", 20).lease
        assert again.wait("/default/b", 20).lease


def test_leases_that_begin_together_are_kept_at_moments_of_their_own():
    dues = [Lease("x", 9.0, 0.0)._due for _ in range(300)]
    assert 0 <= min(dues) < 0.5 and 2.5 < max(dues) <= 3.0
