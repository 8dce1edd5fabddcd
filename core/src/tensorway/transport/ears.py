"""What an endpoint of `local` hears: who knocks, what peers send, and that a peer has ended; and how to knock.

Room `transport`; may import the ground and its own room. One thread over a Unix socket in the abstract namespace, of
which the kernel says who is at the other end. Whoever sends what is no message loses the connection, and nobody else
anything.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec

from tensorway.decoding import UNREADABLE
from tensorway.transport import sockets
from tensorway.transport.contract import Notification
from tensorway.transport.description import identifier

MAX_NOTIFICATION: Final = 65_536
#: Notifications that nobody has fetched, and their bytes; beyond that senders wait.
_MAX_QUEUED: Final = 65_536
_MAX_QUEUED_BYTES: Final = 64 << 20
#: Peers that may be connected to one endpoint.
_MAX_SENDERS: Final = 4096
#: How long to wait for what is full.
FULL_PAUSE: Final = 500e-6
#: In front of a notification, because an empty message would look like the end of the connection.
NOTE: Final = b"n"
_CREDENTIALS: Final = struct.Struct("3i")


class Hello(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The first message on a connection."""

    name: str
    incarnation: str


_DECODE_HELLO: Final = msgspec.msgpack.Decoder(Hello).decode


def address(incarnation: str) -> bytes:
    """Where an endpoint listens."""
    return b"\0tensorway-local-" + incarnation.encode()


def knock(channel: socket.socket, incarnation: str, deadline: float) -> None:
    """Connect to an endpoint."""
    while True:
        try:
            channel.connect(address(incarnation))
            return
        except BlockingIOError:  # as many as may wait for it to accept them wait: it is stopped, or very busy
            if time.monotonic() >= deadline:
                raise TimeoutError from None
            time.sleep(FULL_PAUSE)


def whose(channel: socket.socket) -> tuple[int, bool]:
    """The process at the other end, by the kernel's word, and whether its user is this one or root."""
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(credentials)
    return pid, uid in (os.getuid(), 0)


class Ears:
    """The thread that listens, and what it has heard."""

    def __init__(self, incarnation: str, notice: Callable[[Any], None]) -> None:
        """`notice` is called with what `watch` was given once that connection has something to say."""
        self._notice = notice
        self._queue: deque[Notification] = deque()
        #: Bytes that were put into the queue since it was empty, which is as far as only one thread can count.
        self._bytes = 0
        self._senders: dict[socket.socket, Hello | None] = {}
        self._closed = False
        (self._listener,) = sockets.kept(sockets.unix_socket)
        self._listener.bind(address(incarnation))
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._wake_in, self._wake_out = sockets.kept(socket.socketpair)
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._listen, name="tensorway-local-ears", daemon=True)
        self._thread.start()

    def receive(self) -> list[Notification]:
        """What has arrived."""
        arrived = []
        while self._queue:
            arrived.append(self._queue.popleft())
        return arrived

    def watch(self, channel: socket.socket, link: object) -> None:
        """Listen at a connection to a peer, too, from which nothing comes but its end."""
        with contextlib.suppress(ValueError):  # this was closed meanwhile
            self._selector.register(channel, selectors.EVENT_READ, link)

    def unwatch(self, channel: socket.socket) -> None:
        """Not any more; may not have been watched."""
        with contextlib.suppress(KeyError, ValueError, OSError):
            self._selector.unregister(channel)

    def close(self) -> None:
        """Stop listening; peers see their connections close."""
        self._closed = True
        self._wake_out.send(b"x")
        self._thread.join(5)
        self.close_files()

    def close_files(self) -> None:
        """All that is left to do in a forked child, where the thread is not."""
        for channel in (self._listener, self._wake_in, self._wake_out, *self._senders):
            sockets.close(channel)
        self._selector.close()

    def _listen(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif key.data is not None:
                    self._notice(key.data)
                elif key.fileobj is not self._wake_in:
                    self._hear(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        try:
            (channel,) = sockets.kept(lambda: self._listener.accept()[:1])
        except OSError:  # who knocked went away; or this process has no file left, and they stay at the door
            time.sleep(FULL_PAUSE)
            return
        if not whose(channel)[1] or len(self._senders) >= _MAX_SENDERS:
            sockets.close(channel)
            return
        channel.setblocking(False)
        self._senders[channel] = None
        self._selector.register(channel, selectors.EVENT_READ)

    def _hear(self, channel: socket.socket) -> None:
        """One message; anything that is not one costs its sender the connection, and nobody else anything."""
        try:
            message = channel.recv(MAX_NOTIFICATION + 2)  # longer ones are cut, not split
            if not 0 < len(message) <= MAX_NOTIFICATION + 1:
                raise ConnectionResetError
            sender = self._senders[channel]
            if sender is None:
                self._senders[channel] = _greeting(message)
            elif message[:1] == NOTE:
                self._enqueue(Notification(sender.name, sender.incarnation, message[1:]))
            else:
                raise ConnectionResetError
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, *UNREADABLE):
            self._selector.unregister(channel)
            del self._senders[channel]
            sockets.close(channel)

    def _enqueue(self, notification: Notification) -> None:
        # While nobody fetches, nobody is heard: the senders' queues fill, and their deadlines tell them.
        while self._queue and (len(self._queue) >= _MAX_QUEUED or self._bytes >= _MAX_QUEUED_BYTES):
            if self._closed:
                return
            time.sleep(FULL_PAUSE)
        self._bytes = len(notification.payload) + (self._bytes if self._queue else 0)
        self._queue.append(notification)


def _greeting(message: bytes) -> Hello:
    hello = _DECODE_HELLO(message)
    if not (identifier(hello.name) and identifier(hello.incarnation)):
        raise ConnectionResetError
    return hello
