"""The store `tcpstore`: see `tensorway.rendezvous.contract.Store`.

May import tensorway's ground, the rendezvous' contract and its own package; imports torch when it is constructed.
TCPStore has no revisions, so each value carries its own, and is changed by `compare_set` alone. Its `delete_key` does
not compare, so a record that is deleted stays as a mark of some bytes, and its revisions go on.
"""

from __future__ import annotations

import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit

import attrs

from tensorway.errors import BackendUnavailable, Closed, DeadlineExceeded, RecordRefused, Unsupported
from tensorway.rendezvous.contract import Ability, Changes, Record, check_key
from tensorway_tcpstore.options import TcpStoreOptions
from tensorway_tcpstore.worker import Late, Worker

#: torch keeps keys of its own in the same store.
_PREFIX: Final = "tensorway:"
#: In front of each value: its revision, who wrote it (no two writes are alike), and whether it is a record.
_HEAD: Final = struct.Struct(">Q8s?")
#: The server cuts the connection of who sends more (torch 2.13), and says so in its own log only.
_MAX_PAYLOAD: Final = 8 << 20
#: What the constructor of a TCPStore is told to take at most; it does not keep to that where the server is stopped.
_CONNECT: Final = 30.0
#: A connection that was not made in so many seconds is given up; a lookup of names may take ten.
_GIVE_UP: Final = 60.0
_PAUSE: Final = 0.05


class TcpStore:
    """Threads may share it."""

    name = "tcpstore"
    abilities: frozenset[Ability] = frozenset({"compare"})
    #: A TCPStore asks nobody who they are.
    authenticates = False

    def __init__(self, options: TcpStoreOptions) -> None:
        try:
            import torch.distributed
        except ImportError as error:
            raise BackendUnavailable(
                "The rendezvous tcpstore was asked for.",
                f"torch cannot be loaded: {error}.",
                'pip install "tensorway[tcpstore]"',
            ) from error
        dist: Any = torch.distributed  # it says what is in it in some builds only
        self._trouble = (dist.DistError,)
        listener, self.address = (None, options.address) if options.address else _listen(options)
        parts = urlsplit(f"//{self.address}")
        given = {"host_name": parts.hostname, "port": parts.port, "timeout": timedelta(seconds=_CONNECT)}
        if listener is not None:
            given |= {"is_master": True, "master_listen_fd": listener.detach()}
        #: Whether the store ends with our connection to it.
        self._serves = listener is not None
        self._connect: Callable[[], Any] = lambda: dist.TCPStore(wait_for_workers=False, **given)
        self._lock = threading.Lock()
        self._closed = False
        self._worker: Worker | None = Worker(self._connect)
        # The first call has a deadline of its own, which the lookups of names on the way may use up.
        self._worker.settled.wait(options.connect_s)

    def put(self, key: str, value: bytes, lease: str, expected: int | None, seconds: float) -> int:
        """Write."""
        if lease:
            self._cannot("lease")
        if _HEAD.size + len(_PREFIX + key) + len(value) > _MAX_PAYLOAD - 4096:
            raise RecordRefused(
                f"A value of {len(value):,} bytes was to be put under {key}.",
                f"A TCPStore takes {_MAX_PAYLOAD:,} bytes at once.",
                "Put how to reach the data, not the data.",
            )
        # Most keys are put once: then the first exchange is the only one.
        known = b"" if expected in (None, 0) else None
        changed: int = self._call("put", lambda store: _change(store, key, value, expected, known), seconds, expected)
        return changed

    def get(self, key: str, seconds: float) -> Record | None:
        """Read."""
        return _record(key, self._call("get", lambda store: _raw(store, _PREFIX + key), seconds))

    def list(self, prefix: str, seconds: float) -> list[Record]:
        """All below a prefix; every key of the store is looked at."""

        def work(store: Any) -> list[Record]:
            names = sorted(name for name in store.list_keys() if name.startswith(_PREFIX + prefix))
            values = store.multi_get(names) if names else []
            found = (_record(name.removeprefix(_PREFIX), raw) for name, raw in zip(names, values, strict=True))
            return [record for record in found if record is not None]

        records: list[Record] = self._call("list", work, seconds)
        return records

    def delete(self, key: str, expected: int | None, seconds: float) -> bool:
        """Remove."""
        return bool(self._call("delete", lambda store: _change(store, key, None, expected, None), seconds, expected))

    def grant(self, ttl: float, seconds: float) -> str:
        """It cannot."""
        self._cannot("lease")

    def keep(self, lease: str, seconds: float) -> bool:
        """It cannot."""
        self._cannot("lease")

    def revoke(self, lease: str, seconds: float) -> None:
        """It cannot."""
        self._cannot("lease")

    def changes(self, prefix: str, seconds: float) -> Changes:
        """It cannot."""
        self._cannot("watch")

    def close(self) -> None:
        """Disconnect; a store of this process ends."""
        with self._lock:
            self._closed = True
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.end(2.0)

    def _cannot(self, ability: str) -> NoReturn:
        raise Unsupported(
            f"The rendezvous tcpstore was asked for: {ability}.",
            "A TCPStore knows keys and values, and not who is alive or who wants to be told.",
            "Choose a store that can: tensorway plugins list --kind rendezvous",
        )

    def _call(self, call: str, work: Callable[[Any], Any], seconds: float, expected: int | None = None) -> Any:
        """Let the thread do it. It is done again on a new connection, unless it compared and may have been done."""
        until = time.monotonic() + seconds
        trouble, sent = "there was no time to ask", False
        while time.monotonic() < until:
            worker = self._connection(call)
            try:
                return worker.run(work, until)
            except Late as late:
                began = bool(late.args[0])
                sent = sent or began
                trouble = "it does not answer" if began else "it has not been connected to"
                if (began and not self._serves) or worker.connecting_for > _GIVE_UP:
                    self._drop(worker)  # a thread that waits for ever serves nobody else
                break
            except self._trouble as error:
                trouble = " ".join(str(error).split())[:200]
                sent = sent or worker.connected
                self._drop(worker)
                if sent and expected is not None:
                    break
                time.sleep(max(0.0, min(_PAUSE, until - time.monotonic())))
        raise DeadlineExceeded(
            f"The TCPStore at {self.address} was asked to {call} (the deadline was {seconds:g} s).",
            f"No answer came: {trouble}." + (" It may have been done all the same." if sent else ""),
            "See whether the process that runs it lives, and whether this host reaches it.",
        )

    def _connection(self, call: str) -> Worker:
        with self._lock:
            if self._closed:
                to_do = "Enter it again."
                raise Closed(f"The TCPStore was asked to {call}.", "The rendezvous is closed.", to_do)
            if self._worker is None:
                self._worker = Worker(self._connect)
            return self._worker

    def _drop(self, worker: Worker) -> None:
        with self._lock:
            if self._worker is worker and not self._serves:
                self._worker = None
        worker.end()


@attrs.frozen
class _Stored:
    """What is under a key."""

    revision: int
    there: bool
    value: bytes

    @classmethod
    def of(cls, raw: bytes) -> _Stored:
        """Nothing, or what nobody of ours wrote, is revision 0."""
        if len(raw) < _HEAD.size:
            return cls(0, False, b"")
        revision, _, there = _HEAD.unpack_from(raw)
        return cls(revision, there, raw[_HEAD.size :])


def _raw(store: Any, name: str) -> bytes:
    # `get` waits for a key that is not there; `check` does not.
    return bytes(store.get(name)) if store.check([name]) else b""


def _record(key: str, raw: bytes) -> Record | None:
    stored = _Stored.of(raw)
    try:
        return Record(check_key(key), stored.value, stored.revision) if stored.there else None
    except RecordRefused:
        return None  # nobody of ours wrote that


def _change(store: Any, key: str, value: bytes | None, expected: int | None, known: bytes | None) -> int:
    """Write, or delete (None); the new revision, 0 if there was nothing to delete. `known`: what may be there."""
    name = _PREFIX + key
    raw = _raw(store, name) if known is None else known
    while True:
        old = _Stored.of(raw)
        at = old.revision if old.there else 0
        if expected is not None and expected != at:
            raise RecordRefused.changed(key, expected, at)
        if value is None and not old.there:
            return 0
        new = _HEAD.pack(old.revision + 1, secrets.token_bytes(8), value is not None) + (value or b"")
        found = bytes(store.compare_set(name, raw, new))
        if found == new:
            return old.revision + 1
        # Of a key that is not there, `compare_set` returns what was expected.
        raw = b"" if found == raw else found


def _listen(options: TcpStoreOptions) -> tuple[socket.socket, str]:
    """A socket where the options say, and its address. Left to itself, a TCPStore listens on all interfaces."""
    from tensorway.rendezvous.hosts import cannot_listen, choose, policy_of, url

    choice = choose(policy_of(options.host, "loopback"))
    family = socket.AF_INET6 if ":" in choice.bind else socket.AF_INET
    try:
        listener = socket.create_server((choice.bind, options.port), family=family, backlog=1024)
    except OSError as error:
        raise cannot_listen("A TCPStore", choice, options.port, error.strerror) from error
    return listener, url(choice.advertise, listener.getsockname()[1])
