"""What comes between a tier and its store: answers that are late, cut short, too long, changed, or none at all.

May import attrs. It passes requests on to a server of this machine, and does to each what its `fault` says.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import attrs

#: `status`: answer with `number` and pass nothing on; `hang`: say nothing; `drop`: hang up, before it is passed on, or
#: after (`lose`); `cut`: hang up after `number` bytes of the answer's body; `corrupt`: change the byte at `number`;
#: `long`: so many bytes more, as the answer's head says; `endless`: more bytes without end.
Kind = Literal["status", "hang", "drop", "lose", "cut", "corrupt", "long", "endless"]


@attrs.frozen
class Fault:
    """What is done to one request or its answer."""

    kind: Kind
    number: int = 0
    text: str = ""


#: By method and path, in the order of requests.
Faults = Callable[[str, str], Fault | None]


def fine(_method: str, _path: str) -> Fault | None:
    """No fault."""
    return None


class Proxy(ThreadingHTTPServer):
    """Listens on a port of its own; a test sets `fault`, and reads `seen`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = port
        self.port = int(self.server_address[1])
        self.fault: Faults = fine
        #: Methods and paths of what was asked.
        self.seen: list[tuple[str, str]] = []
        #: How those were answered that were passed on: method and status.
        self.answered: list[tuple[str, int]] = []
        #: Bytes of bodies that were sent back.
        self.sent = 0
        #: Ends what hangs.
        self.over = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up on purpose."""


@contextlib.contextmanager
def proxy(port: int) -> Iterator[Proxy]:
    """One in front of a port of this machine, until the block ends."""
    server = Proxy(port)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.path))
        fault = self.server.fault(self.command, self.path)
        self.close_connection = fault is not None
        if fault is not None and fault.kind in ("status", "hang", "drop"):
            if fault.kind == "status":
                self._answer(fault.number, {}, fault.text.encode())
            elif fault.kind == "hang":
                self.server.over.wait(60)
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            said = response.read()
            self.server.answered.append((self.command, response.status))
            if fault is None or fault.kind != "lose":
                self._answer(response.status, dict(response.getheaders()), said, fault)
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, fault: Fault | None = None) -> None:
        kind, number = (fault.kind, fault.number) if fault is not None else ("", 0)
        if kind == "corrupt" and body:
            at = number % len(body)
            body = body[:at] + bytes([body[at] ^ 0x40]) + body[at + 1 :]
        if kind == "long":
            body += bytes(number)
        length = str(len(body)) if self.command != "HEAD" else headers.get("Content-Length", "0")
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        if self.close_connection:  # or the client sends its next request where nobody listens any more
            self.send_header("Connection", "close")
        self.send_header("Content-Length", length if kind != "endless" else str(1 << 40))
        self.end_headers()
        if self.command != "HEAD":
            self._write(body[:number] if kind == "cut" else body)
        while kind == "endless" and not self.server.over.is_set():
            self._write(bytes(1 << 16))

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.server.sent += len(data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass  # noqa: N815 - the names that the base class looks for
