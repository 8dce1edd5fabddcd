"""The transport over the real NIXL: the kit's suite over both lanes, and what the suite does not know of NIXL."""

from __future__ import annotations

import base64
import gc
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from array import array
from pathlib import Path

import msgspec
import pytest

import tensorway
from tensorway.errors import DeadlineExceeded, DescriptionInvalid, PeerLost, TransferFailed, Unsupported
from tensorway.memory import Region
from tensorway.process import resident_bytes
from tensorway.testing import PeerProcess, TransportSuite
from tensorway.testing.peer import content, digest
from tensorway.testing.transports import BLOCK, COUNT, NBYTES, route_to
from tensorway.testing.waiting import eventually
from tensorway.transport import BlockTable
from tensorway.transport import description as envelope
from tensorway_nixl import fabric, wire
from tensorway_nixl.links import Job, Remote

pytestmark = pytest.mark.usefixtures("real_nixl")

TCP = {"ucx_tls": ("tcp",)}
#: Much more than what the sockets of a connection hold, so that a transfer with a stopped peer is under way for sure.
LARGE = 32 << 20


class TestOverSharedMemory(TransportSuite):
    name = "nixl"


class TestOverTcp(TransportSuite):
    name = "nixl"
    options = TCP


class TestOverTcpInParts(TransportSuite):
    """The same where every block is long enough to be cut, and no two parts are joined."""

    name = "nixl"
    options = TCP

    @pytest.fixture(autouse=True)
    def _cut(self, monkeypatch):
        monkeypatch.setattr("tensorway_nixl.tables._LONGEST", 100)
        monkeypatch.setattr("tensorway_nixl.tables._APART", 1)


@pytest.fixture
def start():
    """Endpoints here and in other processes, all closed in the end."""
    started = []

    def make(kind, **options):
        one = PeerProcess("nixl", options) if kind == "peer" else tensorway.create("transport", "nixl", options)
        started.append(one)
        return one

    yield make
    for one in reversed(started):
        one.close()


@pytest.fixture
def pair(start):
    """An endpoint here, a peer with memory, its description."""
    here, peer = start("here"), start("peer")
    peer.register(NBYTES, seed=1)
    return here, peer, peer.describe()


def altered(description, **changed):
    """The description with something else in the fabric's part."""
    seen = envelope.decode(description, "nixl")
    blob = msgspec.structs.replace(msgspec.msgpack.decode(seen.blob, type=wire.Blob), **changed)
    parts = (seen.transport, seen.name, seen.incarnation, seen.regions, wire.encode(blob))
    return envelope.encode(type(seen)(*parts))


def blob_of(description):
    return msgspec.msgpack.decode(envelope.decode(description, "nixl").blob, type=wire.Blob)


def large(here, peer):
    """A route over much memory, its buffer and its number of blocks."""
    peer.register(LARGE, seed=3)
    mine = bytearray(LARGE)
    region = here.register(mine).regions[0]
    other = here.connect(peer.describe())
    local, remote = BlockTable.over(region, 1 << 16), BlockTable.over(other.regions[-1], 1 << 16)
    return here.prepare(other, local, remote), mine, local.count


def resident():
    gc.collect()
    return resident_bytes()


# -- lanes


@pytest.mark.parametrize(("options", "lane"), [({}, "cma"), (TCP, "tcp"), ({"ucx_tls": ("cma", "tcp")}, "cma")])
def test_the_lane_is_the_one_that_bytes_take(start, caplog, options, lane):
    here, peer = start("here", **options), start("peer", **options)

    with caplog.at_level(logging.WARNING, "tensorway.nixl"):
        assert lane == here.connect(peer.describe()).lane

    assert [] == caplog.messages


@pytest.mark.parametrize(
    ("microseconds", "at_once", "same_host", "rdma", "lane"),
    [
        (0, True, True, False, "cma"),
        (0, False, True, False, "cma"),  # late, because the machine is busy
        (13, True, True, False, "tcp"),  # quick, because the peer is
        (13, True, False, False, "tcp"),
        (1, False, False, True, "rdma"),
        (1, False, True, True, "rdma"),
        (0, True, True, True, "cma"),
    ],
)
def test_the_lane_is_told_by_what_ucx_expects_and_not_by_the_clock(
    monkeypatch, microseconds, at_once, same_host, rdma, lane
):
    monkeypatch.setattr(Path, "is_dir", lambda _path: rdma)
    monkeypatch.setattr(Path, "iterdir", lambda _path: iter([Path("mlx5_0")]))
    canary = Job(Remote("a", "b"), "asked", None, None, microseconds=microseconds, at_once=at_once)

    assert lane == fabric._lane(canary, same_host)


def test_a_fall_back_to_tcp_that_nobody_asked_for_is_said_once(start, caplog):
    here, peer = start("here"), start("peer", **TCP)

    with caplog.at_level(logging.WARNING, "tensorway.nixl"):
        assert {"tcp"} == {here.connect(peer.describe()).lane for _ in range(2)}

    (line,) = caplog.messages
    assert "on this host by TCP" in line


# -- descriptions


def test_another_version_is_refused_before_nixl_sees_its_metadata(pair):
    here, _, description = pair
    other = altered(description, nixl="1.3.2", ucx="1.21.0")

    with pytest.raises(DescriptionInvalid, match=r"NIXL 1\.3\.2 with UCX 1\.21\.0 .* NIXL 1\.5\.1 with UCX 1\.23\.0"):
        here.connect(other)

    # Had NIXL seen it, it would know the agent now.
    assert {} == here._fabric._remotes == here._fabric._poisoned
    here.connect(description)


def test_metadata_that_nixl_cannot_read_is_refused_for_good_and_said_so(pair, start):
    here, _, description = pair
    damaged = altered(description, metadata=blob_of(description).metadata[:-40])

    with pytest.raises(DescriptionInvalid, match="NIXL cannot read its metadata"):
        here.connect(damaged)
    # NIXL would answer the true one with "invalid parameter", for ever.
    with pytest.raises(DescriptionInvalid, match="no other for this incarnation"):
        here.connect(description)

    start("here").connect(description)


def test_of_metadata_that_nixl_cannot_read_only_the_last_is_remembered_and_all_stays_refused(pair, start, monkeypatch):
    here, _, description = pair
    monkeypatch.setattr(fabric, "_MAX_POISONED", 1)
    with pytest.raises(DescriptionInvalid, match="NIXL cannot read its metadata"):
        here.connect(altered(description, metadata=blob_of(description).metadata[:-40]))
    second = start("peer").describe()
    with pytest.raises(DescriptionInvalid, match="NIXL cannot read its metadata"):
        here.connect(altered(second, metadata=blob_of(second).metadata[:-40]))
    assert 1 == len(here._fabric._poisoned)

    with pytest.raises(DescriptionInvalid, match="NIXL cannot read its metadata"):
        here.connect(description)


def test_what_a_peer_registers_later_is_reached_by_its_next_description(pair):
    here, peer, description = pair
    first, mine = here.connect(description), bytearray(NBYTES)
    route = route_to(here, first, mine)
    peer.register(NBYTES, seed=9)
    region, later = here.register(more := bytearray(NBYTES)).regions[0], here.connect(peer.describe())

    new = here.prepare(later, BlockTable.over(region, BLOCK), BlockTable.over(later.regions[1], BLOCK))
    here.read(new, range(COUNT), range(COUNT)).wait()
    here.read(route, range(COUNT), range(COUNT)).wait()

    assert [digest(content(9, NBYTES)), digest(content(1, NBYTES))] == [digest(more), digest(mine)]
    here.disconnect(first)
    here.read(new, [0], [0]).wait()
    here.disconnect(later)
    assert [(0, 0)] == [(remote.links, remote.jobs) for remote in here._fabric._remotes.values()]


# -- the canary


@pytest.mark.parametrize(("options", "most", "unit"), [({}, 1 << 19, 1), (TCP, 1 << 21, 1 << 16)], ids=["cma", "tcp"])
def test_a_region_is_found_whatever_was_registered_before_where_it_lies_and_a_part_of_it_may_not_be(
    start, options, most, unit
):
    """NIXL keeps what a description said, also of memory that has gone since; so does everybody who connects again.

    Over TCP most of these blocks would be cut, and then each part is a part of a region.
    """
    here, there = start("here", **options), start("there", **options)
    memory, mine = bytearray(b"x" * (2 * most)), bytearray(2 * most)
    base, target = Region.of(memory), here.register(mine).regions[0]

    def read(start_at, nbytes):
        peer = here.connect(there.describe(), 10)
        tables = (BlockTable((address,), nbytes, nbytes, 1) for address in (target.address, base.address + start_at))
        here.read(here.prepare(peer, *tables), [0], [0], deadline=10).wait()
        here.disconnect(peer)

    rng = random.Random(7)
    for _ in range(40):
        start_at, nbytes = rng.randrange(most), unit * rng.randrange(1, most // unit)
        mine[:nbytes] = bytes(nbytes)
        with there.register(Region(base.address + start_at, nbytes, owner=memory)):
            read(start_at, nbytes)
        assert mine[:nbytes] == memory[:nbytes]

    def read_all_of_it():
        for start_at in range(1, 2 * most, most >> 7):
            read(start_at, 1000)

    with there.register(memory), pytest.raises(TransferFailed, match="a region that has gone since began inside of it"):
        read_all_of_it()


def test_a_canary_that_is_not_registered_fails_and_leaves_nothing(pair):
    here, _, description = pair

    with pytest.raises(TransferFailed, match=r"NIXL_ERR_NOT_FOUND.*not registered"):
        here.connect(altered(description, canary=blob_of(description).canary + (1 << 30)))

    assert {} == here._fabric._remotes
    assert 63 == len(here._fabric._slots)
    here.connect(description)


def test_a_canary_that_sings_another_song_is_another_process(pair):
    here, peer, description = pair
    elsewhere = envelope.decode(description, "nixl").regions[0].address

    with pytest.raises(PeerLost, match="taken its place"):
        here.connect(altered(description, canary=elsewhere))

    assert {} == here._fabric._remotes
    here.connect(peer.describe())


def test_a_stopped_peer_costs_its_deadline_and_is_reached_when_it_goes_on(pair):
    here, peer, description = pair
    peer.signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            here.connect(description, deadline=0.5)
        assert time.monotonic() - started < 2
    finally:
        peer.signal(signal.SIGCONT)
    here.connect(description)
    assert eventually(lambda: here._fabric._sweep() or 63 == len(here._fabric._slots))


def test_a_killed_peer_is_not_connected_to(pair):
    here, peer, description = pair
    peer.signal(signal.SIGKILL)

    with pytest.raises(PeerLost, match="cannot connect"):
        here.connect(description, deadline=3)
    assert {} == here._fabric._remotes == here._fabric._poisoned


def test_a_connection_that_broke_is_replaced_by_the_next_connect(pair):
    here, _, description = pair
    first = here.connect(description)
    route = route_to(here, first, bytearray(NBYTES))
    first.link.remote.lost = "its connection broke"

    with pytest.raises(PeerLost):
        here.read(route, [0], [0]).wait()
    again = route_to(here, here.connect(description), mine := bytearray(NBYTES))
    here.read(again, range(COUNT), range(COUNT)).wait()

    assert digest(content(1, NBYTES)) == digest(mine)


# -- what NIXL goes on doing


def test_a_transfer_that_came_too_late_keeps_its_memory_until_nixl_is_through(start):
    here, peer = start("here", **TCP), start("peer", **TCP)
    route, mine, count = large(here, peer)
    peer.signal(signal.SIGSTOP)
    try:
        transfer = here.read(route, range(count), range(count), deadline=0.3)
        with pytest.raises(DeadlineExceeded):
            transfer.wait()
        time.sleep(0.3)
        assert not transfer.released
    finally:
        peer.signal(signal.SIGCONT)
    eventually(lambda: transfer.released)
    mine[:] = bytes(LARGE)
    time.sleep(0.3)
    assert mine.count(0) == LARGE


def test_a_peer_that_is_disconnected_meanwhile_stays_until_nixl_is_through(start):
    here, peer = start("here", **TCP), start("peer", **TCP)
    route, _, count = large(here, peer)
    peer.signal(signal.SIGSTOP)
    try:
        transfer = here.read(route, range(count), range(count))
        here.disconnect(route.peer)
        with pytest.raises(PeerLost, match="disconnected here"):
            transfer.wait()
        assert [route.peer.incarnation] == list(here._fabric._remotes)
        assert not transfer.released
    finally:
        peer.signal(signal.SIGCONT)
    eventually(lambda: transfer.released)
    eventually(lambda: [(0, 0)] == [(remote.links, remote.jobs) for remote in here._fabric._remotes.values()])


def test_a_peer_killed_in_the_middle_of_a_tcp_transfer_is_lost_and_nobody_else(start):
    here, peer, other = start("here", **TCP), start("peer", **TCP), start("peer", **TCP)
    route, mine, count = large(here, peer)
    other.register(NBYTES, seed=1)
    alive = route_to(here, here.connect(other.describe()), small := bytearray(NBYTES))
    peer.signal(signal.SIGSTOP)
    transfer = here.read(route, range(count), range(count), deadline=5)
    assert transfer.pending
    peer.signal(signal.SIGKILL)

    with pytest.raises((PeerLost, DeadlineExceeded), match=route.peer.name):
        transfer.wait()
    eventually(lambda: transfer.released)
    mine[:] = bytes(LARGE)
    here.read(alive, range(COUNT), range(COUNT)).wait()

    assert digest(content(1, NBYTES)) == digest(small)
    assert mine.count(0) == LARGE


def test_closing_with_something_in_flight_keeps_the_agent_and_spares_the_peer(start, caplog):
    here, peer = start("here", **TCP), start("peer", **TCP)
    route, _, count = large(here, peer)
    peer.signal(signal.SIGSTOP)
    here.read(route, range(count), range(count))

    here.close(deadline=0.2)

    assert here._fabric._agent.native is not None
    assert any("its agent stays until this process ends" in line for line in caplog.messages)
    peer.signal(signal.SIGCONT)
    assert peer.pid == peer.ask("ping")


LEAVING = """
import atexit, base64, sys
from array import array
# Registered first, so that it runs last: what is under way then, and whether the agent is never destroyed (whoever
# holds the busy ones has let go of it by then).
atexit.register(lambda: print(len(agent.jobs), sys.getrefcount(agent) >= before))
import tensorway
from tensorway.transport import BlockTable
from tensorway_nixl import jobs
jobs._DRAIN = float(sys.argv[3])
here = tensorway.create("transport", "nixl", {"ucx_tls": ["tcp"]})
mine = bytearray(int(sys.argv[2]))
region = here.register(mine).regions[0]
peer = here.connect(base64.b64decode(sys.argv[1]))
route = here.prepare(peer, BlockTable.over(region, 1 << 16), BlockTable.over(peer.regions[0], 1 << 16))
ids = array("q", range(route.local.count))
print("ready", flush=True)
sys.stdin.readline()
# Not by the endpoint, whose thread would keep the agent from being destroyed, by chance.
posted = [here._fabric.post("read", route.prepared, ids, ids, 5) for _ in range(4)]
print(posted[-1].handle is not None, flush=True)
agent = here._fabric._agent
before = sys.getrefcount(agent)
"""


@pytest.fixture
def leaving(start):
    """A peer that is stopped, and a process that reads from it and has come to its end."""
    peer, processes = start("peer", **TCP), []
    peer.register(LARGE, seed=3)

    def make(seconds):
        command = [sys.executable, "-c", LEAVING, base64.b64encode(peer.describe()).decode(), str(LARGE), str(seconds)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert "ready\n" == process.stdout.readline()
        peer.signal(signal.SIGSTOP)
        process.stdin.write("\n")
        process.stdin.flush()
        assert "True\n" == process.stdout.readline()
        return peer, process

    yield make
    for process in processes:
        process.kill()
        process.communicate()


def test_a_process_that_ends_in_the_middle_of_a_transfer_waits_for_it_and_spares_the_peer(leaving):
    for _ in range(3):
        peer, process = leaving(50)
        time.sleep(0.3)
        assert process.poll() is None
        peer.signal(signal.SIGCONT)

        # Without the wait the peer aborts here, every time: UCX cannot send its answer, and takes that for fatal.
        assert ("0 True\n", None) == process.communicate(timeout=50)
        assert 0 == process.returncode
        assert peer.pid == peer.ask("ping")


def test_a_process_that_ends_does_not_wait_for_a_stopped_peer_for_ever(leaving):
    _, process = leaving(0.3)

    assert ("4 True\n", None) == process.communicate(timeout=10)
    assert 0 == process.returncode


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.parametrize("end", ["killed", "ends"])
def test_a_peer_that_goes_away_in_the_middle_of_a_transfer_spares_this_process(start, operation, end):
    here, peer = start("here", **TCP), start("peer", **TCP)
    route, _, count = large(here, peer)
    peer.signal(signal.SIGSTOP)
    transfers = [getattr(here, operation)(route, range(count), range(count), deadline=20) for _ in range(4)]
    if end == "ends":
        peer._process.stdin.close()  # and it ends by itself when it has read that
        peer.signal(signal.SIGCONT)
    else:
        peer.signal(signal.SIGKILL)

    for transfer in transfers:
        eventually(lambda transfer=transfer: not transfer.pending, 25)
        assert transfer.error is None or isinstance(transfer.error, PeerLost)
    assert (0 if end == "ends" else -signal.SIGKILL) == peer._process.wait(20)


def test_nothing_is_started_when_the_process_is_ending(pair):
    here, _, description = pair
    route = route_to(here, here.connect(description), bytearray(NBYTES))
    here._fabric._jobs.drain()

    with pytest.raises(TransferFailed, match="This process is ending"):
        here.read(route, [0], [0]).wait()


# -- peers that nobody talks to


@pytest.mark.parametrize("options", [{}, TCP], ids=["cma", "tcp"])
def test_a_peer_that_is_killed_while_nobody_talks_to_it_is_noticed(start, options):
    here, peer, other = start("here", **options), start("peer", **options), start("peer", **options)
    gone, there = (here.connect(one.describe()) for one in (peer, other))
    time.sleep(2.5)
    assert ["", ""] == [here._fabric.lost(one.link) for one in (gone, there)]
    peer.signal(signal.SIGKILL)

    eventually(lambda: here._fabric.lost(gone.link), 5)

    with pytest.raises(PeerLost, match="its connection broke"):
        here.notify(gone, b"x")
    time.sleep(1.5)
    assert "" == here._fabric.lost(there.link)
    here.disconnect(gone)
    assert eventually(lambda: [there.incarnation] == list(here._fabric._remotes))


def test_a_peer_that_is_stopped_for_a_while_is_not_lost_by_that(start):
    here, peer = start("here", **TCP), start("peer", **TCP)
    other = here.connect(peer.describe())
    peer.signal(signal.SIGSTOP)
    time.sleep(2.5)
    assert "" == here._fabric.lost(other.link)
    peer.signal(signal.SIGCONT)
    time.sleep(1.5)
    assert [] == here.notifications()  # nor does a heartbeat reach anybody
    assert "" == here._fabric.lost(other.link)


# -- notifications that nobody fetches


def test_notifications_that_nobody_fetches_are_taken_out_of_nixl(start):
    here, peer = start("here"), start("peer")
    peer.connect(here.describe())
    peer.notify(b"x", 100)
    assert eventually(lambda: 100 == len(here._fabric._inbox._waiting))

    peer.notify(b"y")

    assert [b"x"] * 100 == [note.payload for note in here.notifications()[:100]]


def test_what_does_not_fit_is_dropped_and_told_of_once(start, monkeypatch):
    monkeypatch.setattr("tensorway_nixl.inbox.MAX_MESSAGES", 10)
    here, peer, other = start("here"), start("peer"), start("peer")
    for one, times in ((peer, 25), (other, 5)):
        one.connect(here.describe())
        one.notify(b"x", times)
    eventually(lambda: sum(row.messages + row.dropped for row in here._fabric._inbox._senders.values()) == 30)
    peer.notify(b"late")  # behind a gap

    eventually(lambda: sum(row.dropped for row in here._fabric._inbox._senders.values()) == 16)
    assert [b"x"] * 15 == [note.payload for note in here.notifications()]
    with pytest.raises(TransferFailed, match="16 that did not fit were dropped"):
        here.notifications()
    assert [] == here.notifications()
    peer.notify(b"again")
    assert [b"again"] == [note.payload for note in eventually(here.notifications)]


# -- what is left behind


@pytest.mark.parametrize("options", [{}, TCP], ids=["cma", "tcp"])
def test_connecting_and_disconnecting_again_and_again_leaves_no_socket(start, options):
    def files():
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in ("self", peer.pid)]

    here, peer = start("here", **options), start("peer", **options)
    for _ in range(3):
        here.disconnect(here.connect(peer.describe()))
    before = files()
    for _ in range(30):
        here.disconnect(here.connect(peer.describe()))
    eventually(lambda: all(now <= then for now, then in zip(files(), before, strict=True)))


def test_connections_that_nobody_uses_are_kept_up_to_a_number(start, monkeypatch):
    monkeypatch.setattr(fabric, "_MAX_KEPT", 1)
    here, peers = start("here"), [start("peer") for _ in range(3)]
    for peer in peers:
        here.disconnect(here.connect(peer.describe()))
    assert eventually(lambda: 1 == len(here._fabric._remotes))
    here.connect(peers[0].describe())


def test_routes_that_are_forgotten_release_their_lists(pair):
    here, _, description = pair
    other = here.connect(description)
    mine = here.register(bytearray(NBYTES)).regions[0]
    tables = BlockTable.over(mine, 64), BlockTable.over(other.regions[0], 64)

    def prepare(times):
        for _ in range(times):
            here.prepare(other, *tables)
        return resident()

    route = here.prepare(other, *tables)
    before = prepare(200)
    assert prepare(2000) - before < 8 << 20
    assert {route.prepared.lists.ours.handle, route.prepared.lists.theirs.handle} == here._fabric._agent.lists


@pytest.mark.parametrize("options", [{}, TCP], ids=["cma", "tcp"])
def test_thousands_of_transfers_leave_the_memory_as_it_was(start, options):
    here, peer = start("here", **options), start("peer", **options)
    peer.register(NBYTES, seed=1)
    route = route_to(here, here.connect(peer.describe()), bytearray(NBYTES))

    def read(times):
        for _ in range(times):
            here.read(route, range(COUNT), range(COUNT - 1, -1, -1)).wait()
        return resident()

    before = read(500)
    assert read(3000) - before < 4 << 20
    here.poll()
    assert set() == here._fabric._agent.jobs


def test_memory_that_is_registered_twice_is_deregistered_twice_and_no_more(pair):
    here, _, description = pair
    mine = bytearray(NBYTES)
    route = route_to(here, here.connect(description), mine)
    second = here.register(mine)
    before = len(here._fabric._agent.regions)
    for _ in range(2):
        second.close()
    assert before - 1 == len(here._fabric._agent.regions)
    here.read(route, range(COUNT), range(COUNT)).wait()
    assert digest(content(1, NBYTES)) == digest(mine)
    here.close()
    assert {} == here._fabric._agent.regions


def test_a_route_over_memory_that_was_registered_anew_uses_the_new_registration(pair):
    here, _, description = pair
    mine = bytearray(NBYTES)
    route = route_to(here, here.connect(description), mine)
    (registration,) = here._registrations
    # The old one's memory is freed in NIXL; a list that still points there breaks the connection, at best.
    registration.close()
    here.register(mine)

    here.read(route, range(COUNT), range(COUNT)).wait()

    assert digest(content(1, NBYTES)) == digest(mine)


def test_memory_of_a_device_that_is_not_here_is_refused(start):
    here = start("here")
    with pytest.raises(Unsupported, match="no backend here"):
        here.register(Region(1 << 20, 4096, "cuda:0"))


def test_a_nixl_without_strided_lists_keeps_within_its_limit(pair, monkeypatch):
    here, _, description = pair
    agent = here._fabric._agent
    agent._strided = False
    route = route_to(here, here.connect(description), mine := bytearray(NBYTES))
    here.read(route, range(COUNT), range(COUNT)).wait()
    assert digest(content(1, NBYTES)) == digest(mine)

    monkeypatch.setattr("tensorway_nixl.fabric._MAX_EXPANDED", COUNT - 1)
    with pytest.raises(Unsupported, match=r"1\.5\.1 or newer"):
        here.prepare(route.peer, route.local, route.remote)
    assert {route.prepared.lists.ours.handle, route.prepared.lists.theirs.handle} == agent.lists


def test_a_table_that_32_bits_cannot_index_is_refused(pair):
    here, _, description = pair
    other = here.connect(description)
    with pytest.raises(Unsupported, match=r"2\*\*31"):
        here._fabric.prepare(other.link, BlockTable((1,) * 2, 1, 1, 1 << 31), BlockTable((1,) * 2, 1, 1, 1 << 31))


def test_a_long_post_does_not_stop_the_other_threads(start):
    here, peer = start("here"), start("peer")
    route, _, count = large(here, peer)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            time.sleep(0.001)
            ticks.append(time.monotonic())

    def went_on_meanwhile():
        began = time.monotonic()
        here._fabric.post("read", route.prepared, array("q", range(count)), array("q", range(count)), 5)
        ended = time.monotonic()
        return 2 <= sum(began < at < ended for at in ticks)  # once it might have been about to

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        eventually(went_on_meanwhile)
    finally:
        stop.set()
        ticker.join()
