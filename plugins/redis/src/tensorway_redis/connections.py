"""Connections to Redis that keep a deadline, and the one script call over them.

May import tensorway's ground, the rendezvous' offer and its own package; imports redis when it is constructed. The
client's own pool and retries are not used: they know one time limit for all calls, and connect anew without telling who
watches.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

from tensorway.errors import BackendUnavailable, Closed, DeadlineExceeded, RecordRefused, Unauthenticated
from tensorway.rendezvous.offer import password_in
from tensorway_redis.options import RedisOptions
from tensorway_redis.script import KEYS, SCRIPT

_SHA: Final = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()
_PAUSE: Final = 0.05
_MAX_IDLE: Final = 8
#: Answers that are about the moment: a script of somebody else runs, the server loads its data, a replica takes over.
_LATER: Final = ("BUSY ", "LOADING ", "MASTERDOWN ", "TRYAGAIN ", "CLUSTERDOWN ")
_STRANGER: Final = (
    "Protocol error: unauthenticated",
    "NOAUTH",
    "WRONGPASS",
    "NOPERM",
    "ERR invalid password",
    "ERR AUTH",
)
#: A connection over which nothing comes back is dead after about 15 s.
_KEEPALIVE: Final = {socket.TCP_KEEPIDLE: 5, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 2}


class Connections:
    """Threads may share it; each call has a connection to itself."""

    def __init__(self, options: RedisOptions) -> None:
        try:
            import redis
        except ImportError as error:
            raise BackendUnavailable(
                "The rendezvous redis was asked for.",
                f"Its client cannot be loaded: {error}.",
                'pip install "tensorway[redis]"',
            ) from error
        self._redis = redis
        #: What its client raises, and the system; its parser in Python counts levels by calls, and takes any word for a
        #: number.
        self.trouble: tuple[type[Exception], ...] = (redis.RedisError, RecursionError, ValueError, OSError)
        parts = urlsplit(options.url)
        #: Where it is, without what nobody else is to know.
        self.address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        self._factory = redis.ConnectionPool.from_url(options.url, **_arguments(redis, options))
        database = getattr(self._factory.make_connection(), "db", 0)
        # Braces keep all our keys on one node of a cluster. Channels know no databases, so they name theirs.
        self._keys = [f"{{{options.namespace}}}:{name}" for name in KEYS]
        self.channel = f"{{{options.namespace}}}:{database}:"
        self._idle: list[Any] = []
        self._lock = threading.Lock()
        self._closed = False

    def call(self, call: str, name: str, *rest: str | bytes, seconds: float, again: bool = True) -> list[Any]:
        """Run the script; what it returns. `again`: may be done twice."""
        until = time.monotonic() + seconds
        trouble, sent = "there was no time to ask", False
        while until > time.monotonic():
            if self._closed:
                raise Closed(f"Redis was asked to {call}.", "The rendezvous is closed.", "Enter it again.")
            try:
                connection, sent = self._connected(until), True
                return self._run(connection, until, call, name, *rest)
            except (self._redis.ConnectionError, self._redis.TimeoutError, OSError) as error:
                self._stranger(call, error)
                trouble = " ".join(str(error).split()) or type(error).__name__
            except self._redis.ResponseError as error:
                self._stranger(call, error)
                if not str(error).startswith(_LATER):
                    raise _refused(call, name, error) from error
                trouble = str(error)
            except self.trouble as error:  # it speaks something else: this is no Redis
                trouble = str(error)
            if (sent and not again) or until - time.monotonic() <= _PAUSE:
                break
            time.sleep(_PAUSE)
        raise self.unanswered(call, seconds, trouble, sent)

    def unanswered(self, call: str, seconds: float, trouble: str, sent: bool) -> DeadlineExceeded:
        """The error for a call that Redis did not answer."""
        return DeadlineExceeded(
            f"Redis at {self.address} was asked to {call} (the deadline was {seconds:g} s).",
            f"No answer came: {trouble.rstrip('.')}." + (" It may have been done all the same." if sent else ""),
            "See whether Redis runs, and whether this host reaches it: redis-cli -u URL ping",
        )

    def subscribed(self, pattern: str, seconds: float) -> Any:
        """A connection of the caller's own, to which Redis sends what is published on channels of that pattern."""
        until = time.monotonic() + seconds
        trouble = "there was no time to ask"
        while until > time.monotonic():
            connection = None
            try:
                connection = self._connect(until)
                connection.send_command("PSUBSCRIBE", pattern)
                connection.read_response()
                connection._sock.settimeout(5.0)  # of the rest of a message that has begun
                return connection
            except self.trouble as error:
                if connection is not None:
                    connection.disconnect()
                self._stranger("watch", error)
                trouble = " ".join(str(error).split()) or type(error).__name__
            if until - time.monotonic() <= _PAUSE:
                break
            time.sleep(_PAUSE)
        raise self.unanswered("watch", seconds, trouble, False)

    def close(self) -> None:
        """Close the connections that nobody uses; the others are closed after their calls."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.disconnect()

    def _run(self, connection: Any, until: float, *arguments: str | bytes) -> list[Any]:
        call, *rest = arguments
        shared = (len(self._keys), *self._keys, call, self.channel, *rest)
        keep = False
        try:
            try:
                answer = _asked(connection, until, "EVALSHA", _SHA, *shared)
            except self._redis.exceptions.NoScriptError:  # the server is new
                answer = _asked(connection, until, "EVAL", SCRIPT, *shared)
            keep = True
            return list(answer)
        except self._redis.ResponseError:
            keep = True
            raise
        finally:
            self._back(connection, keep)

    def _connected(self, until: float) -> Any:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self._connect(until)
            try:
                # An idle connection has nothing to say, unless that it has ended.
                if not connection.can_read(timeout=0):
                    return connection
            except self.trouble:
                pass
            connection.disconnect()

    def _connect(self, until: float) -> Any:
        connection = self._factory.make_connection()
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time is over")
        connection.socket_timeout = connection.socket_connect_timeout = left
        # In a thread, because the lookup of a name knows no time limit.
        _within(connection.connect, connection.disconnect, left)
        return connection

    def _back(self, connection: Any, keep: bool) -> None:
        with self._lock:
            if keep and not self._closed and len(self._idle) < _MAX_IDLE:
                self._idle.append(connection)
                return
        connection.disconnect()

    def _stranger(self, call: str, error: BaseException) -> None:
        """Raise the error for who may not ask, if that is what Redis says."""
        known = (self._redis.AuthenticationError, self._redis.exceptions.NoPermissionError)
        text = str(error)
        if isinstance(error, known) or text.startswith(_STRANGER):
            true, to_do = f"It refused: {text}.", "Give the user and the password in url, or in password_file."
        elif "CERTIFICATE_VERIFY_FAILED" in text:
            true = f"Its certificate was not accepted: {text}."
            to_do = "Name the authority that signed it in ca_file, and the host as the certificate does in url."
        else:
            return
        raise Unauthenticated(f"Redis at {self.address} was asked to {call}.", true, to_do) from error


def _arguments(redis: Any, options: RedisOptions) -> dict[str, Any]:
    scheme = urlsplit(options.url).scheme
    given: dict[str, Any] = {"max_connections": 1 << 30, "protocol": 2}
    given["retry"] = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
    if hasattr(redis, "driver_info"):  # else each connection reads the metadata of the dist, some milliseconds long
        given["driver_info"] = redis.driver_info.DriverInfo()
    if scheme != "unix":
        given |= {"socket_keepalive": True, "socket_keepalive_options": _KEEPALIVE}
    if scheme == "rediss" and options.ca_file:
        given["ssl_ca_certs"] = options.ca_file
    if options.password_file:
        given["password"] = password_in(options.password_file, "Redis")
    return given


def _asked(connection: Any, until: float, *words: Any) -> Any:
    for step in (lambda: connection.send_command(*words, check_health=False), connection.read_response):
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time is over")
        connection._sock.settimeout(left)
        answer = step()
    return answer


def _within(work: Callable[[], None], undo: Callable[[], None], seconds: float) -> None:
    """Do something that may take longer than it should; what comes too late is undone by the thread that did it."""
    lock, ended = threading.Lock(), threading.Event()
    state: dict[str, Any] = {"late": False, "error": None}

    def run() -> None:
        try:
            work()
        except Exception as error:
            state["error"] = error
        with lock:
            ended.set()
            late = state["late"]
        if late:
            with contextlib.suppress(Exception):
                undo()

    threading.Thread(target=run, name="tensorway-redis-connect", daemon=True).start()
    ended.wait(seconds)
    with lock:
        state["late"] = not ended.is_set()
    if state["late"]:
        raise TimeoutError("it could not be connected to in time")
    if state["error"] is not None:
        raise state["error"]


def _refused(call: str, name: str, error: BaseException) -> RecordRefused:
    to_do = "Look at what Redis logs, and at its memory: redis-cli info memory"
    return RecordRefused(f"Redis was asked to {call} {name}.", f"It refused: {error}.", to_do)
