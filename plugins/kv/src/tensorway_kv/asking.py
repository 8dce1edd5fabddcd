"""What one rank would read of another and lets it write instead: asked for, answered, or given up.

May import the core and this package's links and orders. To `pulls` it is a transfer like one of its own: pending, then
done or failed, and released when nothing is written here any more. That is when the other has answered, or is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol
from weakref import WeakKeyDictionary

from tensorway.errors import MemoryInvalid, PeerLost, TensorwayError, TransferCancelled, TransferFailed
from tensorway.transport import State
from tensorway_kv import messages
from tensorway_kv.bound import Bound
from tensorway_kv.links import Link, Reader
from tensorway_kv.orders import Fetch
from tensorway_kv.reads import Batch

#: Bytes of one rank from which on it is asked: the messages take a few milliseconds.
WORTH: Final = 8 << 20
#: Seconds between two times that a rank is told something, at most: so it is found out that it is gone.
_AGAIN: Final = 2.0
#: Seconds after which a rank that was not heard of all the time will not go on: it may have been stopped, or cut off.
SILENCE: Final = 600.0
_FOREVER: Final = float("inf")


class Moving(Protocol):
    """What pulls and messages need of a transfer."""

    error: TensorwayError | None

    @property
    def nbytes(self) -> int:
        """How many bytes it moves."""

    @property
    def pieces(self) -> int:
        """In how many pieces, as far as they are ours."""

    @property
    def released(self) -> bool:
        """Whether nothing is written any more."""

    def poll(self) -> State:
        """Where it is."""

    def cancel(self) -> None:
        """Give it up."""


class Over:
    """Whether a rank will not write any more because its process is over."""

    def __init__(self) -> None:
        self._lost_at: dict[int, float] = {}

    def __call__(self, link: Link[Bound], rank: int, now: float) -> bool:
        """Who was only not heard of may go on; for a time."""
        if link.hopeless is not None:
            return True
        if not link.lost_rank(rank):
            return False
        return link.gone(rank) or now - self._lost_at.setdefault(rank, now) >= SILENCE


class Asked:
    """Blocks that a rank of the producer is to write to our pages."""

    pieces = 0  # they are the writer's

    def __init__(
        self, reader: Reader, link: Link[Bound], fetch: Fetch, rank: int, nbytes: int, done: Callable[[], object]
    ) -> None:
        """`done` is called once when nothing is written here any more."""
        self.nbytes = nbytes
        self.error: TensorwayError | None = None
        self._reader, self._link, self._fetch, self._rank = reader, link, fetch, rank
        self._state = State.PENDING
        self._answered, self._over, self._done = False, Over(), done

    def poll(self) -> State:
        """Where it is; an answer comes to `heard`."""
        why = self._link.lost_rank(self._rank)
        if why and self._state is State.PENDING:
            self._fail(PeerLost.because(self._asked, why))
        return self._state

    @property
    def released(self) -> bool:
        """Whether the other has said that it writes nothing more, or never will."""
        if not self._answered and self._over(self._link, self._rank, time.monotonic()):
            self._end()
        return self._answered

    def cancel(self) -> None:
        """Nobody wants it; the other is told so until it answers."""
        if self._state is State.PENDING:
            self._fail(TransferCancelled(self._asked, "It was given up by who asked.", "Nothing is owed."))

    def watch(self, message: messages.Message, seconds: float) -> None:
        """Tell the other something again and again."""
        self._link.watch(self, {self._rank}, messages.encode(message), _AGAIN, seconds)

    def heard(self, message: messages.Pushed | messages.Refusal) -> bool:
        """What the other says; whether that was waited for."""
        if self._answered:
            return False
        self._end()
        if self._state is not State.PENDING:
            return True
        if isinstance(message, messages.Pushed):
            self._state = State.DONE
        else:
            kind = MemoryInvalid if message.cause == "geometry" else TransferFailed
            true = f"Its rank {self._rank} writes nothing, or nothing more ({message.cause})."
            self._fail(kind(self._asked, true, "See its log."))
        return True

    # -- inside

    @property
    def _asked(self) -> str:
        return f"Engine {self._link.engine} was asked to write {self.nbytes:,} bytes."

    def _fail(self, error: TensorwayError) -> None:
        self._state, self.error = State.FAILED, error
        if not self._answered:
            me, want = self._reader, self._fetch.want
            self.watch(messages.Unask(me.incarnation, me.engine, me.rank, want.theirs, want.epoch), _FOREVER)

    def _end(self) -> None:
        self._answered = True
        self._link.watch(self, (), b"", 0.0, 0.0)
        self._done()


class Asking:
    """What one rank has asked others for and is not answered, by the life, the request, the lease and the rank."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._asked: dict[tuple[str, str, int, int], Asked] = {}
        #: The ranks that have said that they can answer. Nobody else is asked: who never answers keeps our pages.
        self._ready: WeakKeyDictionary[Link[Bound], set[int]] = WeakKeyDictionary()

    def greet(self, link: Link[Bound]) -> None:
        """Find out, once for each connection, which ranks can be asked; what is wanted before they say so is read."""
        if link.bound is None or link in self._ready:
            return
        self._ready[link], me = set(), self._reader
        for rank in link.bound.reads.producers:
            if self._slow(link.bound, rank):
                link.send(rank, messages.encode(messages.Greeting(me.incarnation, me.engine, me.rank)))

    def instead(
        self, link: Link[Bound], fetch: Fetch, rank: int, batches: Sequence[Batch], until: float
    ) -> Asked | None:
        """Ask a rank for what would be read of it; None if that is to be read.

        Memory of devices was not measured.
        """
        assert link.bound is not None, "nothing is fetched before it is connected"
        routes = link.bound.routes[rank]
        tables = [(routes[batch.route].local, routes[batch.route].remote, len(batch.local)) for batch in batches]
        nbytes = sum(local.block_bytes * local.width * count for local, _, count in tables)
        slow = self._slow(link.bound, rank) and rank in self._ready.get(link, ())
        devices = {table.device for both in tables for table in both[:2]}
        return self._ask(link, fetch, rank, nbytes, until) if slow and nbytes >= WORTH and devices == {"cpu"} else None

    def _slow(self, bound: Bound, rank: int) -> bool:
        return (bound.peers[rank].lane, "read") in self._reader.endpoint.capabilities.emulated

    def _ask(self, link: Link[Bound], fetch: Fetch, rank: int, nbytes: int, until: float) -> Asked | None:
        me, want = self._reader, fetch.want
        ask = messages.Ask(
            me.incarnation, me.engine, me.rank, want.theirs, want.epoch, messages.runs(fetch.their_blocks),
            fetch.tokens, messages.runs(fetch.blocks), fetch.start, fetch.stop,
            min(max(1e-3, until - time.monotonic()), 3600.0),
        )  # fmt: skip
        payload = messages.encode(ask)
        if len(payload) > min(messages.MAX_BYTES, me.endpoint.capabilities.max_notification):
            return None
        key = want.incarnation, want.theirs, want.epoch, rank
        asked = self._asked[key] = Asked(me, link, fetch, rank, nbytes, lambda: self._asked.pop(key, None))
        link.send(rank, payload)
        held = messages.Held(want.theirs, want.epoch)
        asked.watch(messages.Heartbeat(me.incarnation, me.rank, (held,)), until - time.monotonic())
        return asked

    def heard(self, message: messages.Ready | messages.Pushed | messages.Refusal) -> bool:
        """What a rank says of what it was asked for; whether that was waited for."""
        if isinstance(message, messages.Ready):
            links = [link for link in self._ready if link.incarnation == message.sender]
            for link in links:
                self._ready[link].add(message.rank)
            return bool(links)
        asked = self._asked.get((message.sender, message.request, message.epoch, message.rank))
        return asked is not None and asked.heard(message)
