"""Another engine's life as one of our ranks is connected to it, and the thread that does everything that waits.

May import the core and this package's meeting, mathematics and messages. Connecting, acknowledgements and heartbeats
may each take as long as the other side lets them: they happen here, one thread for each engine, so that nobody else
waits for any of it. What others see of a link are values that only change once. What is connected and prepared is its
side's business: `Reader` is here, and `writing.Writer` beside it.
"""

from __future__ import annotations

import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Sequence
from typing import Final, Generic, Protocol, TypeVar

import attrs

from tensorway._logging import logger
from tensorway.errors import (
    Closed,
    DeadlineExceeded,
    DescriptionInvalid,
    Incompatible,
    LayoutInvalid,
    PeerLost,
    TensorwayError,
)
from tensorway.rendezvous import Directory
from tensorway.rendezvous.directory import gone
from tensorway.transport import BlockTable, Peer, Transport
from tensorway_kv import messages
from tensorway_kv.board import WORD, Scratch
from tensorway_kv.bound import Bound, routes_of
from tensorway_kv.failover import Peers
from tensorway_kv.meeting import Ground, RankRecord
from tensorway_kv.orders import Want
from tensorway_kv.reads import Reads
from tensorway_kv.topology import EngineTransferInfo, TransferTopology

_log = logger("kv")
#: Seconds that one try to reach an engine may take, and one message.
_TRY: Final = 5.0
_SEND: Final = 1.0
#: Seconds between two tries to send what the peer did not take, and after which nobody waits for it any more.
_AGAIN: Final = 0.05
_LATEST: Final = 3600.0
#: Seconds between the first two times that a rank is told something that it is told again and again.
_WATCH: Final = 0.5


@attrs.define
class _Message:
    rank: int
    payload: bytes
    since: float


@attrs.define
class _Watch:
    """Ranks that are told something again and again, and when: each pause is twice as long, up to the longest."""

    ranks: frozenset[int]
    payload: bytes
    longest: float
    until: float
    pause: float = _WATCH
    at: float = 0.0


class Connected(Protocol):
    """What a side makes of an engine whose ranks are connected."""

    @property
    def peers(self) -> dict[int, Peer]:
        """Those that anything is said to, by rank."""


BoundT = TypeVar("BoundT", bound=Connected)


class Side(ABC, Generic[BoundT]):
    """Our rank, as all of its links of one kind need it: whom it connects to, and what it prepares then."""

    def __init__(self, ground: Ground, endpoint: Transport, me: tuple[str, str], rank: int) -> None:
        """`me`: our engine, and its life."""
        self.ground, self.endpoint, self.rank = ground, endpoint, rank
        self.engine, self.incarnation = me

    @abstractmethod
    def targets(self, engine: str, incarnation: str, records: Sequence[RankRecord]) -> Sequence[int]:
        """The ranks of an engine that are to be connected; raises what says that it never can be used."""

    @abstractmethod
    def bind(self, engine: str, incarnation: str, records: Sequence[RankRecord], peers: dict[int, Peer]) -> BoundT:
        """All that is prepared once they are connected."""


class Reader(Side[Bound]):
    """Who reads."""

    def __init__(
        self, ground: Ground, endpoint: Transport, topology: TransferTopology, scratch: Scratch, me: tuple[str, str]
    ) -> None:
        super().__init__(ground, endpoint, me, topology.rank)
        self.topology, self.scratch = topology, scratch
        # The topology is one, and links are connected side by side.
        self._lock = threading.Lock()

    def targets(self, engine: str, incarnation: str, records: Sequence[RankRecord]) -> Sequence[int]:
        """Whom it reads from, and its share of those that nobody reads from."""
        with self._lock:
            self.topology.register_remote_engine(_info(engine, incarnation, records))
            return self.topology.handshake_target_ranks(engine)

    def bind(self, engine: str, incarnation: str, records: Sequence[RankRecord], peers: dict[int, Peer]) -> Bound:
        """Routes for all that may be read, and for the words beside it."""
        info, boards = _info(engine, incarnation, records), {}
        with self._lock:
            self.topology.register_remote_engine(info)
            reads = Reads(self.topology, engine)
            readers = {rank: self.topology.consumers(engine, rank) for rank in peers}
        for rank in reads.producers:
            words = BlockTable((records[rank].board,), WORD, WORD, max(sum(info.ranks[rank].blocks), 1))
            boards[rank] = self.endpoint.prepare(peers[rank], self.scratch.table, words)
        return Bound(info, reads, peers, routes_of(reads, peers, self.endpoint), boards, readers)

    def acknowledge(self, link: Link[Bound], want: Want, outcome: messages.Outcome) -> None:
        """Tell every rank that keeps blocks for us that we need them no more."""
        link.drop(want)
        for rank, readers in (link.bound.readers if link.bound is not None else {}).items():
            ack = messages.Ack(self.incarnation, self.rank, want.theirs, want.epoch, rank, readers, outcome)
            link.send(rank, messages.encode(ack))


def _info(engine: str, incarnation: str, records: Sequence[RankRecord]) -> EngineTransferInfo:
    return EngineTransferInfo(engine, incarnation, tuple(record.geometry for record in records))


class Link(Generic[BoundT]):
    """One life of another engine."""

    def __init__(self, side: Side[BoundT], engine: str, incarnation: str) -> None:
        self.engine, self.incarnation = engine, incarnation
        #: Set once connected.
        self.bound: BoundT | None = None
        #: Why it can never be read from, and in one word; empty while that is not known.
        self.hopeless: tuple[str, str] | None = None
        #: What the last try to connect ended with.
        self.trouble = "no try has ended yet"
        #: Messages that were sent, tried again, and given up.
        self.counts = {"sent": 0, "again": 0, "given_up": 0}
        self._side, self._peers = side, Peers()
        self._needed_until = 0.0
        self._directory: Directory | None = None
        self._connected: dict[int, Peer] = {}
        self._outbox: deque[_Message] = deque()
        #: By what the producer calls a request, and its lease: how often it is told, and until when.
        self._held: dict[tuple[str, int], tuple[float, float]] = {}
        self._watched: dict[object, _Watch] = {}
        self._beat_at = 0.0
        self._ended = self._poked = False
        self._changed = threading.Condition()
        name = f"tensorway-kv-link-{engine[:40]}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def lost(self) -> str:
        """Why this life of the engine is over; empty while it is not."""
        if self.hopeless is not None and self.hopeless[0] == "lost":
            return self.hopeless[1]
        return next((peer.lost for peer in list(self._connected.values()) if peer.lost), "")

    def hold(self, want: Want) -> None:
        """Tell the producer, from time to time, that these blocks are still wanted; not beyond the want's own end.

        Nobody drops what an engine wanted that stands still, and its producer is to have its blocks back all the same.
        """
        with self._changed:
            self._held[want.theirs, want.epoch] = (want.beat, time.monotonic() + want.seconds)
            self._poke()

    def drop(self, want: Want) -> None:
        """Tell it no more."""
        with self._changed:
            self._held.pop((want.theirs, want.epoch), None)

    def watch(self, key: object, ranks: Collection[int], payload: bytes, longest: float, seconds: float) -> None:
        """Tell these ranks something again and again, also when others of them are lost.

        So it is found out that a process has ended before the rendezvous misses it, which could not tell that from one
        that was stopped. It ends after so many seconds, also where nobody asks any more, or with no `ranks`.
        """
        with self._changed:
            self._watched.pop(key, None)
            if ranks:
                self._watched[key] = _Watch(frozenset(ranks), payload, longest, time.monotonic() + seconds)
            self._poke()

    def need(self, seconds: float) -> None:
        """Connect, also while nothing is to be said."""
        with self._changed:
            self._needed_until = max(self._needed_until, time.monotonic() + seconds)
            self._poke()

    def problem(self, now: float, until: float) -> tuple[str, str] | None:
        """Why who needs it until then cannot go on, if that is its fault: a cause, and for people."""
        if self.hopeless is not None:
            return self.hopeless
        if self.lost:
            return "lost", self.lost
        if self.bound is None and now >= until:
            return "handshake", f"it was not reached in time. The last try ended so: {self.trouble}"
        return None

    def lost_rank(self, rank: int) -> str:
        """Why the connection to a rank broke; empty while it is there, or was not made."""
        peer = self._connected.get(rank)
        return peer.lost if peer is not None else ""

    def gone(self, rank: int) -> bool:
        """Whether nothing of a rank can arrive any more; not while it was only missed, or let go of here."""
        peer = self._connected.get(rank)
        return peer is not None and bool(gone(peer))

    def send(self, rank: int, payload: bytes) -> None:
        """Tell a rank of it something, as soon as it takes it."""
        with self._changed:
            self._outbox.append(_Message(rank, payload, time.monotonic()))
            self._poke()

    def lose(self, cause: str, why: str) -> None:
        """It will never be read from any more."""
        self.hopeless = self.hopeless or (cause, why)
        with self._changed:
            self._poke()

    @property
    def idle(self) -> bool:
        """Whether nothing is wanted of it, and nothing left to be said."""
        return not self._held and not self._outbox and time.monotonic() >= self._needed_until

    @property
    def watching(self) -> bool:
        """Whether ranks are told something again and again: of each it is to be found out when it is gone."""
        return bool(self._watched)

    @property
    def ended(self) -> bool:
        """Whether its thread has ended."""
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Let its thread end; `close` waits for that."""
        with self._changed:
            self._ended = True
            self._poke()

    def close(self, deadline: float) -> None:
        """End it, after what is still to be said was tried once more."""
        self.stop()
        if self.bound is None and self._directory is not None:
            self._directory.close(deadline)  # which wakes whoever waits in it for a rank that does not come
        if self._thread is not threading.current_thread():
            self._thread.join(deadline)

    def _poke(self) -> None:
        """Let the thread look again; whoever calls holds the lock."""
        self._poked = True
        self._changed.notify_all()

    def _was_poked(self) -> bool:
        return self._poked

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._ended:
                pause = self._turn(time.monotonic())
                with self._changed:
                    # What was said during the turn may have come too late for it.
                    self._changed.wait_for(self._was_poked, pause)
                    self._poked = False
            self._flush()
        except Closed as error:
            self.lose("lost", error.true)
        finally:
            self._let_go()

    def _turn(self, now: float) -> float:
        """Do what is due; how long nothing else will be."""
        watched = self._look_after(now)
        if self.hopeless is not None or self.lost:
            with self._changed:
                self.counts["given_up"] += len(self._outbox)
                self._outbox.clear()
                self._held.clear()
            return min(watched, 1.0)
        with self._changed:
            for key in [key for key, (_, until) in self._held.items() if until <= now]:
                del self._held[key]
        if self.idle:
            return min(watched, 1.0)
        if self.bound is None:
            wait = self._peers.ready_at(self.engine, self.incarnation) - now
            if wait > 0:
                return wait
            return 0.0 if self._try(now) else _AGAIN
        self._beat(now)
        self._flush()
        if self._outbox:
            return _AGAIN
        # Whoever is only needed, as one that writes, has no beat: what it waits for is to be woken.
        beat = max(0.0, self._beat_at - time.monotonic()) if self._held else 1.0
        return min(1.0, watched, beat)

    def _try(self, now: float) -> bool:
        """Try to connect; whether that is done."""
        try:
            self.bound = self._connect(now + _TRY)
            self._peers.reached(self.engine, self.incarnation)
        except (Incompatible, LayoutInvalid, DescriptionInvalid) as error:
            self.lose("incompatible", error.true)
        except Closed:
            if not self._ended:
                raise
        except TensorwayError as error:
            self.trouble = error.true
            self._peers.failed(self.engine, self.incarnation, now, time.monotonic())
            _log.debug("Engine %s was not reached: %s", self.engine, error)
        return self.bound is not None

    def _connect(self, until: float) -> BoundT | None:
        side, ground = self._side, self._side.ground
        lives = ground.engine(self.engine, max(0.1, until - time.monotonic()))
        if lives is None:
            true = "It is not in the rendezvous."
            raise DeadlineExceeded(f"Engine {self.engine} was to be reached.", true, "See whether it has started.")
        if lives.incarnation != self.incarnation:
            self.lose("lost", f"it was replaced by its incarnation {lives.incarnation[:12]}")
            return None
        records = ground.ranks(self.engine, self.incarnation, lives.ranks, until)
        targets = side.targets(self.engine, self.incarnation, records)
        if self._directory is None:
            # A link that takes this one's place joins before this one has said goodbye.
            name = f"{side.engine}.{side.incarnation}.r{side.rank}.{secrets.token_hex(4)}"
            says = {"engine": side.incarnation, "rank": str(side.rank)}
            self._directory = ground.join(side.endpoint, self.engine, self.incarnation, name, says)
            self._directory.live(max(0.1, until - time.monotonic()))
        found = self._directory.connect_all([f"r{rank}" for rank in targets], max(0.1, until - time.monotonic()))
        for rank in targets:
            peer = found[f"r{rank}"]
            if isinstance(peer, TensorwayError):
                raise peer
            if peer.incarnation != records[rank].incarnation:
                true = f"Its rank {rank} is another process than what it said that it holds."
                raise DeadlineExceeded(f"Engine {self.engine} was to be reached.", true, "Start it anew.")
            self._connected[rank] = peer
        return side.bind(self.engine, self.incarnation, records, dict(self._connected))

    def _beat(self, now: float) -> None:
        with self._changed:
            held = dict(self._held)
        if not held or now < self._beat_at or self.bound is None:
            return
        self._beat_at = now + min(beat for beat, _ in held.values())
        limit = min(messages.MAX_BYTES, self._side.endpoint.capabilities.max_notification)
        names = [messages.Held(request, epoch) for request, epoch in held]
        rank = min(self.bound.peers)  # a lease is the whole engine's: one rank passes it on
        for payload in messages.heartbeats(self._side.incarnation, self._side.rank, names, limit):
            self._deliver(_Message(rank, payload, now))

    def _look_after(self, now: float) -> float:
        """Tell those that are watched what is due; how long nothing else will be."""
        with self._changed:
            self._watched = {key: one for key, one in self._watched.items() if now < one.until}
            if self.bound is None:
                return 1.0  # what is due stays so: nobody can be told yet
            due = [one for one in self._watched.values() if one.at <= now]
            for one in due:
                one.at, one.pause = now + one.pause, min(2 * one.pause, one.longest)
            wait = min((one.at - now for one in self._watched.values()), default=1.0)
        for one in due:
            for rank in one.ranks:
                self._deliver(_Message(rank, one.payload, now))
        return wait

    def _flush(self) -> None:
        """Try everything that is to be said, once."""
        for _ in range(len(self._outbox)):
            message = self._outbox.popleft()
            if not self._deliver(message):
                if time.monotonic() - message.since < _LATEST:
                    self.counts["again"] += 1
                    with self._changed:
                        self._outbox.append(message)
                else:
                    self.counts["given_up"] += 1

    def _deliver(self, message: _Message) -> bool:
        """Whether nothing is left to be done about it."""
        if self.bound is None:
            return False
        peer = self.bound.peers.get(message.rank)
        if peer is None:  # who is told nothing is not connected, whatever it asked for
            return True
        try:
            self._side.endpoint.notify(peer, message.payload, _SEND)
        except Closed:
            raise
        except TensorwayError as error:
            _log.debug("Engine %s took no message: %s", self.engine, error)
            if isinstance(error, PeerLost):
                peer.lost = peer.lost or error.true
            return bool(peer.lost)
        self.counts["sent"] += 1
        return True

    def _let_go(self) -> None:
        if self._directory is not None:
            self._directory.close()
        for peer in self._connected.values():
            self._side.endpoint.disconnect(peer)
