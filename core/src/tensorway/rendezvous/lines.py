"""Connections to a service of `direct`, and the thread that owns those of this process, however many clients it has.

Room `rendezvous`; may import the ground and its own room. A socket of ZeroMQ belongs to one thread: callers leave it
frames, and hear of what comes in that thread. It connects anew by itself.
"""

from __future__ import annotations

import functools
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from tensorway import errors
from tensorway.rendezvous import frames

#: A client that is `steady` says something at least so often.
_PING: Final = 5.0
#: Frames that one connection is heard before the next.
_TURN: Final = 256
_EVENTS: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_DISCONNECTED
#: A service that ends or is too busy cuts a connection that begins as well; one that does not know us always does.
_REFUSALS: Final = 3
#: Of all connections of a process: three each.
_MAX_SOCKETS: Final = 32_768
#: Seconds that the last one to leave waits for the thread.
_ENDING: Final = 5.0


class Client(Protocol):
    """Who has a connection; all is called in the thread that owns it, and is done at once."""

    def heard(self, parts: Sequence[bytes]) -> None:
        """A message came."""
        ...

    def met(self) -> None:
        """The service was connected to again; it knows us under a new name, or is another."""
        ...

    def cut(self) -> None:
        """No answer comes to what was said so far."""
        ...

    @property
    def steady(self) -> bool:
        """Whether the service is to know that we are there."""
        ...


class Line:
    """A connection; threads may share it."""

    def __init__(self, address: str, secret: str, client: Client) -> None:
        self.client = client
        #: Whether the service was ever connected to; whether it would not have us.
        self.known = self.refused = False
        self._refusals = 0
        self._outgoing: deque[bytes] = deque()
        self._said = time.monotonic()
        self._owner = _entered()
        try:
            self._socket, self._monitor = _connected(self._owner.context, address, secret)
        except BaseException:
            _left(self._owner)
            raise
        self._owner.ask(functools.partial(self._owner.own, self))

    @property
    def sockets(self) -> tuple[zmq.Socket[Any], zmq.Socket[Any]]:
        """What it is to be polled for."""
        return self._socket, self._monitor

    def say(self, frame: bytes) -> None:
        """Send it, now or when there is a connection."""
        self._outgoing.append(frame)
        self._owner.ask(self._send)

    def close(self, seconds: float) -> None:
        """Disconnect; what was not sent is not."""
        ended = threading.Event()
        self._owner.ask(functools.partial(self._owner.disown, self, ended))
        ended.wait(seconds)
        _left(self._owner)

    # -- in the thread that owns the socket

    def shut(self) -> None:
        """Close the sockets; no answer comes any more."""
        _shut(*self.sockets)
        self.client.cut()

    def turn(self) -> None:
        """See what has arrived."""
        with suppress(zmq.Again):
            while True:
                self._connection(recv_monitor_message(self._monitor, zmq.NOBLOCK)["event"])
        with suppress(zmq.Again):
            for _ in range(_TURN):
                self.client.heard(self._socket.recv_multipart(zmq.NOBLOCK))
        self._send()

    def ping(self, now: float) -> None:
        """Say something, if nothing was said for long."""
        if self.client.steady and now - self._said >= _PING:
            self._outgoing.append(frames.encode(frames.Request(frames.PROTOCOL, 0, "ping")))
            self._send()

    def _send(self) -> None:
        while self._outgoing and not self._socket.closed:
            try:
                self._socket.send(self._outgoing[0], zmq.NOBLOCK)
            except zmq.Again:  # as many as may wait for a connection do: callers' deadlines tell them
                return
            self._said = time.monotonic()
            self._outgoing.popleft()

    def _connection(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            again, self.known, self.refused = self.known, True, False
            if again:
                self.client.met()
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and not self.known:
            self._refusals += 1
            self.refused = self._refusals >= _REFUSALS
            if self.refused:
                self.client.cut()
        elif event == zmq.EVENT_DISCONNECTED:
            self.client.cut()


class _Owner:
    """The thread, and the context of its sockets."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
        #: Connections, also those that are being made or closed.
        self.entered = 0
        self._lines: dict[Any, Line] = {}
        self._orders: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._ended = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._wake, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name="tensorway-rendezvous-clients", daemon=True)
        self._thread.start()

    def ask(self, order: Callable[[], None]) -> None:
        """Have the thread do something."""
        with self._lock:
            if not self._ended:
                self._orders.append(order)
                if len(self._orders) == 1:
                    os.eventfd_write(self._wake, 1)

    def own(self, line: Line) -> None:
        """Listen to a connection."""
        for socket in line.sockets:
            self._lines[socket] = line
            self._poller.register(socket, zmq.POLLIN)

    def disown(self, line: Line, ended: threading.Event) -> None:
        """Close a connection."""
        for socket in line.sockets:
            if self._lines.pop(socket, None) is not None:
                self._poller.unregister(socket)
        line.shut()
        ended.set()

    def end(self) -> None:
        """No more; called once, when nobody is there."""
        self.ask(self._end)
        self._thread.join(_ENDING)

    def _end(self) -> None:
        self._ended = True

    def _run(self) -> None:
        looked = time.monotonic()
        try:
            while not self._ended:
                ready = [source for source, _ in self._poller.poll(int(_PING * 1000))]
                for line in dict.fromkeys(self._lines[source] for source in ready if source in self._lines):
                    line.turn()
                if self._wake in ready:
                    self._obey()
                if (now := time.monotonic()) - looked >= _PING:
                    looked = now
                    for line in set(self._lines.values()):
                        line.ping(now)
        finally:
            with self._lock:
                self._ended = True
                os.close(self._wake)
            for line in set(self._lines.values()):
                line.shut()
            self.context.destroy(0)

    def _obey(self) -> None:
        with self._lock:
            os.eventfd_read(self._wake)
            orders, self._orders = self._orders, []
        for order in orders:
            order()


_owners: dict[int, _Owner] = {}
_entering = threading.Lock()
os.register_at_fork(before=_entering.acquire, after_in_parent=_entering.release, after_in_child=_entering.release)


def _entered() -> _Owner:
    """The owner in this process, for one connection more."""
    with _entering:
        owner = _owners.get(os.getpid()) or _owners.setdefault(os.getpid(), _Owner())
        owner.entered += 1
        return owner


def _left(owner: _Owner) -> None:
    """One connection less; with the last one its owner ends."""
    with _entering:
        owner.entered -= 1
        last = owner.entered == 0
        if last:
            del _owners[os.getpid()]
    if last:
        owner.end()


def _connected(context: zmq.Context[Any], address: str, secret: str) -> tuple[zmq.Socket[Any], zmq.Socket[Any]]:
    """A socket that will connect, and the one that tells what becomes of that."""
    socket = context.socket(zmq.DEALER)
    monitor = socket.get_monitor_socket(_EVENTS)
    try:
        frames.bounded(socket)
        public, private = zmq.curve_keypair()
        socket.setsockopt(zmq.CURVE_SERVERKEY, frames.service_keys(secret)[0])
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, private)
        # Doubled after each try: who starts with another pause comes at another moment, when all were cut at once.
        socket.setsockopt(zmq.RECONNECT_IVL, random.randint(20, 40))
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        # Who asks notices a dead connection, and tells the service when to: it need not ask a thousand clients itself.
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
        socket.setsockopt(zmq.HEARTBEAT_TTL, 6000)
        socket.connect(f"tcp://{address}")
    except zmq.ZMQError as error:
        _shut(socket, monitor)
        raise errors.AddressInvalid(
            f"A rendezvous at {address!r} was to be entered.",
            f"That is no address: {error.strerror}.",
            "Write host:port, and brackets around an IPv6 address: [fd00::1]:5600.",
        ) from error
    return socket, monitor


def _shut(socket: zmq.Socket[Any], monitor: zmq.Socket[Any]) -> None:
    socket.disable_monitor()
    socket.close(0)
    monitor.close(0)
