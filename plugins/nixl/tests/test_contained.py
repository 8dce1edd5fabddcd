"""NIXL in a mover: the kit's suite over TCP, where jobs take their time, and crashes that the engine survives."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

import tensorway
from tensorway.errors import DeadlineExceeded, PeerLost, TransferFailed
from tensorway.memory import shared
from tensorway.testing import PeerProcess, TransportSuite
from tensorway.testing.stops import children, stop_whole
from tensorway.testing.waiting import eventually
from tensorway.transport import BlockTable

pytestmark = pytest.mark.usefixtures("real_nixl")

TCP = {"ucx_tls": ["tcp"], "contained": True}
#: Much more than what the sockets of a connection hold, so that a transfer with a stopped peer is under way for sure.
LARGE = 32 << 20
BLOCK = 1 << 16


class TestOverTcp(TransportSuite):
    name = "nixl"
    options = TCP
    shared_memory = True


@pytest.fixture
def start():
    started = []

    def make(kind, options):
        made = (
            PeerProcess("nixl", options, shared_memory=True)
            if kind == "peer"
            else tensorway.create("transport", "nixl", options)
        )
        started.append(made)
        return made

    yield make
    for one in reversed(started):
        one.close()


def mover_of(pid):
    """The one child of a process."""
    (child,) = children(pid)
    return child


def connect(here, peer, region):
    other = here.connect(peer.describe())
    return here.prepare(other, BlockTable.over(region, BLOCK), BlockTable.over(other.regions[0], BLOCK))


def read(here, route, deadline=30.0):
    return here.read(route, range(route.local.count), range(route.local.count), deadline=deadline)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_the_engine_survives_a_crash_of_nixl_and_goes_on(start, number):
    here, peer, mine = start("here", TCP), start("peer", TCP), shared(LARGE)
    peer.register(LARGE, seed=3)
    region = here.register(mine).regions[0]
    route = connect(here, peer, region)
    read(here, route).wait()
    transfer = read(here, route)
    os.kill(here._fabric._life.process.pid, number)
    eventually(lambda: not transfer.pending)
    assert transfer.error is None or "he mover of transport nixl ended by" in str(transfer.error)
    eventually(lambda: transfer.released)
    eventually(lambda: here._fabric.crashes)
    with pytest.raises(PeerLost):
        read(here, route).wait()
    mine[:] = bytes(LARGE)
    read(here, connect(here, peer, region)).wait()
    assert any(mine)


def test_a_peer_whose_reader_was_killed_keeps_its_engine(start):
    """What UCX aborts for is in its mover: a reader over TCP that is killed while its peer is stopped."""
    here, peer, mine = start("here", TCP), start("peer", TCP), shared(LARGE)
    peer.register(LARGE, seed=3)
    region = here.register(mine).regions[0]
    route = connect(here, peer, region)
    before, theirs = peer.describe(), mover_of(peer.pid)
    stop_whole(theirs)
    transfers = [read(here, route) for _ in range(4)]
    time.sleep(0.3)
    here._fabric._life.process.kill()
    for transfer in transfers:
        with pytest.raises((PeerLost, TransferFailed, DeadlineExceeded)):
            transfer.wait()
    os.kill(theirs, signal.SIGCONT)
    time.sleep(1)
    assert peer.pid == peer.ask("ping")
    # Whether UCX aborted its mover or not: it can be described, reached and read.
    eventually(lambda: not Path(f"/proc/{theirs}").exists() or before == peer.describe())
    mine[:] = bytes(LARGE)
    read(here, connect(here, peer, region)).wait()
    assert any(mine)
