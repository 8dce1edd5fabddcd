"""The fabric against the real Mooncake: the suite, and what is particular to Mooncake."""

from __future__ import annotations

import base64
import signal
import subprocess
import sys
import threading
import time

import msgspec
import pytest

import tensorway
from tensorway.errors import DeadlineExceeded, DescriptionInvalid, MemoryInvalid, PeerLost, TransferFailed
from tensorway.testing import PeerProcess, TransportSuite
from tensorway.testing.peer import content, digest
from tensorway.testing.stops import stop_whole
from tensorway.testing.transports import BLOCK, COUNT, NBYTES, route_to
from tensorway.testing.waiting import eventually
from tensorway.transport import BlockTable
from tensorway.transport import description as envelope
from tensorway_mooncake import wire
from tensorway_mooncake.jobs import WINDOW
from tensorway_mooncake.notes import Inbox

LARGE = 64 << 20
#: Seconds for which a library call may hold the interpreter while an engine ends.
ENDING = 5


@pytest.fixture(autouse=True)
def _mooncake(real_mooncake):
    """Everything here needs it."""


class TestMooncake(TransportSuite):
    name = "mooncake"


@pytest.fixture
def start():
    """Endpoints here and in other processes, all closed in the end."""
    started = []

    def make(kind, **options):
        one = PeerProcess("mooncake", options) if kind == "peer" else tensorway.create("transport", "mooncake", options)
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


def blob_of(description):
    return msgspec.msgpack.decode(envelope.decode(description, "mooncake").blob, type=wire.Blob)


def altered(description, **changed):
    """The description with something else in the fabric's part."""
    seen = envelope.decode(description, "mooncake")
    blob = msgspec.structs.replace(blob_of(description), **changed)
    parts = (seen.transport, seen.name, seen.incarnation, seen.regions, wire.encode(blob))
    return envelope.encode(type(seen)(*parts))


def large(here, peer):
    """A route over much memory, and its buffer."""
    peer.register(LARGE, seed=3)
    mine = bytearray(LARGE)
    region = here.register(mine).regions[0]
    other = here.connect(peer.describe())
    return here.prepare(other, BlockTable.over(region, 1 << 16), BlockTable.over(other.regions[-1], 1 << 16)), mine


def reads(here, route, count, **more):
    return here.read(route, range(count), range(count), **more)


# -- descriptions and the canary


def test_the_lane_is_tcp(pair):
    here, _, description = pair
    assert "tcp" == here.connect(description).lane


def test_another_version_is_refused_before_mooncake_hears_of_the_peer(pair):
    here, _, description = pair
    with pytest.raises(DescriptionInvalid, match=r"Mooncake 0\.3\.12"):
        here.connect(altered(description, version="0.3.12"))
    assert {} == here._fabric._remotes
    here.connect(description)


def test_a_canary_that_is_not_registered_fails_and_leaves_nothing(pair):
    here, _, description = pair
    with pytest.raises(TransferFailed, match="failed a part of it"):
        here.connect(altered(description, canary=blob_of(description).canary + (1 << 30)), deadline=10)
    assert ({}, 63) == (here._fabric._remotes, len(here._fabric._slots))
    here.connect(description)


def test_a_canary_that_sings_another_song_is_another_process(pair):
    here, _, description = pair
    elsewhere = envelope.decode(description, "mooncake").regions[0].address
    with pytest.raises(DescriptionInvalid, match="took its place"):
        here.connect(altered(description, canary=elsewhere))
    assert ({}, 63) == (here._fabric._remotes, len(here._fabric._slots))
    here.connect(description)


def test_a_killed_peer_is_not_connected_to(pair):
    here, peer, description = pair
    peer.signal(signal.SIGKILL)
    with pytest.raises(PeerLost, match="cannot be reached"):
        here.connect(description, deadline=3)
    assert {} == here._fabric._remotes


def test_a_stopped_peer_costs_its_deadline_and_nobody_else_anything(pair, start):
    here, peer, description = pair
    other = start("peer")
    other.register(NBYTES, seed=1)
    route = route_to(here, here.connect(other.describe()), mine := bytearray(NBYTES))
    stop_whole(peer.pid)
    try:
        started, failed = time.monotonic(), []

        def meet():
            try:
                here.connect(description, deadline=4)
            except DeadlineExceeded as error:
                failed.append(error)

        meeting = threading.Thread(target=meet)
        meeting.start()
        time.sleep(0.2)
        # Mooncake holds a lock while it waits for a peer that it meets; nothing may wait for that one.
        reads(here, route, COUNT, deadline=5).wait()
        assert meeting.is_alive()
        meeting.join()
        assert 1 == len(failed)
        assert time.monotonic() - started < 4 + 3
        assert digest(content(1, NBYTES)) == digest(mine)
    finally:
        peer.signal(signal.SIGCONT)
    here.connect(description)
    assert eventually(lambda: here._fabric._sweep() or 63 == len(here._fabric._slots))


# -- transfers


def test_thousands_of_blocks_that_do_not_touch_stay_within_the_window(start, monkeypatch):
    here, peer = start("here"), start("peer")
    peer.register(4 * COUNT * BLOCK, seed=1)
    mine = bytearray(2 * COUNT * BLOCK)
    region, other = here.register(mine).regions[0], here.connect(peer.describe())
    count = len(mine) // 64
    route = here.prepare(
        other, BlockTable.over(region, 64), BlockTable.over(other.regions[0], 64, stride=128, count=count)
    )
    engine, seen = here._fabric._engine, []
    submit = engine.submit
    monkeypatch.setattr(type(engine), "submit", lambda _, *words: (seen.append(len(engine._live)), submit(*words))[1])
    parts = [range(part, count, 4) for part in range(4)]
    for transfer in [here.read(route, part, part) for part in parts]:
        transfer.wait()

    theirs = content(1, 4 * COUNT * BLOCK)
    expected = b"".join(theirs[128 * i : 128 * i + 64] for i in range(count))
    assert digest(expected) == digest(mine)
    assert (count, True) == (len(seen), max(seen) < WINDOW)
    assert 0 == route.peer.link.remote.active


def test_a_transfer_that_came_too_late_keeps_its_memory_until_mooncake_is_through(start):
    here, peer = start("here"), start("peer")
    route, mine = large(here, peer)
    stop_whole(peer.pid)
    try:
        transfer = reads(here, route, route.local.count, deadline=0.3)
        with pytest.raises(DeadlineExceeded):
            transfer.wait()
        time.sleep(0.3)
        assert not transfer.released
    finally:
        peer.signal(signal.SIGCONT)
    eventually(lambda: transfer.released)
    mine[:] = bytes(LARGE)
    time.sleep(0.3)
    assert LARGE == mine.count(0)


def test_no_quarantine_lasts_for_ever(start, monkeypatch):
    monkeypatch.setenv("MC_TCP_PROGRESS_TIMEOUT_SEC", "2")
    here, peer = start("here"), start("peer")
    route, mine = large(here, peer)
    stop_whole(peer.pid)
    transfer = reads(here, route, route.local.count, deadline=0.3)
    eventually(lambda: transfer.released, 10)
    mine[:] = bytes(LARGE)
    peer.signal(signal.SIGCONT)
    time.sleep(0.5)
    assert LARGE == mine.count(0)
    reads(here, route, COUNT).wait()


def test_a_peer_killed_in_the_middle_of_a_transfer_is_lost_and_nobody_else(start):
    here, peer, other = start("here"), start("peer"), start("peer")
    route, mine = large(here, peer)
    other.register(NBYTES, seed=1)
    alive = route_to(here, here.connect(other.describe()), small := bytearray(NBYTES))
    stop_whole(peer.pid)
    transfer = reads(here, route, route.local.count, deadline=5)
    assert transfer.pending
    peer.signal(signal.SIGKILL)

    with pytest.raises(PeerLost, match=route.peer.name):
        transfer.wait()
    eventually(lambda: transfer.released)
    mine[:] = bytes(LARGE)
    reads(here, alive, COUNT).wait()

    assert digest(content(1, NBYTES)) == digest(small)
    assert LARGE == mine.count(0)


def test_memory_that_the_peer_has_deregistered_fails_and_the_peer_is_still_there(pair):
    here, peer, description = pair
    route = route_to(here, here.connect(description), bytearray(NBYTES))
    peer.deregister(0)
    with pytest.raises(TransferFailed, match="does not say why"):
        reads(here, route, COUNT).wait()
    here.notify(route.peer, b"still there")


def test_memory_that_is_registered_twice_is_reached_until_the_second_is_closed(start):
    here, there = start("here"), start("here")
    theirs, mine = content(1, NBYTES), bytearray(NBYTES)
    first, second = there.register(theirs), there.register(theirs)
    route = route_to(here, here.connect(there.describe()), mine)
    first.close()
    reads(here, route, COUNT).wait()
    assert digest(theirs) == digest(mine)
    second.close()
    with pytest.raises(TransferFailed):
        reads(here, route, COUNT).wait()


def test_memory_that_overlaps_is_refused(start):
    here, memory = start("here"), memoryview(bytearray(NBYTES))
    with here.register(memory[:BLOCK]), pytest.raises(MemoryInvalid, match="overlap"):
        here.register(memory)
    here.register(memory)


# -- notifications


def test_a_notification_to_a_killed_peer_is_not_said_to_be_delivered(pair):
    here, peer, description = pair
    other = here.connect(description)
    peer.signal(signal.SIGKILL)
    with pytest.raises(PeerLost):  # Mooncake says that it was
        here.notify(other, b"x", deadline=3)


def test_notifications_to_a_stopped_peer_arrive_once_and_in_order_when_it_goes_on(pair):
    here, peer, description = pair
    other = here.connect(description)
    stop_whole(peer.pid)
    try:
        for payload in (b"one", b"two", b"one"):
            started = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                here.notify(other, payload, deadline=0.5)
            assert time.monotonic() - started < 2
    finally:
        peer.signal(signal.SIGCONT)
    # The first was handed to Mooncake and is waited for; the second was not, and nothing of it was delivered.
    for payload in (b"one", b"two", b"three"):
        here.notify(other, payload, deadline=10)
    seen = [base64.b64decode(row["payload"]) for row in peer.notifications(4, 0.5)]
    assert [b"one", b"two", b"three"] == seen


def test_who_has_no_description_of_ours_cannot_notify(start):
    here, there = start("here"), start("here")
    fabric, other = here._fabric, here.connect(there.describe())
    engine, page = fabric._engine, other.link.remote
    segment = page.segment

    def send(note, secret):
        assert engine.notify(segment, wire.seal(note, secret), page.canary, page.canary)

    true = page.secret
    there.connect(here.describe())
    send(wire.Note("stranger", "abc", 0, b"forged"), b"x" * wire.SECRET)
    send(wire.Note("stranger", here.incarnation, 0, b"another's name"), true)
    send(wire.Note(here.endpoint_name, here.incarnation, 5, b"first"), true)
    send(wire.Note(here.endpoint_name, here.incarnation, 5, b"again"), true)
    send(wire.Note("unconnected", "abc", 0, b"has the description"), true)
    assert eventually(lambda: True)
    notes = []
    eventually(lambda: notes.extend(there.notifications()) or len(notes) >= 2)
    time.sleep(0.1)
    assert [b"first", b"has the description"] == [note.payload for note in notes + there.notifications()]


def test_the_senders_that_are_remembered_are_bounded(monkeypatch):
    class Engine:
        def notified(self):
            return [wire.seal(wire.Note("n", f"life-{number}", 0, b""), b"s") for number in range(50)]

    monkeypatch.setattr("tensorway_mooncake.notes._SENDERS", 10)
    inbox = Inbox(Engine(), b"s", lambda incarnation: ())
    assert 50 == len(inbox.receive())
    assert 10 == len(inbox._numbers)


# -- the end


def test_closing_with_something_in_flight_stops_the_writing_within_a_bound(start):
    here, peer = start("here"), start("peer")
    route, mine = large(here, peer)
    stop_whole(peer.pid)
    transfer = reads(here, route, route.local.count)
    time.sleep(0.2)
    started = time.monotonic()
    here.close(deadline=0.2)
    assert time.monotonic() - started < ENDING
    assert here._fabric._engine.gone
    assert transfer.released
    mine[:] = bytes(LARGE)
    peer.signal(signal.SIGCONT)
    time.sleep(0.5)
    assert LARGE == mine.count(0)
    assert peer.pid == peer.ask("ping")


def test_closing_does_not_wait_for_a_notification_that_is_under_way(pair, caplog):
    here, peer, description = pair
    other = here.connect(description)
    stop_whole(peer.pid)
    with pytest.raises(DeadlineExceeded):
        here.notify(other, b"x", deadline=0.2)
    started = time.monotonic()
    here.close()
    assert time.monotonic() - started < ENDING
    assert any("keeps the engine" in line for line in caplog.messages)
    peer.signal(signal.SIGCONT)
    eventually(lambda: here._fabric._engine.gone)


LEAVING = """
import base64, sys
import tensorway
from tensorway.transport import BlockTable
here = tensorway.create("transport", "mooncake")
mine = bytearray(int(sys.argv[2]))
region = here.register(mine).regions[0]
peer = here.connect(base64.b64decode(sys.argv[1]))
route = here.prepare(peer, BlockTable.over(region, 1 << 16), BlockTable.over(peer.regions[0], 1 << 16))
here.read(route, range(route.local.count), range(route.local.count))
print("left")
"""


def test_a_process_that_ends_in_the_middle_of_a_transfer_ends_well_and_spares_the_peer(start):
    peer = start("peer")
    peer.register(LARGE, seed=3)
    command = [sys.executable, "-c", LEAVING, base64.b64encode(peer.describe()).decode(), str(LARGE)]
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (0, "left\n") == (done.returncode, done.stdout), done.stderr
        assert peer.pid == peer.ask("ping")


FORKING = """
import gc, json, os, sys, time, warnings, weakref
import tensorway
warnings.simplefilter("ignore")
here = tensorway.create("transport", "mooncake")
native = weakref.ref(here._fabric._engine._native)
child = os.fork()
if child == 0:
    here = None
    gc.collect()
    # A copy that is destroyed would wait for threads that are not here, and end connections that are the parent's.
    sys.exit(0 if native() is not None else 3)
for _ in range(200):
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        break
    time.sleep(0.05)
else:
    os.kill(child, 9)
    status = "hung"
here.register(bytearray(4096))
here.close()
print(json.dumps(status))
"""


def test_a_forked_child_ends_and_leaves_its_parent_s_engine_alone(fresh_python):
    assert 0 == fresh_python(FORKING)


HOST = """
import json, os, signal
def state():
    status = open("/proc/self/status").read()
    # The C library's own: 33, which it uses to change a user id in all threads.
    caught = {row: int(status.split(row)[1].split()[0], 16) & ~(1 << 32) for row in ("SigCgt:", "SigIgn:", "SigBlk:")}
    return caught, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
said = os.dup(1)
for fd in (1, 2):
    os.dup2(os.memfd_create("said"), fd)
import tensorway
before, environment = state(), dict(os.environ)
with tensorway.create("transport", "mooncake") as here, tensorway.create("transport", "mooncake") as there:
    memory = there.register(bytearray(4096))
    here.connect(there.describe())
    during = state()
added = {name: value for name, value in os.environ.items() if environment.get(name) != value}
sizes = [os.fstat(fd).st_size for fd in (1, 2)]
os.dup2(said, 1)
print(json.dumps([before == during == state(), sizes, added]))
"""


def test_the_host_process_stays_as_it_was(fresh_python):
    from tensorway_mooncake.library import ENVIRONMENT

    assert [True, [0, 0], ENVIRONMENT] == fresh_python(HOST)
