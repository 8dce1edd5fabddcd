"""The service of `direct`: one thread that holds the records and answers frames.

Room `rendezvous`; may import the ground and its own room. The socket is bound in the caller's thread, so that what is
wrong with the address is raised there. Whoever sends something that is no frame is not heard again, and nobody else
notices.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterable
from typing import Any, Final

import attrs
import zmq

from tensorway._logging import logger
from tensorway.decoding import UNREADABLE
from tensorway.errors import RecordRefused, TensorwayError
from tensorway.process import resident_bytes
from tensorway.rendezvous import frames
from tensorway.rendezvous.contract import Event, Record, check_key
from tensorway.rendezvous.frames import Answer, Change, Request, Row, Status, Told
from tensorway.rendezvous.hosts import HostChoice, cannot_listen, url
from tensorway.rendezvous.records import Records

_log = logger("rendezvous")
_MAX_WATCHES: Final = 16_384
#: A client that watches says something more often than this.
_SILENCE: Final = 30.0
#: How exactly leases end, in seconds.
_TICK: Final = 0.1
#: Requests that are answered before leases get their turn, and changes are told.
_TURN: Final = 256
#: Changes that are told at once; a single one may be larger.
_MAX_TOLD: Final = 1 << 20
#: Clients that may connect at the same moment: after a restart all of them do.
_BACKLOG: Final = 4096
#: Who sent something that is no frame; the oldest are forgotten.
_MAX_IGNORED: Final = 4096


@attrs.define
class _Watch:
    client: bytes
    number: int
    prefix: str
    sent: int = 0


class Service:
    """Records for everybody who knows the secret, until `close`."""

    def __init__(self, choice: HostChoice, port: int, secret: str) -> None:
        #: Which life of the service this is; its clients notice when it changes.
        self.incarnation = uuid.uuid4().hex
        self._records = Records(self._changed)
        self._watches: dict[tuple[bytes, int], _Watch] = {}
        self._untold: list[Change] = []
        self._untold_bytes = 0
        self._heard: dict[bytes, float] = {}
        self._ignored: dict[bytes, None] = {}
        self._began = time.monotonic()
        self._calls: dict[str, int] = dict.fromkeys(_CALLS, 0)
        self._changes = self._changes_frames = 0
        self._stop = threading.Event()
        self._context = zmq.Context()
        try:
            self._socket, bound = _bind(self._context, choice, port, secret)
        except BaseException:
            self._context.destroy(0)
            raise
        #: Where clients reach it: `host:port`, with brackets around an IPv6 address.
        self.address = url(choice.advertise, bound)
        self._thread = threading.Thread(target=self._serve, name="tensorway-rendezvous", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive()

    def status(self, prefix: str | None = None) -> Status:
        """How it is; only its own thread may ask for the leases of records below a prefix."""
        now, records = time.monotonic(), self._records
        return Status(
            incarnation=self.incarnation,
            seconds=now - self._began,
            memory_bytes=resident_bytes(),
            record_bytes=records.nbytes,
            records=records.count,
            held_leases=records.leases,
            watches=len(self._watches),
            calls={call: count for call, count in self._calls.items() if count},
            changes=self._changes,
            changes_frames=self._changes_frames,
            leases={} if prefix is None else records.left(prefix, now),
        )

    def close(self) -> None:
        """Stop; every record is gone, and clients wait for a service at this address until their deadlines."""
        self._stop.set()
        self._thread.join(5)

    def _serve(self) -> None:
        looked = 0.0
        try:
            while not self._stop.is_set():
                if self._socket.poll(int(_TICK * 1000)):
                    self._answer_waiting()
                now = time.monotonic()
                if now - looked >= _TICK:
                    looked = now
                    self._records.expire(now)
                    self._forget({client for client, last in self._heard.items() if now - last > _SILENCE})
                self._tell()
        finally:
            self._context.destroy(0)

    def _answer_waiting(self) -> None:
        for _ in range(_TURN):
            try:
                client, frame = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except ValueError:  # a message of another number of parts
                continue
            if client in self._ignored:
                continue
            try:
                request = frames.decode_request(frame)
            except UNREADABLE as error:
                _log.warning("A client sent what is no frame (%s) and is not heard again.", error)
                self._ignore(client)
                continue
            if client in self._heard:
                self._heard[client] = time.monotonic()
            self._send(client, frames.encode(self._answer(client, request)))

    def _ignore(self, client: bytes) -> None:
        self._forget({client})
        self._ignored[client] = None
        if len(self._ignored) > _MAX_IGNORED:
            self._ignored.pop(next(iter(self._ignored)))

    def _answer(self, client: bytes, request: Request) -> Answer:
        answer = Answer(request.number, self.incarnation)
        call = _CALLS.get(request.call)
        try:
            if request.protocol != frames.PROTOCOL or call is None:
                raise RecordRefused(
                    f"The call {request.call} of protocol {request.protocol} was sent.",
                    f"This service speaks protocol {frames.PROTOCOL}, and calls: {', '.join(_CALLS)}.",
                    "Install one version of tensorway in the whole deployment.",
                )
            self._calls[request.call] += 1
            call(self, client, request, answer)
        except TensorwayError as error:
            answer.error, answer.refused = type(error).__name__, (error.asked, error.true, error.to_do)
        return answer

    # -- the calls

    def _put(self, _client: bytes, request: Request, answer: Answer) -> None:
        answer.revision = self._records.put(request.key, request.value, request.lease, request.expected)

    def _get(self, _client: bytes, request: Request, answer: Answer) -> None:
        record = self._records.get(request.key)
        answer.rows = [_row(record)] if record else []

    def _list(self, _client: bytes, request: Request, answer: Answer) -> None:
        answer.rows = [_row(record) for record in self._records.list(request.key)]
        if sum(len(row.value) + len(row.key) + 64 for row in answer.rows) > frames.MAX_FRAME - 1024:
            answer.rows = []
            raise RecordRefused(
                f"All records below {request.key} were asked for.",
                f"Together they have more than the {frames.MAX_FRAME:,} bytes of one answer.",
                "Ask for a longer prefix, or put less into each.",
            )

    def _delete(self, _client: bytes, request: Request, answer: Answer) -> None:
        answer.revision = int(self._records.delete(request.key, request.expected))

    def _grant(self, _client: bytes, request: Request, answer: Answer) -> None:
        answer.text = self._records.grant(request.ttl, time.monotonic())

    def _keep(self, _client: bytes, request: Request, answer: Answer) -> None:
        answer.revision = int(self._records.keep(request.lease, time.monotonic()))

    def _revoke(self, _client: bytes, request: Request, _answer: Answer) -> None:
        self._records.revoke(request.lease)

    def _watch(self, client: bytes, request: Request, answer: Answer) -> None:
        check_key(request.key, "prefix")
        if len(self._watches) >= _MAX_WATCHES:
            raise RecordRefused(f"{request.key} was to be watched.", "The service has no room.", "Close other watches.")
        answer.revision = self._records.revision
        # A client that heard no answer asks again.
        self._watches[client, request.number] = _Watch(client, request.number, request.key)
        self._heard[client] = time.monotonic()

    def _unwatch(self, client: bytes, request: Request, _answer: Answer) -> None:
        self._watches.pop((client, request.expected or 0), None)

    def _ping(self, client: bytes, _request: Request, _answer: Answer) -> None:
        """Whatever a client says tells that it is there."""

    def _status(self, _client: bytes, request: Request, answer: Answer) -> None:
        answer.text = frames.encode_status(self.status(request.key)).decode()

    # -- sending

    def _changed(self, event: Event) -> None:
        size = len(event.key) + 64 + (len(event.record.value) if event.record else 0)
        if self._untold_bytes + size > _MAX_TOLD:
            self._tell()
        row = _row(event.record) if event.record else None
        self._untold.append(Change(event.kind, event.key, self._records.revision, row))
        self._untold_bytes += size

    def _tell(self) -> None:
        """Send what has changed to who watches.

        A thousand that start together make a thousand changes for each of a thousand: so those of one turn are one
        frame, which is encoded once and lies in memory once, however many it is for.
        """
        changes, self._untold, self._untold_bytes = self._untold, [], 0
        if not changes:
            return
        bodies: dict[str, tuple[int, zmq.Frame]] = {}
        for watch in list(self._watches.values()):
            count, body = bodies.get(watch.prefix) or bodies.setdefault(watch.prefix, _body(changes, watch.prefix))
            if count:
                watch.sent += 1
                self._changes += count
                self._changes_frames += 1
                self._send(watch.client, frames.encode(Told(watch.number, watch.sent)), body)

    def _send(self, client: bytes, *parts: bytes | zmq.Frame) -> None:
        try:
            self._socket.send_multipart([client, *parts], zmq.NOBLOCK)
        except zmq.Again:
            pass  # it does not read: what it misses shows as a gap in the order of its changes
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._forget({client})  # it went away

    def _forget(self, clients: set[bytes]) -> None:
        watching = {client for client in clients if self._heard.pop(client, None) is not None}
        if watching:
            self._watches = {at: watch for at, watch in self._watches.items() if watch.client not in watching}


_NAMES: Final = ("put", "get", "list", "delete", "grant", "keep", "revoke", "watch", "unwatch", "ping", "status")
_CALLS: Final[dict[str, Any]] = {name: getattr(Service, f"_{name}") for name in _NAMES}


def _row(record: Record) -> Row:
    return Row(record.key, record.value, record.revision, record.lease)


def _body(changes: Iterable[Change], prefix: str) -> tuple[int, zmq.Frame]:
    below = [change for change in changes if change.key.startswith(prefix)]
    return len(below), zmq.Frame(frames.encode(below))


def _bind(context: zmq.Context[Any], choice: HostChoice, port: int, secret: str) -> tuple[zmq.Socket[Any], int]:
    if not 0 <= port <= 65_535:  # ZeroMQ would take what is left of it
        raise cannot_listen("A rendezvous", choice, port, "no port has that number")
    public, private = frames.service_keys(secret)
    socket = context.socket(zmq.ROUTER)
    frames.bounded(socket)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.BACKLOG, _BACKLOG)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, private)
    try:
        socket.bind(f"tcp://{url(choice.bind, port)}")
    except zmq.ZMQError as error:
        raise cannot_listen("A rendezvous", choice, port, error.strerror) from error
    bound = str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
    return socket, int(bound.rpartition(":")[2])
