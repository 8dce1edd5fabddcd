"""Calls of etcd's HTTP gateway: to whichever endpoint answers, with a token where there are users, in a given time.

May import tensorway's ground, the rendezvous' offer and its own package. A call that may be done twice is sent again
when its connection breaks; one that may not, because it compares, is sent once.
"""

from __future__ import annotations

import http.client
import json
import select
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import attrs

from tensorway.errors import Closed, DeadlineExceeded, RecordRefused, Unauthenticated
from tensorway.rendezvous.offer import password_in
from tensorway_etcd.options import EtcdOptions
from tensorway_etcd.wire import MAX_ANSWER, Stream, connect, left

_Answer = TypeVar("_Answer")
#: Codes of gRPC, as the gateway tells them.
NOT_FOUND: Final = 5
_UNAUTHENTICATED: Final = 16
#: No answer to the question: cancelled, too late, unavailable (an election is under way).
_LATER: Final = (1, 4, 14)
#: After every endpoint was tried in vain, in seconds.
_PAUSE: Final = 0.05
#: Idle connections that are kept for each endpoint.
_MAX_IDLE: Final = 8


class Refused(Exception):
    """etcd answered no."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code

    @property
    def about_who(self) -> bool:
        """Whether it was about who asks, and not about what was asked."""
        words = ("user name is empty", "user ID or password", "permission denied", "invalid auth token")
        return self.code in (7, _UNAUTHENTICATED) or any(word in str(self) for word in words)


class _Later(Exception):
    """Nothing was done, as far as anybody knows; another endpoint, or another moment, may do it."""

    def __init__(self, error: BaseException | str, sent: bool) -> None:
        super().__init__(str(error) or type(error).__name__)
        self.sent = sent


@attrs.define
class _Endpoint:
    url: str
    host: str
    port: int
    tls: ssl.SSLContext | None
    idle: list[http.client.HTTPConnection] = attrs.field(factory=list)


class Gateway:
    """Threads may share it; each call has a connection to itself."""

    def __init__(self, options: EtcdOptions) -> None:
        self._options = options
        tls = _tls(options) if any(url.startswith("https") for url in options.endpoints) else None
        self._endpoints = [_endpoint(url, tls) for url in options.endpoints]
        self._current = 0
        self._token = ""
        self._lock = threading.Lock()
        self._closed = False

    def call(self, path: str, body: dict[str, Any], seconds: float, again: bool = True) -> dict[str, Any]:
        """What etcd answers; raises `Refused`, `DeadlineExceeded` or `Unauthenticated`. `again`: may be done twice."""
        data = json.dumps(body).encode()

        def attempt(endpoint: _Endpoint, until: float) -> dict[str, Any]:
            return self._ask(endpoint, until, path, data)

        return self._somewhere(path, seconds, again, attempt)

    def watch(self, keys: dict[str, str], seconds: float) -> tuple[Stream, int]:
        """A watch that has begun, and etcd's revision then; see `result` for its lines."""
        data = json.dumps({"create_request": keys}).encode()
        return self._somewhere("watch", seconds, True, lambda endpoint, until: self._open(endpoint, until, data))

    def close(self) -> None:
        """Close the connections that nobody uses; the others are closed after their calls."""
        with self._lock:
            self._closed = True
            idle = [connection for endpoint in self._endpoints for connection in endpoint.idle]
            for endpoint in self._endpoints:
                endpoint.idle = []
        for connection in idle:
            connection.close()

    # -- where, and how often

    def _somewhere(
        self, path: str, seconds: float, again: bool, attempt: Callable[[_Endpoint, float], _Answer]
    ) -> _Answer:
        until = time.monotonic() + seconds
        trouble, sent, tried, renewed = "there was no time to ask", False, 0, False
        while (remaining := until - time.monotonic()) > 0:
            self._check(path)
            endpoint = self._endpoints[self._current]
            share = remaining / (len(self._endpoints) if again else 1)
            try:
                self._authenticate(endpoint, time.monotonic() + share)
                return attempt(endpoint, time.monotonic() + share)
            except _Later as error:
                trouble, sent = f"{endpoint.url}: {error}", error.sent
                if sent and not again:
                    break
            except Refused as error:
                if error.code == _UNAUTHENTICATED and self._token and not renewed:
                    self._token, renewed = "", True  # it was old, or of a server that was restarted
                    continue
                if error.about_who:
                    raise self._stranger(path, error) from error
                raise
            tried += 1
            self._current = (self._current + 1) % len(self._endpoints)
            if tried % len(self._endpoints) == 0:
                if until - time.monotonic() <= _PAUSE:
                    break
                time.sleep(_PAUSE)
        raise DeadlineExceeded(
            f"etcd was asked: {path} (the deadline was {seconds:g} s).",
            f"No answer came; {trouble}." + (" It may have been done all the same." if sent else ""),
            "See whether etcd runs, and whether this host reaches it: curl ENDPOINT/health",
        )

    def _stranger(self, path: str, error: Refused) -> Unauthenticated:
        who = f"the user {self._options.user!r}" if self._options.user else "nobody by name"
        to_do = "Give user and password_file of somebody who may read and write the deployment's keys."
        return Unauthenticated(f"etcd was asked by {who}: {path}.", f"It refused: {error}.", to_do)

    def _check(self, path: str) -> None:
        if self._closed:
            raise Closed(f"etcd was to be asked: {path}.", "The rendezvous is closed.", "Enter it again.")

    def _authenticate(self, endpoint: _Endpoint, until: float) -> None:
        if not self._options.user or self._token:
            return
        password = password_in(self._options.password_file, "etcd") if self._options.password_file else ""
        body = {"name": self._options.user, "password": password}
        try:
            answer = self._ask(endpoint, until, "auth/authenticate", json.dumps(body).encode())
            self._token = str(answer.get("token", ""))
        except Refused as error:
            if "not enabled" not in str(error):  # then nobody needs a token
                raise

    # -- one request

    def _ask(self, endpoint: _Endpoint, until: float, path: str, data: bytes) -> dict[str, Any]:
        connection = self._connection(endpoint, until)
        sent, keep = False, False
        try:
            connection.sock.settimeout(left(until))
            sent = True
            connection.request("POST", f"/v3/{path}", data, self._headers())
            response = connection.getresponse()
            text = _body(response, connection, until)
            keep = not response.will_close
            return _answer(response.status, text)
        except (OSError, http.client.HTTPException) as error:
            keep = False
            raise _Later(error, sent) from error
        finally:
            self._back(endpoint, connection, keep)

    def _open(self, endpoint: _Endpoint, until: float, data: bytes) -> tuple[Stream, int]:
        sock = None
        head = ["POST /v3/watch HTTP/1.1", f"Host: {endpoint.host}:{endpoint.port}", f"Content-Length: {len(data)}"]
        # A member that is cut off from the others would be silent for ever: etcd ends its watches if it is asked to.
        head += [f"{name}: {value}" for name, value in self._headers().items()] + ["Grpc-Metadata-hasleader: true"]
        try:
            sock = connect(endpoint.host, endpoint.port, endpoint.tls, until)
            sock.sendall("\r\n".join([*head, "", ""]).encode() + data)
            stream = Stream(sock)
        except OSError as error:
            if sock is not None:
                sock.close()
            raise _distrust(endpoint, error) or _Later(error, False) from error
        try:
            return stream, _begun(stream, until)
        except OSError as error:
            stream.close()
            raise _Later(error, False) from error
        except BaseException:
            stream.close()
            raise

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        return headers | {"Authorization": self._token} if self._token else headers

    def _connection(self, endpoint: _Endpoint, until: float) -> http.client.HTTPConnection:
        while True:
            with self._lock:
                connection = endpoint.idle.pop() if endpoint.idle else None
            if connection is None:
                break
            if not _ended(connection):
                return connection
            connection.close()
        connection = http.client.HTTPConnection(endpoint.host, endpoint.port)
        connection.auto_open = 0
        try:
            connection.sock = connect(endpoint.host, endpoint.port, endpoint.tls, until)
        except OSError as error:
            raise _distrust(endpoint, error) or _Later(error, False) from error
        return connection

    def _back(self, endpoint: _Endpoint, connection: http.client.HTTPConnection, keep: bool) -> None:
        with self._lock:
            if keep and not self._closed and len(endpoint.idle) < _MAX_IDLE:
                endpoint.idle.append(connection)
                return
        connection.close()


def _endpoint(url: str, tls: ssl.SSLContext | None) -> _Endpoint:
    parts = urlsplit(url)
    assert parts.hostname and parts.port, "the options were checked"
    return _Endpoint(url, parts.hostname, parts.port, tls if parts.scheme == "https" else None)


def _tls(options: EtcdOptions) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.ca_file or None)
        if options.cert_file:
            context.load_cert_chain(options.cert_file, options.key_file or None)
    except OSError as error:
        raise Unauthenticated(
            "etcd was to be reached over TLS.",
            f"Its certificates cannot be loaded: {error}.",
            "See that ca_file, cert_file and key_file name PEM files that this process may read.",
        ) from error
    return context


def _distrust(endpoint: _Endpoint, error: OSError) -> Unauthenticated | None:
    """The error for a server, or a client, whose certificate will not do; None for any other."""
    if not isinstance(error, ssl.SSLCertVerificationError):
        return None
    return Unauthenticated(
        f"etcd was to be reached at {endpoint.url}.",
        f"Its certificate was not accepted: {error.verify_message}.",
        "Name the authority that signed it in ca_file, and the host as the certificate does in endpoints.",
    )


def _ended(connection: http.client.HTTPConnection) -> bool:
    """Whether an idle connection was closed by the other side: there is nothing else that it could have to say."""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))


def _begun(stream: Stream, until: float) -> int:
    """Wait until etcd says that it watches; its revision."""
    status, line = stream.status(until), stream.line(until)
    if line is None:
        raise TimeoutError("it did not begin the watch; does its cluster have a leader?")
    told = _answer(status, line)
    if told.get("canceled"):
        text = str(told.get("cancel_reason", "it gives no reason"))
        raise Refused(_UNAUTHENTICATED if "invalid auth token" in text else 0, text)
    return int(told["header"]["revision"])


class Ended(ConnectionError):
    """etcd itself ended a watch: it has no more to tell from where that began, or not to us."""


def result(line: bytes) -> dict[str, Any]:
    """One line of a watch; raises `ConnectionError` when the watch is over."""
    try:
        told = _answer(200, line)
    except (Refused, _Later) as error:
        raise ConnectionError(str(error)) from error
    if told.get("canceled"):
        raise Ended("etcd ended the watch")
    return told


def _body(response: http.client.HTTPResponse, connection: http.client.HTTPConnection, until: float) -> bytes:
    parts: list[bytes] = []
    size = 0
    sock = connection.sock
    while True:
        if sock is not None and sock.fileno() >= 0:
            sock.settimeout(left(until))
        part = response.read1(1 << 20)
        if not part:
            response.close()  # or the connection would take it for unread
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > MAX_ANSWER:
            raise RecordRefused(
                "etcd was asked for records.",
                f"They have more than the {MAX_ANSWER:,} bytes of one answer.",
                "Ask for a longer prefix, or put less into each.",
            )


def _answer(status: int, text: bytes) -> dict[str, Any]:
    """What an answer says; of a stream that was ended, its first line."""
    try:
        answer = json.loads(text.split(b"\n")[0] or b"{}")
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        if status >= 500:
            raise _Later(f"it answered with status {status}", True)
        raise Refused(0, f"it is no gateway of etcd 3.4 or newer (status {status}: {text[:80].decode('latin-1')!a})")
    error = answer.get("error")
    if error is None and status < 400:
        return answer.get("result", answer)  # type: ignore[no-any-return]
    detail = error if isinstance(error, dict) else answer
    code, message = int(detail.get("grpc_code") or detail.get("code") or 0), str(detail.get("message", "") or error)
    if code in _LATER or (status >= 500 and not code):
        raise _Later(message, True)
    raise Refused(code, message)
