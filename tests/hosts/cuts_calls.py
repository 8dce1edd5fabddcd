"""What members whose connection is cut are told to do; each function has the process's `Rank` first."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from hosts_calls import BLOCK, here


def meet(_, name, deadline):
    """Reach a member and keep the connection; returns the lane."""
    here.peer = here.directory.connect(name, deadline)
    return here.peer.lane


def route(_):
    """Prepare to move all that both have."""
    from tensorway.transport import BlockTable

    tables = BlockTable.over(here.region, BLOCK), BlockTable.over(here.peer.regions[0], BLOCK)
    here.route = here.endpoint.prepare(here.peer, *tables)


def look_out(_):
    """Begin to look whether the peer is lost, without asking it for anything."""
    here.lost = None
    peer = here.peer

    def look():
        while not peer.lost:
            time.sleep(0.01)
        here.lost = [time.monotonic(), peer.lost]

    threading.Thread(target=look, daemon=True).start()


def lost(_, seconds):
    """When the peer was lost, on the clock that all processes of this machine share, and why; None if it is not."""
    until = time.monotonic() + seconds
    while here.lost is None and time.monotonic() < until:
        time.sleep(0.01)
    return here.lost


def ended(_):
    """Wait for the transfer: what became of it, why, and when."""
    from tensorway.errors import TensorwayError

    try:
        here.transfer.wait()
    except TensorwayError as raised:
        return [type(raised).__name__, raised.true, time.monotonic()]
    return ["", "", time.monotonic()]


def cut_by_then(_, seconds):
    """Whether NIXL itself has said that the connection is no more, of whoever the directory may have said it before."""
    remote, until = here.peer.link.remote, time.monotonic() + seconds
    while not remote.lost and time.monotonic() < until:
        time.sleep(0.01)
    return remote.lost


def door(_):
    """The port on which UCX listens here."""
    listening = "0A"
    rows = [row.split() for row in Path("/proc/self/net/tcp").read_text("ascii").splitlines()[1:]]
    (port,) = {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == listening}
    return port


def small_reads(_, nbytes, seconds):
    """Read a little again and again for so long; how long the slowest took, and how many there were."""
    ids, slowest, count = range(nbytes // BLOCK), 0.0, 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.monotonic()
        here.endpoint.read(here.route, ids, ids, deadline=30).wait()
        slowest, count = max(slowest, time.monotonic() - began), count + 1
        time.sleep(0.01)
    return [slowest, count]


def reads_while_connecting(_, silent, deadline, nbytes):
    """Connect to who is silent, and read from who is well meanwhile; how long each took, and what the first raised."""
    from tensorway.errors import TensorwayError

    found = []
    # Of the directory's own, which would try again until its deadline.
    described = here.directory._description(here.directory.members()[silent], 10.0)

    def connect():
        began = time.monotonic()
        try:
            here.endpoint.connect(described, deadline)
            found.append(["", "", 0.0])
        except TensorwayError as raised:
            found.append([type(raised).__name__, raised.true, time.monotonic() - began])

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    slowest, count = 0.0, 0
    while thread.is_alive():
        once, more = small_reads(None, nbytes, 0.2)
        slowest, count = max(slowest, once), count + more
    return [found[0], slowest, count]


def seconds_to_close(_, deadline):
    """How long it takes to close the endpoint, whatever is under way."""
    began = time.monotonic()
    here.endpoint.close(deadline)
    return time.monotonic() - began
