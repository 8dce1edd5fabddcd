"""The peers of an engine: who is there, connected to, and answers.

May import the core and this package's options. A thread connects to whoever joins; nobody else waits for that. A peer
that is slow, stopped or dead costs one deadline, and is then left alone for a while, longer each time.
"""

from __future__ import annotations

import threading
import time
from typing import Final

import attrs

from tensorway._logging import logger
from tensorway.errors import Closed, Incompatible, TensorwayError
from tensorway.rendezvous import Directory
from tensorway.transport import Peer, Route
from tensorway_offload.peer.options import PeerOptions

_log = logger("offload")
#: Seconds between two looks at who is there, that connecting may take, and that a peer is left alone at most.
_LOOK: Final = 0.1
_CONNECT: Final = 3.0
_LONGEST_REST: Final = 30.0


@attrs.define(eq=False)
class Neighbour:
    """A peer that is connected."""

    peer: Peer
    #: How long its rows are; 0 if it lends none.
    row_bytes: int
    routes: dict[tuple[int, bool], Route] = attrs.field(factory=dict)
    rest: float = 0.0
    resting_until: float = 0.0
    #: Until when it is not answered either, since it took no message.
    deaf_until: float = 0.0

    @property
    def incarnation(self) -> str:
        """Which life of which engine it is."""
        return self.peer.incarnation

    @property
    def awake(self) -> bool:
        """Whether it may be asked."""
        return not self.peer.lost and time.monotonic() >= self.resting_until


class Neighbours:
    """All peers, and the thread that connects to them."""

    def __init__(self, directory: Directory, options: PeerOptions) -> None:
        self._directory, self._options = directory, options
        self._found: dict[str, Neighbour] = {}
        self._tried: dict[str, tuple[str, float]] = {}
        self._ended = False
        self._look_now = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tensorway-peer-meeting", daemon=True)
        self._thread.start()

    def lenders(self) -> list[Neighbour]:
        """Those that may be asked for blocks now."""
        return [each for each in list(self._found.values()) if each.row_bytes and each.awake]

    def of(self, incarnation: str) -> Neighbour | None:
        """The one that lives this life."""
        return next((each for each in list(self._found.values()) if each.incarnation == incarnation), None)

    def look(self) -> None:
        """Somebody is there whom we have not met."""
        self._look_now.set()

    def late(self, neighbour: Neighbour) -> None:
        """It did not answer in time: leave it alone for a while."""
        neighbour.rest = min(max(self._options.rest, 2 * neighbour.rest), _LONGEST_REST)
        neighbour.resting_until = time.monotonic() + neighbour.rest

    def answered(self, neighbour: Neighbour) -> None:
        """It answered in time."""
        neighbour.rest = neighbour.resting_until = 0.0

    def usable(self) -> str:
        """Why nobody can be met any more; empty if they can."""
        try:
            self._directory.members()
        except Closed as error:
            return error.true
        return ""

    def __len__(self) -> int:
        return len(self._found)

    def close(self, deadline: float) -> None:
        """Say goodbye to all."""
        self._ended = True
        self._look_now.set()
        self._thread.join(deadline)

    def _follow(self) -> None:
        while not self._ended:
            self._look_now.wait(_LOOK)
            self._look_now.clear()
            try:
                self._look()
            except Closed:
                return  # `usable` says so
            except TensorwayError as error:
                _log.debug("Peers could not be looked for: %s", error)

    def _look(self) -> None:
        members = self._directory.members()
        for name, known in list(self._found.items()):
            member = members.get(name)
            if known.peer.lost or member is None or member.incarnation != known.incarnation:
                del self._found[name]
        self._tried = {name: tried for name, tried in self._tried.items() if name in members}
        now, wanted = time.monotonic(), []
        for name, member in members.items():
            life, again = self._tried.get(name, ("", 0.0))
            if member.state == "live" and name not in self._found and (life != member.incarnation or now >= again):
                wanted.append(name)
        room = self._options.most_peers - len(self._found)
        if not wanted or room <= 0:
            return
        for name, found in self._directory.connect_all(wanted[:room], _CONNECT).items():
            member = members[name]
            if isinstance(found, Peer):
                row_bytes = _row_bytes(member.facts.get("row_bytes")) if found.regions else 0
                self._found[name] = Neighbour(found, row_bytes)
                continue
            # What does not fit never will; who could not be reached may start again.
            self._tried[name] = member.incarnation, now + (600.0 if isinstance(found, Incompatible) else 5.0)
            _log.debug("Peer %s cannot be read from: %s", name, found)


def _row_bytes(fact: object) -> int:
    """What a member says of its rows; nothing that is no length."""
    value = getattr(fact, "value", None)
    return value if type(value) is int and 0 < value <= 1 << 40 else 0
