"""The tier `sqlite`: blocks are rows of a table in one file, which engines of one host share.

SQLite sees to it that a row is whole or not there, also when a process is killed. It does not see whether somebody has
damaged the file, or written what is no block; so each row has a digest, and what does not match it is removed and
`corrupt`. Each call opens the file for itself: connections may not be shared by threads, nor survive a fork.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from tensorway import ProbeResult
from tensorway.errors import Closed, OptionsInvalid
from tensorway.metrics import Counters, Sample
from tensorway.offload import METRICS, OffloadKey, OfTenant, Outcome, TierCapabilities, TierContext, key_tenant

from tensorway_sqlite.options import SqliteOffloadTierOptions

_TABLE = """
CREATE TABLE IF NOT EXISTS blocks (
    fingerprint BLOB, key BLOB, tenant BLOB, digest BLOB, block BLOB, PRIMARY KEY (fingerprint, key)
) WITHOUT ROWID
"""
_HERE = "fingerprint = ? AND key = ?"


class SqliteOffloadTier:
    """Blocks in a file. Threads and processes may share it."""

    capabilities = TierCapabilities(persistent=True, shared=True)

    def __init__(self, options: SqliteOffloadTierOptions, context: TierContext) -> None:
        if not options.path:
            asked = "The tier sqlite was to be opened."
            raise OptionsInvalid(asked, "It was not told where its file is.", "Give the option path.")
        self._path, self._most, self._fingerprint = options.path, options.max_bytes, context.fingerprint
        self._counts = Counters(METRICS, backend="sqlite", engine=context.engine)
        self._closed = threading.Event()
        try:
            self._begin(context.deadline)
        except sqlite3.OperationalError:
            raise  # the disk, or somebody who does not let go: not the file
        except sqlite3.DatabaseError:  # damaged beyond what SQLite can open: blocks can be computed again
            Path(self._path).replace(f"{self._path}.damaged")
            for beside in ("-wal", "-shm"):
                Path(f"{self._path}{beside}").unlink(missing_ok=True)
            self._begin(context.deadline)

    def _begin(self, seconds: float) -> None:
        with self._file(seconds) as file:
            file.execute("PRAGMA journal_mode = WAL")
            file.execute(_TABLE)

    def probe(self, deadline: float) -> ProbeResult:
        """Whether the file can be read and written now."""
        self._check()
        try:
            with self._file(deadline) as file:
                file.execute("BEGIN IMMEDIATE")
                file.execute("ROLLBACK")
        except sqlite3.Error as error:
            return ProbeResult.failed(f"SQLite says of its file: {error}", "See whether its disk is full or gone.")
        return ProbeResult.passed(f"SQLite {sqlite3.sqlite_version} can read and write its file")

    def contains(self, keys: Sequence[OffloadKey], deadline: float) -> list[bool]:
        """Which of these are there. Of what cannot be read nothing is."""
        self._check()
        try:
            with self._file(deadline) as file:
                return [self._row(file, "1", key) is not None for key in keys]
        except sqlite3.Error:
            return [False] * len(keys)

    def put(self, items: Sequence[tuple[OffloadKey, memoryview]], deadline: float) -> list[Outcome]:
        """Store each block; those that fit, if not all do."""
        return self._each(items, deadline, self._put)

    def _put(self, file: sqlite3.Connection, key: OffloadKey, view: memoryview) -> Outcome:
        if self._row(file, "1", key) is not None:
            return "done"
        block = bytes(view)
        file.execute("BEGIN IMMEDIATE")  # nobody else writes between the look at the room and the row
        try:
            stored = file.execute("SELECT coalesce(sum(length(block)), 0) FROM blocks").fetchone()[0]
            if stored + len(block) > self._most:
                return "full"
            row = (self._fingerprint, key, key_tenant(key), self._digest(key, block), block)
            file.execute("INSERT OR IGNORE INTO blocks VALUES (?, ?, ?, ?, ?)", row)
        finally:
            file.execute("COMMIT")
        return "done"

    def get(self, items: Sequence[tuple[OffloadKey, memoryview]], deadline: float) -> list[Outcome]:
        """Read each block into its buffer, if it is what was stored."""
        return self._each(items, deadline, self._get)

    def _get(self, file: sqlite3.Connection, key: OffloadKey, view: memoryview) -> Outcome:
        found = self._row(file, "digest, block", key)
        if found is None:
            return "missing"
        digest, block = found
        if not isinstance(block, bytes) or len(block) != view.nbytes or digest != self._digest(key, block):
            file.execute(f"DELETE FROM blocks WHERE {_HERE}", (self._fingerprint, key))
            return "corrupt"
        view.cast("B")[:] = block
        return "done"

    def delete(self, which: Sequence[OffloadKey] | OfTenant, deadline: float) -> int:
        """Remove these, or all of a tenant; how many there were."""
        self._check()
        with self._file(deadline) as file:
            if isinstance(which, OfTenant):
                where, values = "fingerprint = ? AND tenant = ?", [(self._fingerprint, which.tenant)]
            else:
                where, values = _HERE, [(self._fingerprint, key) for key in which]
            return file.executemany(f"DELETE FROM blocks WHERE {where}", values).rowcount if values else 0

    def stats(self) -> Sequence[Sample]:
        """Values of `tensorway.offload.METRICS`."""
        return self._counts.samples()

    def close(self, deadline: float = 5.0) -> None:
        """End; what was stored stays. The second call does nothing."""
        self._closed.set()

    # -- the file

    def _each(
        self,
        items: Sequence[tuple[OffloadKey, memoryview]],
        deadline: float,
        do: Callable[[sqlite3.Connection, OffloadKey, memoryview], Outcome],
    ) -> list[Outcome]:
        """The outcome of each, until the deadline; what SQLite raises is the outcome of that block."""
        self._check()
        until, outcomes = time.monotonic() + deadline, list[Outcome]()
        try:
            with self._file(deadline) as file:
                for key, view in items:
                    late = time.monotonic() >= until
                    outcomes.append("late" if late else self._tried(file, key, view, do))
        except sqlite3.Error:
            pass  # the file cannot be opened, so what is left of the call has failed
        return outcomes + ["failed"] * (len(items) - len(outcomes))

    @staticmethod
    def _tried(
        file: sqlite3.Connection,
        key: OffloadKey,
        view: memoryview,
        do: Callable[[sqlite3.Connection, OffloadKey, memoryview], Outcome],
    ) -> Outcome:
        try:
            return do(file, key, view)
        except sqlite3.OperationalError as error:
            return "late" if "locked" in str(error) else "full" if "full" in str(error) else "failed"
        except sqlite3.DatabaseError:
            return "corrupt"

    @contextmanager
    def _file(self, seconds: float) -> Iterator[sqlite3.Connection]:
        wait = min(max(seconds, 0.0), 3600.0)
        with closing(sqlite3.connect(self._path, timeout=wait, isolation_level=None)) as file:
            file.execute("PRAGMA synchronous = OFF")  # blocks outlive their process, and need not outlive a power cut
            yield file

    def _row(self, file: sqlite3.Connection, what: str, key: OffloadKey) -> tuple[object, ...] | None:
        found: tuple[object, ...] | None = file.execute(
            f"SELECT {what} FROM blocks WHERE {_HERE}", (self._fingerprint, key)
        ).fetchone()
        return found

    def _digest(self, key: OffloadKey, block: bytes) -> bytes:
        digest = hashlib.blake2b(self._fingerprint + key, digest_size=16)
        digest.update(block)
        return digest.digest()

    def _check(self) -> None:
        if self._closed.is_set():
            raise Closed("The tier sqlite was used.", "It is closed.", "Make another one.")
