"""The service of `direct`: one thread that holds the records and answers frames.

Room `rendezvous`; may import the ground and its own room. The socket is bound in the caller's thread, so that what is
wrong with the address is raised there. Whoever sends something that is no frame is not heard again, and nobody else
notices.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from typing import Any, Final

import attrs
import zmq

from tensorway._logging import logger
from tensorway.decoding import UNREADABLE
from tensorway.errors import RecordRefused, TensorwayError
from tensorway.rendezvous import frames
from tensorway.rendezvous.contract import Event, Record, check_key
from tensorway.rendezvous.frames import Answer, Change, Request, Row
from tensorway.rendezvous.hosts import HostChoice, cannot_listen, url
from tensorway.rendezvous.records import Records

_log = logger("rendezvous")
_MAX_WATCHES: Final = 16_384
#: A client that watches says that it is there more often than this.
_SILENCE: Final = 30.0
#: How exactly leases end.
_TICK_MS: Final = 100
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
        self._watches: list[_Watch] = []
        self._heard: dict[bytes, float] = {}
        self._ignored: deque[bytes] = deque(maxlen=_MAX_IGNORED)
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

    def close(self) -> None:
        """Stop; every record is gone, and clients wait for a service at this address until their deadlines."""
        self._stop.set()
        self._thread.join(5)

    def _serve(self) -> None:
        try:
            while not self._stop.is_set():
                if self._socket.poll(_TICK_MS):
                    self._answer_waiting()
                now = time.monotonic()
                self._records.expire(now)
                silent = {client for client, last in self._heard.items() if now - last > _SILENCE}
                if silent:
                    self._forget(silent)
        finally:
            self._context.destroy(0)

    def _answer_waiting(self) -> None:
        for _ in range(256):  # then leases get their turn, however many ask
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
                self._ignored.append(client)
                self._forget({client})
                continue
            self._send(client, frames.encode(self._answer(client, request)))

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

    def _watch(self, client: bytes, request: Request, _answer: Answer) -> None:
        check_key(request.key, "prefix")
        if len(self._watches) >= _MAX_WATCHES:
            raise RecordRefused(f"{request.key} was to be watched.", "The service has no room.", "Close other watches.")
        self._drop_watch(client, request.number)  # a client that heard no answer asks again
        self._watches.append(_Watch(client, request.number, request.key))
        self._heard[client] = time.monotonic()

    def _unwatch(self, client: bytes, request: Request, _answer: Answer) -> None:
        self._drop_watch(client, request.expected)

    def _drop_watch(self, client: bytes, number: int | None) -> None:
        self._watches = [watch for watch in self._watches if (watch.client, watch.number) != (client, number)]

    def _ping(self, client: bytes, _request: Request, _answer: Answer) -> None:
        if client in self._heard:
            self._heard[client] = time.monotonic()

    # -- sending

    def _changed(self, event: Event) -> None:
        for watch in list(self._watches):
            if event.key.startswith(watch.prefix):
                watch.sent += 1
                row = _row(event.record) if event.record else None
                self._send(watch.client, frames.encode(Change(watch.number, watch.sent, event.kind, event.key, row)))

    def _send(self, client: bytes, frame: bytes) -> None:
        try:
            self._socket.send_multipart([client, frame], zmq.NOBLOCK)
        except zmq.Again:
            pass  # it does not read: what it misses shows as a gap in the order of its changes
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._forget({client})  # it went away

    def _forget(self, clients: set[bytes]) -> None:
        self._watches = [watch for watch in self._watches if watch.client not in clients]
        for client in clients:
            self._heard.pop(client, None)


_CALLS: Final[dict[str, Any]] = {
    "put": Service._put,
    "get": Service._get,
    "list": Service._list,
    "delete": Service._delete,
    "grant": Service._grant,
    "keep": Service._keep,
    "revoke": Service._revoke,
    "watch": Service._watch,
    "unwatch": Service._unwatch,
    "ping": Service._ping,
}


def _row(record: Record) -> Row:
    return Row(record.key, record.value, record.revision, record.lease)


def _bind(context: zmq.Context[Any], choice: HostChoice, port: int, secret: str) -> tuple[zmq.Socket[Any], int]:
    public, private = frames.service_keys(secret)
    socket = context.socket(zmq.ROUTER)
    frames.bounded(socket)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, private)
    try:
        socket.bind(f"tcp://{url(choice.bind, port)}")
    except zmq.ZMQError as error:
        raise cannot_listen("A rendezvous", choice, port, error.strerror) from error
    bound = str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
    return socket, int(bound.rpartition(":")[2])
