"""The store `etcd`: see `tensorway.rendezvous.contract.Store`.

May import tensorway's ground, the rendezvous' contract and `reopening`, and its own package. Revisions are etcd's own,
and so is every comparison: one transaction on `mod_revision`. Leases are etcd's, in whole seconds.
"""

from __future__ import annotations

import math
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import Any, Final, NoReturn

from tensorway.errors import LeaseLost, RecordRefused
from tensorway.rendezvous.contract import Ability, Event, Record, check_key, end_of
from tensorway.rendezvous.reopening import Reopening
from tensorway_etcd.gateway import NOT_FOUND, Ended, Gateway, Refused, result
from tensorway_etcd.options import EtcdOptions
from tensorway_etcd.wire import MAX_ANSWER, Stream

#: Records of one answer: a thousand members that start together ask for a thousand records each.
_PAGE: Final = 128


class EtcdStore:
    """Threads may share it."""

    name = "etcd"
    abilities: frozenset[Ability] = frozenset({"lease", "watch", "compare", "durable"})
    #: etcd's users, where there are any, are the operator's and not the deployment's.
    authenticates = False

    def __init__(self, options: EtcdOptions) -> None:
        #: Where others find it.
        self.address = ",".join(options.endpoints)
        self._max = options.max_request_bytes
        self._gateway = Gateway(options)
        self._watches: set[EtcdChanges] = set()
        self._lock = threading.Lock()

    def put(self, key: str, value: bytes, lease: str, expected: int | None, seconds: float) -> int:
        """Write."""
        size = len(key) + len(value) + 256
        if size > self._max:
            raise RecordRefused(
                f"A value of {len(value):,} bytes was to be put under {key}.",
                f"etcd takes requests of {self._max:,} bytes.",
                "Put how to reach the data; or raise etcd's --max-request-bytes, and max_request_bytes here.",
            )
        request = {"key": _text(key), "value": b64encode(value).decode()} | ({"lease": lease} if lease else {})
        if expected is None:
            answer = self._call(key, "kv/put", request, seconds)
            return int(answer["header"]["revision"])
        return self._compared(key, expected, {"request_put": request}, seconds)

    def get(self, key: str, seconds: float) -> Record | None:
        """Read."""
        records = _records(self._call(key, "kv/range", {"key": _text(key)}, seconds))
        return records[0] if records else None

    def list(self, prefix: str, seconds: float) -> list[Record]:
        """All below a prefix; etcd sorts them by key, and answers some at a time: many may ask at once."""
        records: list[Record] = []
        until, request, size = time.monotonic() + seconds, _below(prefix) | {"limit": str(_PAGE)}, 0
        while True:
            answer = self._call(prefix, "kv/range", request, until - time.monotonic())
            page = _records(answer)
            records += page
            size += sum(len(record.value) for record in page)
            if size > MAX_ANSWER:
                raise RecordRefused(
                    f"All records below {prefix} were asked for.",
                    f"Together they have more than {MAX_ANSWER:,} bytes.",
                    "Ask for a longer prefix, or put less into each.",
                )
            if not answer.get("more"):
                return records
            # All pages are of one moment.
            request["revision"] = request.get("revision") or str(answer["header"]["revision"])
            request["key"] = b64encode(b64decode(answer["kvs"][-1]["key"]) + b"\0").decode()

    def delete(self, key: str, expected: int | None, seconds: float) -> bool:
        """Remove."""
        if expected is None:
            return int(self._call(key, "kv/deleterange", {"key": _text(key)}, seconds).get("deleted", 0)) > 0
        self._compared(key, expected, {"request_delete_range": {"key": _text(key)}}, seconds)
        return expected > 0

    def grant(self, ttl: float, seconds: float) -> str:
        """A new lease, of whole seconds, never fewer than were asked for."""
        return str(self._call("a lease", "lease/grant", {"TTL": math.ceil(ttl)}, seconds)["ID"])

    def keep(self, lease: str, seconds: float) -> bool:
        """Begin its time anew."""
        return int(self._call("a lease", "lease/keepalive", {"ID": lease}, seconds).get("TTL", 0)) > 0

    def revoke(self, lease: str, seconds: float) -> None:
        """End it; one that has ended is as it should be."""
        try:
            self._gateway.call("lease/revoke", {"ID": lease}, seconds)
        except Refused as error:
            if error.code != NOT_FOUND:
                _refuse("a lease", error)

    def changes(self, prefix: str, seconds: float) -> EtcdChanges:
        """Watch a prefix."""
        changes = EtcdChanges(self._gateway, prefix, self._forget)
        changes.begin(seconds)
        with self._lock:
            self._watches.add(changes)
        return changes

    def close(self) -> None:
        """Disconnect."""
        with self._lock:
            watches = list(self._watches)
        for changes in watches:
            changes.close()
        self._gateway.close()

    def _forget(self, changes: EtcdChanges) -> None:
        with self._lock:
            self._watches.discard(changes)

    def _call(self, about: str, path: str, body: dict[str, Any], seconds: float) -> dict[str, Any]:
        try:
            return self._gateway.call(path, body, seconds)
        except Refused as error:
            _refuse(about, error)

    def _compared(self, key: str, expected: int, change: dict[str, Any], seconds: float) -> int:
        """Change a key if it is at that revision (0: not there); the store's revision then."""
        compare = {"key": _text(key), "target": "MOD", "result": "EQUAL", "mod_revision": str(expected)}
        body = {"compare": [compare], "success": [change], "failure": [{"request_range": {"key": _text(key)}}]}
        try:
            answer = self._gateway.call("kv/txn", body, seconds, again=False)
        except Refused as error:
            _refuse(key, error)
        if answer.get("succeeded"):
            return int(answer["header"]["revision"])
        found = _records(answer["responses"][0]["response_range"])
        raise RecordRefused.changed(key, expected, found[0].revision if found else 0)


class EtcdChanges(Reopening[Stream]):
    """See `contract.Changes`. etcd knows what was before, so one that begins anew goes on where it was."""

    def __init__(self, gateway: Gateway, prefix: str, forget: Callable[[EtcdChanges], None]) -> None:
        super().__init__(prefix, forget)
        self._gateway = gateway
        #: The revision up to which everything was told; 0: from now on.
        self._seen = 0

    def _open(self, seconds: float) -> Stream:
        """etcd says when it has begun."""
        after = {"start_revision": str(self._seen + 1)} if self._seen else {}
        try:
            stream, revision = self._gateway.watch(_below(self._prefix) | after, seconds)
        except Refused as error:
            _refuse(self._prefix, error)
        if revision < self._seen:  # it has lost what it knew, or this member of it is behind
            stream.close()
            self._seen = 0
            return self._open(seconds)
        self.missed = not self._seen
        self._seen = self._seen or revision
        return stream

    def _told(self, stream: Stream, until: float) -> list[Event]:
        """All events that have arrived; waits for the first, and for the stream's end."""
        events: list[Event] = []
        try:
            while (line := stream.line(0.0 if events else until)) is not None:
                told = result(line)
                events += _events(told)
                self._seen = max([self._seen, *(int(event["kv"]["mod_revision"]) for event in told.get("events", ()))])
        except OSError as error:
            if isinstance(error, Ended):
                self._seen = 0
            self._cut()
        return events

    def _shut(self, stream: Stream) -> None:
        stream.close()

    def _wake(self, stream: Stream) -> None:
        stream.wake()


def _text(key: str) -> str:
    return b64encode(key.encode()).decode()


def _below(prefix: str) -> dict[str, str]:
    """A range of keys, as etcd takes it."""
    return {"key": _text(prefix), "range_end": _text(end_of(prefix))}


def _events(told: dict[str, Any]) -> list[Event]:
    """etcd tells no difference between a record that was deleted and one whose lease ended."""
    events = []
    for event in told.get("events", ()):
        for record in _records({"kvs": [event["kv"]]}):
            deleted = event.get("type") == "DELETE"
            events.append(Event("deleted", record.key) if deleted else Event("put", record.key, record))
    return events


def _records(answer: dict[str, Any]) -> list[Record]:
    """The records of an answer; what somebody else keeps there under a key that cannot be ours is passed over."""
    records = []
    for row in answer.get("kvs", ()):
        lease = str(row.get("lease", ""))
        try:
            key = check_key(b64decode(row["key"]).decode("ascii"))
        except (UnicodeDecodeError, RecordRefused):
            continue
        value = b64decode(row.get("value", ""))
        records.append(Record(key, value, int(row["mod_revision"]), "" if lease == "0" else lease))
    return records


def _refuse(about: str, error: Refused) -> NoReturn:
    if error.code == NOT_FOUND and "lease" in str(error):
        raise LeaseLost.ended(f"{about} was to be put under a lease.") from error
    to_do = "Look at the endpoints that you gave, and at what etcd logs."
    raise RecordRefused(f"etcd was asked about {about}.", f"It refused: {error}.", to_do) from error
