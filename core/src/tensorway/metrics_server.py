"""What Prometheus asks: `GET /metrics` of this process, from whatever sources an application has registered.

Ground; may import `metrics`, the loggers and the errors. Nothing in tensorway opens one: an application does, and says
where. Whoever asks is a stranger: a request is small and short, only so many are answered at once, nothing of it
is written anywhere, and a source that raises costs its own values only.
"""

from __future__ import annotations

import io
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any, Final

from tensorway._logging import logger
from tensorway.errors import AddressInvalid, DeadlineExceeded
from tensorway.metrics import Metric, Sample, exposition

_log = logger("metrics")
#: The most that a request's head may have, and the seconds that reading it, and writing the answer, may take.
MAX_HEAD: Final = 8192
PATIENCE: Final = 5.0
#: Requests that are answered at once; others are hung up on.
MOST: Final = 8
#: Seconds between two looks at whether the server is to end.
_LOOK: Final = 0.1
_UP: Final = Metric("source_up", "gauge", ("source",), "Whether a source could be asked: 1, or 0 if it raised.")

#: Asked on a thread of the server's.
Source = Callable[[], Iterable[Sample]]


class Latest:
    """A source for what only one thread may ask: that thread puts values here, for instance in each step."""

    def __init__(self) -> None:
        self._samples: tuple[Sample, ...] = ()

    def put(self, samples: Iterable[Sample]) -> None:
        """These are the values now."""
        self._samples = tuple(samples)

    def __call__(self) -> tuple[Sample, ...]:
        """The values that were put last."""
        return self._samples


class MetricsServer:
    """Answers Prometheus on a thread of its own. Threads may share it."""

    def __init__(self, metrics: Mapping[str, Metric], host: str = "127.0.0.1", port: int = 0) -> None:
        """`metrics`: all vocabularies, as one; `port`: 0 for any that is free, see `address`.

        A `host` that begins with a slash is the path of a socket of this machine, which has no port.
        """
        self._metrics = {**metrics, _UP.name: _UP}
        self._sources: dict[str, Source] = {}
        self._failed: set[str] = set()
        try:
            self._server = _Server(host, port, self)
        except (OSError, OverflowError, ValueError) as error:  # a port or a name that the system is not even asked for
            raise AddressInvalid(
                f"Metrics were to be served at {host}:{port}.",
                f"It cannot be: {getattr(error, 'strerror', None) or error}.",
                "Give an address of this host and a port that is free; 0 takes any.",
            ) from None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="tensorway-metrics", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, port, *_ = self._server.socket.getsockname()
        return str(host), int(port)

    def add(self, name: str, source: Source, metrics: Mapping[str, Metric] | None = None) -> None:
        """Answer with these values, too, perhaps of a further vocabulary; who is called the same is replaced."""
        self._metrics.update(metrics or {})
        self._sources[name] = source

    def remove(self, name: str) -> None:
        """Answer without them."""
        self._sources.pop(name, None)

    def text(self) -> str:
        """What it answers."""
        samples: list[Sample] = []
        for name, source in list(self._sources.items()):
            try:
                samples += source()
                up = 1
            except Exception as error:  # it is not ours, and the others' values are still true
                up = 0
                if name not in self._failed:
                    _log.warning("The metrics of %s could not be had: %s", name, error)
                    self._failed.add(name)
            samples.append(Sample(_UP.name, (("source", name),), up))
        return exposition(samples, self._metrics)

    def close(self, deadline: float = 5.0) -> None:
        """Answer nobody any more; the second call does nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join(deadline)
        if self._thread.is_alive():
            true = f"Its thread has not ended within {deadline:g} s."
            raise DeadlineExceeded(
                "The server of metrics was to be closed.", true, "Look at what its sources wait for."
            )

    def abandon(self) -> None:
        """Close what a process has of its parent's server: the thread that answers is not here."""
        self._server.socket.close()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _serve(self) -> None:
        with self._server:
            while not self._ended.is_set():
                self._server.handle_request()


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    # Who closes does not wait for a source that hangs.
    block_on_close = False
    timeout = _LOOK
    request_queue_size = 2 * MOST

    def __init__(self, host: str, port: int, owner: MetricsServer) -> None:
        self.owner, self._slots = owner, threading.BoundedSemaphore(MOST)
        if ":" in host:
            self.address_family = socket.AF_INET6
        if host.startswith("/"):
            self.address_family = socket.AF_UNIX
        address: Any = host if host.startswith("/") else (host, port)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._slots.acquire(blocking=False):
            try:
                super().process_request(request, client_address)
            except BaseException:  # a system may have no thread more
                self._slots.release()
                raise
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("A request for metrics was given up.", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "tensorway", ""

    def setup(self) -> None:
        """Read the head as a whole, so that its size and time are bounded whatever lines it is made of."""
        until, head = time.monotonic() + PATIENCE, b""
        super().setup()
        while b"\r\n\r\n" not in head and len(head) <= MAX_HEAD:
            self.connection.settimeout(max(0.001, until - time.monotonic()))
            try:
                chunk = self.connection.recv(MAX_HEAD)
            except TimeoutError:
                chunk = b""
            if not chunk:
                head = b""
                break
            head += chunk
        self.connection.settimeout(PATIENCE)
        self._too_large = len(head) > MAX_HEAD
        self.rfile = io.BytesIO(b"GET / HTTP/1.0\r\n\r\n" if self._too_large else head)

    def parse_request(self) -> bool:
        """Refuse what is too large before it is looked at."""
        if not super().parse_request():
            return False
        self.close_connection = True  # what else is in the head is nobody's request
        if self._too_large or self.command != "GET":
            self.send_error(431 if self._too_large else 405)
            return False
        return True

    def do_GET(self) -> None:
        """The values of now."""
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404)
            return
        text = self.server.owner.text().encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *arguments: Any) -> None:
        """What strangers send is not logged."""
