"""The store `direct`: a client of the service that one process of the deployment runs.

Room `rendezvous`; may import the ground and its own room. Callers leave their frame and wait for the answer. What may
be sent twice is sent again, and watches are told what they may have missed.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import attrs

from tensorway import errors
from tensorway.decoding import UNREADABLE
from tensorway.errors import Closed, DeadlineExceeded, RecordRefused, TensorwayError, Unauthenticated
from tensorway.rendezvous import frames
from tensorway.rendezvous.contract import Ability, Event, Record
from tensorway.rendezvous.frames import Answer, Change, Request, Row, Status
from tensorway.rendezvous.lines import Line
from tensorway.rendezvous.service import Service

#: Bytes of changes that nobody fetched; beyond that they are dropped, and a reset says so.
_MAX_UNREAD: Final = 4 * frames.MAX_FRAME
_REFUSED: Final = ("RecordRefused", "LeaseLost")


@attrs.define(eq=False)
class _Pending:
    """A request under way."""

    arrived: threading.Event = attrs.field(factory=threading.Event)
    answer: Answer | None = None


class DirectStore:
    """See `contract.Store`. Threads may share it."""

    name = "direct"
    abilities: frozenset[Ability] = frozenset({"lease", "watch", "compare"})
    authenticates = True

    def __init__(self, address: str, secret: str, service: Service | None = None) -> None:
        self.address = address
        #: The service itself, where this process runs it; it ends with the store.
        self._service = service
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._watches: dict[int, _Watched] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._line = Line(address, secret, self)

    def put(self, key: str, value: bytes, lease: str, expected: int | None, seconds: float) -> int:
        """Write."""
        return self._call(seconds, "put", key=key, value=value, lease=lease, expected=expected).revision

    def get(self, key: str, seconds: float) -> Record | None:
        """Read."""
        rows = self._call(seconds, "get", key=key).rows
        return _record(rows[0]) if rows else None

    def list(self, prefix: str, seconds: float) -> list[Record]:
        """All below a prefix."""
        return [_record(row) for row in self._call(seconds, "list", key=prefix).rows]

    def delete(self, key: str, expected: int | None, seconds: float) -> bool:
        """Remove."""
        return bool(self._call(seconds, "delete", key=key, expected=expected).revision)

    def grant(self, ttl: float, seconds: float) -> str:
        """A new lease."""
        return self._call(seconds, "grant", ttl=ttl).text

    def keep(self, lease: str, seconds: float) -> bool:
        """Begin its time anew."""
        return bool(self._call(seconds, "keep", lease=lease).revision)

    def revoke(self, lease: str, seconds: float) -> None:
        """End it."""
        self._call(seconds, "revoke", lease=lease)

    def changes(self, prefix: str, seconds: float) -> _Watched:
        """Watch a prefix."""
        watched = _Watched(self, next(self._numbers), prefix)
        with self._lock:
            self._watches[watched.number] = watched
        try:
            self._call(seconds, "watch", number=watched.number, key=prefix)
        except BaseException:
            self.forget(watched.number)
            raise
        return watched

    def status(self, prefix: str, seconds: float) -> Status:
        """What the service says about itself, and about the leases of records below a prefix."""
        return frames.status_of(self._call(seconds, "status", key=prefix).text)

    def forget(self, number: int) -> None:
        """A watch is closed."""
        with self._lock:
            if self._watches.pop(number, None) is not None and not self._closed:
                self._line.say(frames.encode(Request(frames.PROTOCOL, 0, "unwatch", expected=number)))

    def close(self) -> None:
        """Disconnect; whoever waits for an answer is told. The second call does nothing."""
        with self._lock:
            closed, self._closed = self._closed, True
        if closed:
            return
        self._line.close(5.0)
        if self._service is not None:
            self._service.close()

    # -- one call

    def _call(self, seconds: float, call: str, number: int = 0, **fields: Any) -> Answer:
        until = time.monotonic() + seconds
        while True:
            used = number or next(self._numbers)
            pending, frame = _Pending(), frames.encode(Request(frames.PROTOCOL, used, call, **fields))
            with self._lock:
                self._check(call)
                self._pending[used] = pending
                self._line.say(frame)
            pending.arrived.wait(max(0.0, until - time.monotonic()))
            with self._lock:
                self._pending.pop(used, None)
                if pending.answer is None:
                    self._check(call)
            if pending.answer is not None:
                return _checked(pending.answer)
            if time.monotonic() >= until or fields.get("expected") is not None:
                raise self._unanswered(call, seconds)

    def _check(self, call: str) -> None:
        if self._closed:
            raise Closed(f"The rendezvous was asked to {call}.", "It is closed.", "Enter it again.")
        if self._line.refused:
            raise Unauthenticated(
                f"The rendezvous at {self.address} was asked to {call}.",
                "It refused the connection: the secret differs, or it is no rendezvous.",
                "Compare TENSORWAY_SECRET here and there, and the address.",
            )

    def _unanswered(self, call: str, seconds: float) -> DeadlineExceeded:
        true = (
            f"No answer came (the deadline was {seconds:g} s); it may have been done all the same."
            if self._line.known
            else f"Nothing answered there within {seconds:g} s."
        )
        to_do = "See whether the process that runs the rendezvous lives, and whether this host reaches it."
        return DeadlineExceeded(f"The rendezvous at {self.address} was asked to {call}.", true, to_do)

    # -- in the thread that owns the connection

    def heard(self, parts: Sequence[bytes]) -> None:
        """An answer, or changes of a watch."""
        head, *rest = parts
        try:
            reply = frames.decode_reply(head)
        except UNREADABLE:
            return  # who knows the secret and talks nonsense is not answered; the deadline tells the caller
        if isinstance(reply, Answer):
            self._answered(reply)
        elif (watched := self._watches.get(reply.watch)) is not None:
            watched.tell(reply.order, b"".join(rest))

    def met(self) -> None:
        """Watch again."""
        with self._lock:
            watches = list(self._watches.values())
        for watched in watches:
            self._line.say(frames.encode(Request(frames.PROTOCOL, watched.number, "watch", key=watched.prefix)))

    def cut(self) -> None:
        """Who waits for an answer may ask again."""
        with self._lock:
            for pending in self._pending.values():
                pending.arrived.set()

    @property
    def steady(self) -> bool:
        """Who watches."""
        return bool(self._watches)

    def _answered(self, answer: Answer) -> None:
        pending, watched = self._pending.get(answer.number), self._watches.get(answer.number)
        if watched is not None:
            watched.since = answer.revision
        if pending is not None:
            pending.answer = answer
            pending.arrived.set()
        elif watched is not None:  # it is watched again, and only now does reading again miss nothing
            watched.reset()


class _Watched:
    """See `contract.Changes`. What arrives is left as it is until somebody asks, and nobody is woken twice for it."""

    def __init__(self, store: DirectStore, number: int, prefix: str) -> None:
        self.number = number
        self.prefix = prefix
        #: The service's revision when it began.
        self.since = 0
        self._store = store
        self._order = 0
        self._told: list[bytes] = []
        self._bytes = 0
        #: Whether something may have been missed before what was told.
        self._missed = False
        self._changed = threading.Condition()

    def next(self, seconds: float) -> list[Event]:
        """What happened."""
        until = time.monotonic() + seconds
        while True:
            events = self._taken(max(0.0, until - time.monotonic()))
            if events or time.monotonic() >= until:
                return events

    def _taken(self, seconds: float) -> list[Event]:
        with self._changed:
            self._changed.wait_for(lambda: self._told or self._missed, seconds)
            told, self._told, self._bytes = self._told, [], 0
            missed, self._missed = self._missed, False
        try:
            changes = [change for frame in told for change in frames.decode_changes(frame)]
        except UNREADABLE:  # who knows the secret and talks nonsense
            missed, changes = True, []
        events = [Event("reset", self.prefix)] if missed else []
        return events + [_event(change) for change in changes if change.revision > self.since]

    def tell(self, order: int, frame: bytes) -> None:
        """Some changes arrived."""
        with self._changed:
            if order != self._order + 1 or self._bytes + len(frame) > _MAX_UNREAD:
                self._miss()
            self._order = order
            self._told.append(frame)
            self._bytes += len(frame)
            self._changed.notify()

    def reset(self) -> None:
        """Something may have been missed; what nobody fetched is as old as that."""
        with self._changed:
            self._miss()

    def close(self) -> None:
        """No more; who waits for the next is woken."""
        self._store.forget(self.number)
        self.reset()

    def _miss(self) -> None:
        self._order, self._told, self._bytes, self._missed = 0, [], 0, True
        self._changed.notify()


def _event(change: Change) -> Event:
    kind: Any = change.kind if change.kind in ("put", "deleted", "expired") else "reset"
    return Event(kind, change.key, _record(change.row) if change.row else None)


def _checked(answer: Answer) -> Answer:
    if answer.error:
        kind = getattr(errors, answer.error) if answer.error in _REFUSED else RecordRefused
        error: TensorwayError = kind(*answer.refused)
        raise error
    return answer


def _record(row: Row) -> Record:
    return Record(row.key, row.value, row.revision, row.lease)
