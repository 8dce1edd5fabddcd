"""The store `direct`: a client of the service that one process of the deployment runs.

Room `rendezvous`; may import the ground and its own room. One thread owns the socket; callers leave it a frame and wait
for the answer. It connects anew by itself, sends again what may be sent twice, and tells watches what they may have
missed.
"""

from __future__ import annotations

import itertools
import os
import queue
import random
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any, Final

import attrs
import zmq
from zmq.utils.monitor import recv_monitor_message

from tensorway import errors
from tensorway.decoding import UNREADABLE
from tensorway.errors import Closed, DeadlineExceeded, RecordRefused, TensorwayError, Unauthenticated
from tensorway.rendezvous import frames
from tensorway.rendezvous.contract import Ability, Event, Record
from tensorway.rendezvous.frames import Answer, Change, Request, Row, Status
from tensorway.rendezvous.service import Service

#: A client that watches says something at least so often.
_PING: Final = 5.0
#: Events that nobody fetched; beyond that they are dropped, and a reset says so.
_MAX_EVENTS: Final = 65_536
_EVENTS: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_DISCONNECTED
_REFUSED: Final = ("RecordRefused", "LeaseLost")


@attrs.define(eq=False)
class _Pending:
    """A request under way."""

    frame: bytes
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
        self._context = zmq.Context()
        try:
            self._socket = self._context.socket(zmq.DEALER)
            self._monitor = self._socket.get_monitor_socket(_EVENTS)
            self._connect(secret)
        except BaseException:
            self._context.destroy(0)
            raise
        self._numbers = itertools.count(1)
        self._outgoing: deque[bytes] = deque()
        self._pending: dict[int, _Pending] = {}
        self._watches: dict[int, _Watched] = {}
        self._lock = threading.Lock()
        self._refused = self._met = self._closed = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._pump, name="tensorway-rendezvous-client", daemon=True)
        self._thread.start()

    def _connect(self, secret: str) -> None:
        frames.bounded(self._socket)
        public, private = zmq.curve_keypair()
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, frames.service_keys(secret)[0])
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, private)
        # Doubled after each try: who starts with another pause comes at another moment, when all were cut at once.
        self._socket.setsockopt(zmq.RECONNECT_IVL, random.randint(20, 40))
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        # Who asks notices a dead connection, and tells the service when to: it need not ask a thousand clients itself.
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
        self._socket.setsockopt(zmq.HEARTBEAT_TTL, 6000)
        try:
            self._socket.connect(f"tcp://{self.address}")
        except zmq.ZMQError as error:
            raise errors.AddressInvalid(
                f"A rendezvous at {self.address!r} was to be entered.",
                f"That is no address: {error.strerror}.",
                "Write host:port, and brackets around an IPv6 address: [fd00::1]:5600.",
            ) from error

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
                self._queue(frames.encode(Request(frames.PROTOCOL, 0, "unwatch", expected=number)))

    def close(self) -> None:
        """Disconnect; whoever waits for an answer is told."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.eventfd_write(self._wake, 1)
        self._thread.join(5)
        if self._service is not None:
            self._service.close()

    # -- one call

    def _call(self, seconds: float, call: str, number: int = 0, **fields: Any) -> Answer:
        until = time.monotonic() + seconds
        while True:
            used = number or next(self._numbers)
            pending = _Pending(frames.encode(Request(frames.PROTOCOL, used, call, **fields)))
            with self._lock:
                self._check(call)
                self._pending[used] = pending
                self._queue(pending.frame)
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
        if self._refused:
            raise Unauthenticated(
                f"The rendezvous at {self.address} was asked to {call}.",
                "It refused the connection: the secret differs, or it is no rendezvous.",
                "Compare TENSORWAY_SECRET here and there, and the address.",
            )

    def _unanswered(self, call: str, seconds: float) -> DeadlineExceeded:
        true = (
            f"No answer came (the deadline was {seconds:g} s); it may have been done all the same."
            if self._met
            else f"Nothing answered there within {seconds:g} s."
        )
        to_do = "See whether the process that runs the rendezvous lives, and whether this host reaches it."
        return DeadlineExceeded(f"The rendezvous at {self.address} was asked to {call}.", true, to_do)

    def _queue(self, frame: bytes) -> None:
        self._outgoing.append(frame)
        os.eventfd_write(self._wake, 1)

    # -- the thread that owns the socket

    def _pump(self) -> None:
        poller = zmq.Poller()
        for source in (self._socket, self._monitor, self._wake):
            poller.register(source, zmq.POLLIN)
        self._said = time.monotonic()
        try:
            while not self._closed:
                ready = {source for source, _ in poller.poll(int(_PING * 1000))}
                if self._monitor in ready:
                    self._connection(recv_monitor_message(self._monitor)["event"])
                if self._socket in ready:
                    self._hear()
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                if self._watches and time.monotonic() - self._said >= _PING:
                    self._outgoing.append(frames.encode(Request(frames.PROTOCOL, 0, "ping")))
                self._send()
        finally:
            self._context.destroy(0)
            with self._lock:
                self._closed = True
                os.close(self._wake)
            self._break_all()

    def _send(self) -> None:
        while self._outgoing:
            try:
                self._socket.send(self._outgoing[0], zmq.NOBLOCK)
            except zmq.Again:  # as many as may wait for a connection do: callers' deadlines tell them
                return
            self._said = time.monotonic()
            self._outgoing.popleft()

    def _hear(self) -> None:
        for _ in range(256):
            try:
                head, *rest = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                reply = frames.decode_reply(head)
                changes = frames.decode_changes(b"".join(rest)) if rest else []
            except UNREADABLE:
                continue  # who knows the secret and talks nonsense is not answered; the deadline tells the caller
            if isinstance(reply, Answer):
                self._answered(reply)
            elif (watched := self._watches.get(reply.watch)) is not None:
                watched.tell(reply.order, changes)

    def _answered(self, answer: Answer) -> None:
        pending, watched = self._pending.get(answer.number), self._watches.get(answer.number)
        if watched is not None:
            watched.since = answer.revision
        if pending is not None:
            pending.answer = answer
            pending.arrived.set()
        elif watched is not None:  # it is watched again, and only now does reading again miss nothing
            watched.reset()

    def _connection(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            with self._lock:
                again, self._met = self._met, True
                watches = list(self._watches.values()) if again else []
            for watched in watches:  # the service knows us under a new name, or is another
                request = Request(frames.PROTOCOL, watched.number, "watch", key=watched.prefix)
                self._outgoing.append(frames.encode(request))
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and not self._met:
            self._refused = True
            self._break_all()
        elif event == zmq.EVENT_DISCONNECTED:
            self._break_all()

    def _break_all(self) -> None:
        with self._lock:
            for pending in self._pending.values():
                pending.arrived.set()


class _Watched:
    """See `contract.Changes`."""

    def __init__(self, store: DirectStore, number: int, prefix: str) -> None:
        self.number = number
        self.prefix = prefix
        #: The service's revision when it began.
        self.since = 0
        self._store = store
        self._order = 0
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def next(self, seconds: float) -> list[Event]:
        """What happened."""
        events: list[Event] = []
        with suppress(queue.Empty):
            events.append(self._events.get(timeout=max(0.0, seconds)))
            while True:
                events.append(self._events.get_nowait())
        return events

    def tell(self, order: int, changes: list[Change]) -> None:
        """Some changes arrived."""
        if order != self._order + 1 or self._events.qsize() + len(changes) > _MAX_EVENTS:
            self.reset()
        self._order = order
        for change in changes:
            if change.revision <= self.since:
                continue
            record = _record(change.row) if change.row else None
            kind: Any = change.kind if change.kind in ("put", "deleted", "expired") else "reset"
            self._events.put(Event(kind, change.key, record))

    def reset(self) -> None:
        """Something may have been missed; what nobody fetched is as old as that."""
        self._order = 0
        with suppress(queue.Empty):
            while True:
                self._events.get_nowait()
        self._events.put(Event("reset", self.prefix))

    def close(self) -> None:
        """No more; who waits for the next is woken."""
        self._store.forget(self.number)
        self._events.put(Event("reset", self.prefix))


def _checked(answer: Answer) -> Answer:
    if answer.error:
        kind = getattr(errors, answer.error) if answer.error in _REFUSED else RecordRefused
        error: TensorwayError = kind(*answer.refused)
        raise error
    return answer


def _record(row: Row) -> Record:
    return Record(row.key, row.value, row.revision, row.lease)
