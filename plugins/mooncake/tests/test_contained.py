"""Mooncake in a mover: the kit's suite, and crashes that the engine survives."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading

import msgspec
import pytest

import tensorway
from tensorway.errors import MemoryInvalid, PeerLost, TransferFailed
from tensorway.memory import shared
from tensorway.testing import PeerProcess, TransportSuite
from tensorway.testing.peer import content, digest
from tensorway.testing.stops import children, stop_whole
from tensorway.testing.waiting import eventually
from tensorway.transport import BlockTable
from tensorway.transport import description as envelope
from tensorway.transport.contained import contain
from tensorway_mooncake import wire

pytestmark = pytest.mark.usefixtures("real_mooncake")

CONTAINED = {"contained": True}
#: Much more than what the sockets of a connection hold, so that a transfer with a stopped peer is under way for sure.
LARGE = 32 << 20
BLOCK = 1 << 16


class TestContained(TransportSuite):
    name = "mooncake"
    options = CONTAINED
    shared_memory = True


@pytest.fixture
def start():
    started = []

    def make(kind, options=CONTAINED):
        made = (
            PeerProcess("mooncake", options, shared_memory=True)
            if kind == "peer"
            else tensorway.create("transport", "mooncake", options)
        )
        started.append(made)
        return made

    yield make
    for one in reversed(started):
        one.close()


def mover(here):
    """The process in which its Mooncake is."""
    return here._fabric._life.process.pid


def mover_of(pid):
    """The one child of a process."""
    (child,) = children(pid)
    return child


def connect(here, description, region):
    other = here.connect(description)
    return here.prepare(other, BlockTable.over(region, BLOCK), BlockTable.over(other.regions[0], BLOCK))


def read(here, route, deadline=30.0):
    return here.read(route, range(route.local.count), range(route.local.count), deadline=deadline)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_the_engine_survives_a_crash_of_mooncake_and_goes_on(start, number, caplog):
    here, peer, mine = start("here"), start("peer"), shared(LARGE)
    peer.register(LARGE, seed=3)
    region = here.register(mine).regions[0]
    route = connect(here, peer.describe(), region)
    read(here, route).wait()
    theirs = mover_of(peer.pid)
    stop_whole(theirs)  # so that it is under way for sure
    transfer, incarnation = read(here, route), here.incarnation
    os.kill(mover(here), number)
    with pytest.raises(TransferFailed, match=f"he mover of transport mooncake ended by {signal.Signals(number).name}"):
        transfer.wait()
    eventually(lambda: transfer.released)
    mine[:] = bytes(LARGE)
    os.kill(theirs, signal.SIGCONT)
    eventually(lambda: here._fabric.crashes)
    with pytest.raises(PeerLost, match="mover of transport mooncake ended"):
        read(here, route).wait()
    assert not any(mine), "nobody writes to what was released"
    read(here, connect(here, peer.describe(), region)).wait()
    assert digest(content(3, LARGE)) == digest(mine)
    assert incarnation != here.incarnation
    assert [1] == [line.crashes for line in caplog.records if "must be connected anew" in line.getMessage()]


def test_transfers_of_many_threads_end_typed_and_are_released_while_movers_are_killed(start):
    here, peer = start("here"), start("peer")
    peer.register(LARGE, seed=3)
    theirs, share = content(3, LARGE), LARGE // BLOCK // 4
    region = here.register(mine := shared(LARGE)).regions[0]
    over, wrong, transfers = threading.Event(), [], []

    def work(part):
        blocks = range(part * share, (part + 1) * share)
        bounds, over_with_it = slice(blocks.start * BLOCK, blocks.stop * BLOCK), False
        while not over_with_it:
            try:
                route = connect(here, description, region)
                while not over_with_it:
                    over_with_it = over.is_set()  # after one more, which is to succeed
                    transfers.append(transfer := here.read(route, blocks, blocks))
                    transfer.wait()
                    if mine[bounds] != theirs[bounds]:
                        wrong.append(part)
                    mine[bounds] = bytes(share * BLOCK)
                    done[part] += 1
            except (PeerLost, TransferFailed):
                over_with_it = False
            except Exception as error:
                wrong.append(error)
                return

    description, done = peer.describe(), [0] * 4
    users = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for each in users:
        each.start()
    for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGKILL):
        before, life = list(done), here._fabric._life
        eventually(lambda before=before: all(now > then for now, then in zip(done, before, strict=True)), 30)
        os.kill(life.process.pid, number)
        eventually(lambda life=life: here._fabric._life not in (None, life), 30)
    over.set()
    for each in users:
        each.join(60)
    assert [] == wrong
    assert 3 == here._fabric.crashes
    eventually(lambda: all(transfer.released for transfer in transfers))


def test_a_peer_whose_mover_ends_is_lost_and_is_reached_by_its_new_description(start):
    here, peer, mine = start("here"), start("peer"), shared(LARGE)
    peer.register(LARGE, seed=3)
    region = here.register(mine).regions[0]
    before = peer.describe()
    route = connect(here, before, region)
    transfer = read(here, route)
    os.kill(mover_of(peer.pid), signal.SIGKILL)
    eventually(lambda: not transfer.pending)
    with pytest.raises(PeerLost):
        read(here, route).wait()
    eventually(lambda: transfer.released)
    assert 0 == here._fabric.crashes

    def described_anew():
        try:
            return before != peer.describe()
        except AssertionError:  # it has not noticed yet, and asked the mover that has ended
            return False

    eventually(described_anew)
    read(here, connect(here, peer.describe(), region)).wait()
    assert digest(content(3, LARGE)) == digest(mine)


FAULTY = """
from tensorway_mooncake.offers import fabric
def faulty(**options):
    made = fabric(**options)
    # What Mooncake does not know, it follows as a pointer.
    made.prepare = lambda *tables: made._engine._native.transfer_check_status(1)
    return made
"""


def test_a_fault_inside_mooncake_s_own_code_costs_the_mover(tmp_path, monkeypatch, start):
    (tmp_path / "faulty_mooncake.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    peer = start("peer")
    peer.register(LARGE, seed=3)
    with contain("mooncake", "faulty_mooncake:faulty") as here:
        region = here.register(shared(LARGE)).regions[0]
        with pytest.raises(PeerLost, match="ended by SIGSEGV"):
            connect(here, peer.describe(), region)
        here.connect(peer.describe())


def test_what_a_stranger_sends_to_mooncake_s_port_costs_the_mover(start):
    """Whoever reaches the port can end what listens there: Mooncake's JSON is not checked before it is used."""
    here, peer, mine = start("here"), start("peer"), shared(LARGE)
    peer.register(LARGE, seed=3)
    region, life = here.register(mine).regions[0], here._fabric._life
    blob = msgspec.msgpack.decode(envelope.decode(here.describe(), "mooncake").blob, type=wire.Blob)
    with socket.create_connection((blob.address, blob.port), 10) as stranger:
        stranger.sendall(struct.pack("<QB", 3, 2) + b"[]")
        eventually(lambda: here._fabric._life not in (None, life), 30)
    assert life.ended.endswith("ended by SIGABRT")
    read(here, connect(here, peer.describe(), region)).wait()
    assert digest(content(3, LARGE)) == digest(mine)


def test_memory_that_cannot_be_shared_is_refused(start):
    with pytest.raises(MemoryInvalid, match="private memory"):
        start("here").register(bytearray(4096))


def test_no_mooncake_is_loaded_in_the_engine_s_process(fresh_python):
    code = """
import json, tensorway
with tensorway.create("transport", "mooncake", {"contained": True}) as here:
    here.describe()
    print(json.dumps("/mooncake/" in open("/proc/self/maps").read()))
"""
    assert not fresh_python(code)
