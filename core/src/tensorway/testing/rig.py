"""Where hostile bytes meet a transport: an endpoint under test, with honest peers at work beside it.

Room `testing`; `hostile` says what the endpoint is told.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final

import attrs

from tensorway.testing.endurance import BLOCK, COUNT, Count
from tensorway.testing.peer import PeerProcess, content
from tensorway.testing.waiting import settled
from tensorway.transport import BlockTable, Peer, Transport

if TYPE_CHECKING:
    from tensorway.testing.hostile import Hostile

#: Seconds that one case may wait for a peer that does not exist, and that it may be late by on a busy machine.
DEADLINE: Final = 0.5
SLACK: Final = 5.0


class Rig:
    """The endpoint under test, an honest peer that is at work, and another whose description is tampered with."""

    def __init__(self, run: Hostile) -> None:
        import tensorway

        self.run = run
        options = dict(run.options)
        self.endpoint: Transport = tensorway.create("transport", run.transport, options)
        self.honest, self.other = PeerProcess(run.transport, options), PeerProcess(run.transport, options)
        for number, peer in enumerate((self.honest, self.other)):
            peer.register(BLOCK * COUNT, seed=run.seed + number)
        self.mine = bytearray(BLOCK * COUNT)
        self.here = self.endpoint.register(self.mine).regions[0]
        self.peer = self.endpoint.connect(self.honest.describe())
        self.honest.connect(self.endpoint.describe())
        self.notes = 0
        self.before: Count | None = None
        self.look()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            self.run.breaches += [f"this process had {text}" for text in settled(self._grown, SLACK)]
        for each in (self.endpoint, self.honest, self.other):
            each.close()

    def _grown(self) -> list[str]:
        self.endpoint.notifications()  # a stranger's last words
        return self.before.grown(self._count()) if self.before else []

    def _count(self, first: bool = False) -> Count:
        """A count without what the endpoint keeps of every name that it has met."""
        counts, now = self.endpoint.statistics(), Count.of(os.getpid())
        names = sum(1 + len(row) for row in counts.values())
        entries, files = self.run.kept_entries * first, self.run.kept_files * first
        return attrs.evolve(now, entries=now.entries - names + entries, files=now.files + files)

    def reach(self, description: bytes) -> None:
        """Connect, and if that works, read what is described."""
        peer = self.endpoint.connect(description, deadline=DEADLINE)
        try:
            if peer.regions:
                remote = BlockTable.over(peer.regions[0], 64, count=1)
                local = BlockTable.over(self.here, 64)
                self.endpoint.read(self.endpoint.prepare(peer, local, remote), [0], [0], deadline=DEADLINE).wait()
        finally:
            self.endpoint.disconnect(peer)

    def read(self, peer: Peer, seed: int) -> None:
        """Every byte of a peer that does nothing wrong."""
        local, remote = BlockTable.over(self.here, BLOCK), BlockTable.over(peer.regions[0], BLOCK)
        self.endpoint.read(self.endpoint.prepare(peer, local, remote), range(COUNT), range(COUNT)).wait()
        if self.mine != content(seed, BLOCK * COUNT):
            self.run.breaches.append(f"peer {peer.name} was read, and other bytes arrived")

    def look(self) -> None:
        """Whether the honest peer is served: its bytes, and a notification in its own name."""
        self.read(self.peer, self.run.seed)
        if self.endpoint.capabilities.notify:
            self.notes += 1
            self.honest.notify(b"honest %d" % self.notes)
            expected, until = (self.peer.incarnation, b"honest %d" % self.notes), time.monotonic() + SLACK
            while all((note.incarnation, note.payload) != expected for note in self.endpoint.notifications()):
                if time.monotonic() > until:
                    raise TimeoutError("a notification of the honest peer did not arrive")
                time.sleep(0.001)
        if self.notes == 2:  # a hundred cases have opened what stays
            self.before = self._count(first=True)
