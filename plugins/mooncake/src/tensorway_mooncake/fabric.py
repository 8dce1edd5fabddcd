"""The fabric over Mooncake: what `tensorway.transport.Endpoint` needs of a library that moves bytes.

May import tensorway's ground and the transport. Reads and writes are one-sided: the peer's engine serves them in
threads of its own. Mooncake waits without a deadline where it meets a peer for the first time and where it notifies:
both happen in threads that nobody has to wait for.
"""

from __future__ import annotations

import ctypes
import secrets
import threading
import time
from array import array
from collections import deque
from typing import Any, Final

import attrs

from tensorway import _logging
from tensorway.errors import DeadlineExceeded, DescriptionInvalid, PeerLost, TransferFailed
from tensorway.memory import Region
from tensorway.transport.blocks import BlockTable
from tensorway.transport.contract import Capabilities, Description, Notification, Operation
from tensorway_mooncake import engine as engines
from tensorway_mooncake import wire
from tensorway_mooncake.jobs import WINDOW, Job, Jobs, Prepared, Remote, knock, pieces
from tensorway_mooncake.library import patience, version
from tensorway_mooncake.notes import Inbox, Outbox, numbers
from tensorway_mooncake.options import MooncakeOptions

_MAX_NOTIFICATION: Final = 65_536
#: Places in the page of canaries: the first holds ours, peers' are read into the others.
_SLOTS: Final = 64
_SLOT: Final = 128
_FIRST_PAUSE: Final = 50e-6
_LAST_PAUSE: Final = 5e-3
#: What to do about a peer that is lost.
_ANEW: Final = "Connect to it anew when it is back."

_log = _logging.logger("mooncake")


@attrs.define(eq=False)
class Link:
    """One connection of the endpoint to a peer."""

    remote: Remote
    outbox: Outbox = attrs.field(repr=False)
    closed: bool = False


@attrs.define(eq=False)
class _Meeting:
    """The first words with a peer, in a thread of their own: Mooncake waits for a peer that is stopped.

    It holds a lock of the engine while it does, with which nobody else can post: so a peer is first asked whether it
    answers, which holds none.
    """

    engine: engines.Engine
    job: Job
    slot: int
    jobs: Jobs
    given_up: bool = False
    answered: bool = False
    over: threading.Event = attrs.field(factory=threading.Event)

    def run(self) -> None:
        """Ask whether it answers, and post the read of its canary."""
        try:
            self.answered = self.engine.answers(self.job.remote.segment)
            if self.answered and not self.given_up:
                self.jobs.start(self.job)
        except Exception:  # what went wrong is in the job, or is that the engine is closed
            _log.debug("the first words with a peer failed", exc_info=True)
        finally:
            self.over.set()


class MooncakeFabric:
    """Moves memory through a Mooncake engine; see `contract.Fabric`."""

    name = "mooncake"
    capabilities = Capabilities(
        media=frozenset({"cpu"}), max_notification=_MAX_NOTIFICATION, max_pieces=WINDOW, max_in_flight=2
    )

    def __init__(self, options: MooncakeOptions | None = None) -> None:
        self._options = options or MooncakeOptions()
        self._lock = threading.RLock()
        #: By all that was said of them: what somebody says of an incarnation is not believed of what others say of it.
        self._remotes: dict[tuple[object, ...], Remote] = {}
        self._outboxes: dict[tuple[object, ...], Outbox] = {}
        self._page = ctypes.create_string_buffer(_SLOTS * _SLOT)
        self._slots = list(range(1, _SLOTS))
        #: Canaries that were given up and are not over; their slots are not used before they are.
        self._strays: list[_Meeting] = []
        self._secret = secrets.token_bytes(wire.SECRET)
        self._number = numbers()

    def open(self, name: str, incarnation: str) -> None:
        """Load Mooncake and make an engine."""
        self._name, self._incarnation = name, incarnation
        self._version = version()
        self._engine = engines.create(engines.address_of(self._options.host))
        self._jobs = Jobs(self._engine, patience())
        self._inbox = Inbox(self._engine, self._secret, self._names_of)
        self._page.value = incarnation.encode()
        self._engine.register(Region(ctypes.addressof(self._page), len(self._page), owner=self._page))

    # -- memory

    def attach(self, region: Region) -> Any:
        """Register a region."""
        return self._engine.register(region)

    def detach(self, handle: Any) -> None:
        """Deregister it, once."""
        self._engine.deregister(handle)

    def describe(self) -> bytes:
        """The version, the address, the canary, and the secret that seals what is sent here."""
        at, port, canary = self._engine.address, self._engine.port, ctypes.addressof(self._page)
        return wire.encode(wire.Blob(wire.SCHEMA, self._version, wire.host(), at, port, canary, self._secret))

    # -- peers

    def connect(self, description: Description, seconds: float) -> Link:
        """Check the description, and prove the way by reading the peer's incarnation."""
        asked, until = f"Peer {description.name} was to be reached over mooncake.", time.monotonic() + seconds
        blob = wire.decode(description, self._version, asked)
        seen = Remote(description.name, description.incarnation, blob.address, blob.port, blob.canary, blob.secret)
        with self._lock:
            remote = self._remotes.get(seen.identity)
            if remote is None or remote.lost:
                remote = self._remotes[seen.identity] = seen
                self._outboxes[seen.identity] = Outbox(self._engine, seen, ctypes.addressof(self._page))
            remote.links += 1
            link = Link(remote, self._outboxes[seen.identity])
        try:
            if reason := knock(remote, max(until - time.monotonic(), 1e-3)):
                raise PeerLost.because(asked, reason)
            self._read_canary(remote, until, asked)
        except BaseException:
            self.disconnect(link)
            raise
        return link

    def lane(self, link: Link) -> str:
        """Always `tcp`: Mooncake was told to use nothing else."""
        return "tcp"

    def disconnect(self, link: Link) -> None:
        """Let go of the peer once nobody uses it; what is in flight with it is asked after as before."""
        with self._lock:
            if not link.closed:
                link.closed = True
                link.remote.links -= 1
                identity = link.remote.identity
                if link.remote.links == 0 and self._remotes.get(identity) is link.remote:
                    del self._remotes[identity], self._outboxes[identity]

    def lost(self, link: Link) -> str:
        """What the last transfer or notification found out; Mooncake does not tell of a peer nobody talks to."""
        return link.remote.lost or ("it was disconnected here" if link.closed else "")

    # -- transfers

    def prepare(self, link: Link, local: BlockTable, remote: BlockTable) -> Prepared:
        """Nothing is worth keeping but the tables."""
        return Prepared(link.remote, local, remote)

    def post(
        self, operation: Operation, prepared: Prepared, local_ids: array[int], remote_ids: array[int], seconds: float
    ) -> Job | None:
        """Hand over what fits into the peer's window; the rest follows when it is asked after."""
        asked = f"A {operation} with peer {prepared.remote.name} was asked for."
        waiting = deque(pieces(prepared.local, prepared.far, local_ids, remote_ids))
        return self._jobs.start(Job(prepared.remote, operation, asked, waiting))

    def done(self, job: Job) -> bool:
        """Ask Mooncake."""
        return self._jobs.done(job)

    def settled(self, job: Job) -> bool:
        """Whether every operation of it is over, by itself or because the engine is destroyed."""
        return self._jobs.settled(job)

    # -- notifications

    def send(self, link: Link, payload: bytes, seconds: float) -> None:
        """Let the peer's thread deliver it; messages to one peer keep their order."""
        if reason := self.lost(link):
            asked = f"A notification to peer {link.remote.name} was to be sent."
            raise PeerLost(asked, f"The peer is lost: {reason}.", _ANEW)
        link.outbox.send(lambda: wire.Note(self._name, self._incarnation, self._number(), payload), payload, seconds)

    def receive(self) -> list[Notification]:
        """What has arrived."""
        return self._inbox.receive()

    def close(self) -> None:
        """Destroy the engine: nothing else stops it from writing."""
        if not self._engine.close():
            _log.warning(
                "a call that waits for a peer keeps the engine of a closed mooncake endpoint until it returns",
                extra={"transport": self.name},
            )

    # -- inside

    def _names_of(self, incarnation: str) -> set[str]:
        with self._lock:
            return {remote.name for remote in self._remotes.values() if remote.incarnation == incarnation}

    def _read_canary(self, remote: Remote, until: float, asked: str) -> None:
        """Read the peer's incarnation out of its memory."""
        meeting = self._meet(remote, asked)
        here, expected = self._slot(meeting.slot), remote.incarnation.encode()
        try:
            if not meeting.over.wait(max(until - time.monotonic(), 0)):
                raise self._silent(asked)
            if not meeting.answered:
                raise PeerLost.because(asked, "it takes connections and does not answer")
            self._await(meeting.job, until, asked)
            if ctypes.string_at(here, len(expected)) != expected:
                raise DescriptionInvalid(
                    asked, "Its memory does not hold its incarnation: another process took its place.", _ANEW
                )
        finally:
            meeting.given_up = True
            with self._lock:
                self._strays.append(meeting)
            self._sweep()

    def _meet(self, remote: Remote, asked: str) -> _Meeting:
        self._sweep()
        with self._lock:
            if not self._slots:
                raise TransferFailed(asked, "Too many peers that did not answer are still being asked.", "Try later.")
            slot = self._slots.pop()
        ctypes.memset(self._slot(slot), 0, _SLOT)
        piece = (self._slot(slot), remote.canary, len(remote.incarnation))
        meeting = _Meeting(self._engine, Job(remote, "read", asked, deque([piece])), slot, self._jobs)
        threading.Thread(target=meeting.run, name="tensorway-mooncake-meets", daemon=True).start()
        return meeting

    def _slot(self, number: int) -> int:
        return ctypes.addressof(self._page) + number * _SLOT

    def _await(self, job: Job, until: float, asked: str) -> None:
        pause = _FIRST_PAUSE
        while not self._jobs.done(job):
            if time.monotonic() >= until:
                raise self._silent(asked)
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)

    def _sweep(self) -> None:
        """Take back the slots of canaries that are over."""
        with self._lock:
            strays, self._strays = self._strays, []
        for meeting in strays:
            over = meeting.over.is_set() and self._jobs.settled(meeting.job)
            with self._lock:
                (self._slots.append(meeting.slot) if over else self._strays.append(meeting))

    def _silent(self, asked: str) -> DeadlineExceeded:
        true = "It did not answer by the deadline."
        return DeadlineExceeded(asked, true, "See whether it is stopped, or give a longer deadline.")
