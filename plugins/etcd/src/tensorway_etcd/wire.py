"""Sockets to etcd that keep a deadline, and the answer that never ends: the stream of a watch.

May import the standard library. What blocks without asking anybody how long, the lookup of a host's name, is done by a
thread that nobody waits for longer than they want to.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
import time
from typing import Any, Final

#: What one answer, or one event, may have: as much as a thousand large records, and no more than memory holds.
MAX_ANSWER: Final = 256 << 20
_MAX_HEAD: Final = 64 << 10
#: A connection over which nothing comes back is dead after about 15 s, and a watch then begins anew.
_KEEPALIVE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 15_000),
)


def left(until: float) -> float:
    """Seconds until then; raises `TimeoutError` when it is over, because 0 would mean something else to a socket."""
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the time is over")
    return seconds


def connect(host: str, port: int, tls: ssl.SSLContext | None, until: float) -> socket.socket:
    """A connected socket; raises `OSError` of the last address that was tried."""
    trouble: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in _addresses(host, port, until):
        sock = socket.socket(family, kind, protocol)
        try:
            for option in _KEEPALIVE:
                sock.setsockopt(*option)
            sock.settimeout(left(until))
            sock.connect(address)
            return tls.wrap_socket(sock, server_hostname=host) if tls else sock
        except OSError as error:
            trouble = error
            sock.close()
    raise trouble


def _addresses(host: str, port: int, until: float) -> list[Any]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass  # a name, and a name server may be slow or away
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=ask, name="tensorway-etcd-name", daemon=True)
    thread.start()
    thread.join(left(until))
    answer = found[0] if found else TimeoutError(f"no name server said where {host} is")
    if isinstance(answer, OSError):
        raise answer
    return list(answer)


class Stream:
    """An answer in chunks, line by line. One thread at a time; `wake` may come from any."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._raw = bytearray()
        self._text = bytearray()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        self._lock = threading.Lock()
        self._closed = False

    def status(self, until: float) -> int:
        """The answer's HTTP status."""
        while (end := self._raw.find(b"\r\n\r\n")) < 0:
            if len(self._raw) > _MAX_HEAD:
                raise ConnectionError("the answer is no HTTP")
            if not self._receive(until):
                raise TimeoutError("no answer began")
        head = bytes(self._raw[:end]).decode("latin-1").lower()
        del self._raw[: end + 4]
        words = head.split("\r\n")[0].split()
        if len(words) < 2 or not words[0].startswith("http/1.") or not words[1].isdigit():
            raise ConnectionError("the answer is no HTTP")
        if "transfer-encoding: chunked" not in head:
            raise ConnectionError(f"the answer, of status {words[1]}, comes in no chunks")
        return int(words[1])

    def line(self, until: float) -> bytes | None:
        """The next line; None when none came in time, or `wake` was called."""
        while (end := self._text.find(b"\n")) < 0:
            if not self._unwrap() and not self._receive(until):
                return None
        found = bytes(self._text[:end])
        del self._text[: end + 1]
        return found

    def wake(self) -> None:
        """Let whoever waits for a line return."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """No more."""
        with self._lock:  # or `wake` would write to a file that has the number of ours by then
            if not self._closed:
                self._closed = True
                self._sock.close()
                os.close(self._wake)

    def _unwrap(self) -> bool:
        """Take one chunk out of its frame; whether there was a whole one."""
        end = self._raw.find(b"\r\n")
        if end < 0:
            return False
        try:
            size = int(self._raw[:end].split(b";")[0], 16)
        except ValueError:
            raise ConnectionError("a chunk has no length") from None
        if size == 0 and self._text:
            self._text += b"\n"  # an error is not ended like a line
            return True
        if size == 0:
            raise ConnectionError("the stream was ended")
        if size + len(self._text) > MAX_ANSWER:
            raise ConnectionError("an event is larger than can be")
        if len(self._raw) < end + 2 + size + 2:
            return False
        self._text += self._raw[end + 2 : end + 2 + size]
        del self._raw[: end + 2 + size + 2]
        return True

    def _receive(self, until: float) -> bool:
        """Wait for more; False when the time is over or `wake` was called, and `OSError` when no more can come."""
        while True:
            try:
                data = self._sock.recv(256 << 10)
            except (BlockingIOError, ssl.SSLWantReadError):
                ready = dict(self._poll.poll(max(0.0, until - time.monotonic()) * 1000))
                if self._wake in ready or not ready:
                    return False
                continue
            if not data:
                raise ConnectionError("the stream was cut")
            self._raw += data
            return True
