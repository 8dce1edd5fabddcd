"""The tier `fs` with a plain file for each block, for who wants to copy blocks with other programs.

May import the core and this dist. A file is an entry as segments have it, and the block behind it; it is written
elsewhere and renamed. There is no index: the file system is asked for every block, which is what segments spare.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from tensorway._logging import logger
from tensorway.errors import Closed
from tensorway.metrics import Counters, Sample
from tensorway.offload import METRICS, OffloadKey, OfTenant, Outcome, TierCapabilities, TierContext, key_tenant
from tensorway.types import ProbeResult
from tensorway_fs.disk import Disk, is_full
from tensorway_fs.namespace import Namespace
from tensorway_fs.options import FsOptions
from tensorway_fs.probe import writable
from tensorway_fs.records import ENTRY, PAGE, Entry, Head, Kind, decoded, digest_of, entry
from tensorway_fs.tier import Items, bytes_of, check_block

_log = logger("offload.fs")
_BLOCK: Final = re.compile(r"((?:[0-9a-f]{2}){1,96})\.kv", re.ASCII)
_HALF: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
_SHELF: Final = re.compile(r"[0-9a-f]{2}", re.ASCII)
#: What is left of the quota when something had to go, so that not every block removes another.
_LEAVE: Final = 0.9
#: Seconds after which a file that is still being written is nobody's.
_ABANDONED: Final = 3600.0


class FilesTier:
    """Blocks in files of their own. Threads share it, and processes share its folder."""

    def __init__(self, options: FsOptions, context: TierContext, disk: Disk | None = None) -> None:
        self._disk, self._options = disk or Disk(), options
        self.capabilities = TierCapabilities(persistent=True, shared=True)
        self._namespace = Namespace.of(Path(options.folder), context.fingerprint, self._disk)
        self._blocks, self._fresh = self._namespace.path / "blocks", self._namespace.path / "new"
        self._lock, self._closed, self._process = threading.Lock(), False, os.getpid()
        self._counts = Counters(METRICS)
        #: Bytes since the folder was counted, and what it had then.
        self._stored = 0
        self._facts = dict(context.facts)
        try:
            self._make()
        except OSError as error:
            _log.warning("Blocks are not stored for now: %s", error)
        self._sweep()

    def probe(self, deadline: float) -> ProbeResult:
        """Whether a file can be written here."""
        self._check("probed")
        return writable(self._disk, self._namespace.root.top)

    def contains(self, keys: Sequence[OffloadKey], deadline: float) -> list[bool]:
        """Which of these have a file; after the deadline nobody looks."""
        self._check("asked")
        until = time.monotonic() + deadline
        return [time.monotonic() < until and self._has(key) for key in keys]

    def put(self, items: Items, deadline: float) -> list[Outcome]:
        """Store blocks, each in a file that is there as a whole or not at all."""
        self._check("written to")
        until, outcomes = time.monotonic() + deadline, dict[bytes, Outcome]()
        for key, buffer in items:
            if key in outcomes:
                continue
            data = bytes_of(buffer)
            check_block(key, data)
            if time.monotonic() >= until:
                outcomes[key] = "late"
                continue
            try:
                if not self._has(key):
                    self._store(bytes(key), data)
                elif self._options.durability == "strict":
                    self._sync(self._path(key))
                outcomes[key] = "done"
            except OSError as error:
                _log.debug("A block was not stored: %s", error)
                outcomes[key] = "full" if is_full(error) else "failed"
        if self._options.max_bytes and self._stored > self._options.max_bytes:
            self._sweep()
        return [outcomes[key] for key, _ in items]

    def get(self, items: Items, deadline: float) -> list[Outcome]:
        """Read blocks into their buffers."""
        self._check("read")
        until = time.monotonic() + deadline
        return [
            self._load(bytes(key), bytes_of(buffer)) if time.monotonic() < until else "late" for key, buffer in items
        ]

    def delete(self, which: Sequence[OffloadKey] | OfTenant, deadline: float) -> int:
        """Remove files."""
        self._check("deleted from")
        until, count = time.monotonic() + deadline, 0
        if isinstance(which, OfTenant):
            found = ((key, path) for key, path in self._all() if key_tenant(OffloadKey(key)) == which.tenant)
        else:
            found = ((key, self._path(key)) for key in dict.fromkeys(which))
        for _, path in found:
            if time.monotonic() >= until:
                break
            count += self._remove(path, "deleted")
        return count

    def stats(self) -> Sequence[Sample]:
        """What this process knows the folder to hold, and what it has removed and why."""
        with self._lock:
            self._counts.set("offload_used_bytes", self._stored, medium=self._options.label)
            if self._options.max_bytes:
                self._counts.set("offload_capacity_bytes", self._options.max_bytes, medium=self._options.label)
            return self._counts.samples()

    def close(self, deadline: float = 5.0) -> None:
        """Nothing is held open."""
        self._closed = True

    def _check(self, what: str) -> None:
        if not self._closed and self._process == os.getpid():
            return
        true = "It was closed." if self._closed else "It belongs to the process that this one was forked from."
        raise Closed(f"The tier {self._options.label} was to be {what}.", true, "Make another one.")

    def _make(self) -> None:
        self._namespace.make(self._facts, sync=self._options.durability != "none")
        for folder in (self._blocks, self._fresh):
            self._disk.mkdir(folder)
        if self._options.durability != "none":
            self._disk.sync_folder(self._namespace.path)

    def _path(self, key: bytes) -> Path:
        # The last bytes of a key are tenant and group, and the first of a hash are as good as random.
        return self._blocks / bytes(key[:1]).hex() / f"{bytes(key).hex()}.kv"

    def _head(self, key: bytes, nbytes: int) -> Head:
        mark = self._namespace.mark
        return Head(Kind.of(key, nbytes), 1, 0, int.from_bytes(mark[:8], "little"), mark)

    def _has(self, key: bytes) -> bool:
        try:
            return stat.S_ISREG(self._disk.status(self._path(key)).st_mode)
        except OSError:
            return False

    def _store(self, key: bytes, data: memoryview) -> None:
        fresh, path = self._fresh / secrets.token_hex(16), self._path(key)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            file = self._disk.open(fresh, flags)
        except FileNotFoundError:  # they could not be made when the tier was
            self._make()
            file = self._disk.open(fresh, flags)
        try:
            head = self._head(key, len(data))
            try:
                first = entry(head, 0, key, digest_of(data), len(data), int(time.time()))
                self._disk.write(file, [first, data], 0)
                if self._options.durability != "none":
                    self._disk.fdatasync(file)
            finally:
                self._disk.close(file)
            self._disk.mkdir(path.parent)
            self._disk.replace(path, fresh)
        except OSError:
            self._unlink(fresh)
            raise
        if self._options.durability == "strict":
            self._sync_names(path)
        with self._lock:
            self._stored += -(-(ENTRY + len(data)) // PAGE) * PAGE

    def _sync(self, path: Path) -> None:
        file = self._disk.open(path, os.O_RDONLY)
        try:
            self._disk.fdatasync(file)
        finally:
            self._disk.close(file)
        self._sync_names(path)

    def _sync_names(self, path: Path) -> None:
        for folder in (path.parent, self._blocks):
            self._disk.sync_folder(folder)

    def _load(self, key: bytes, into: memoryview) -> Outcome:
        path = self._path(key)
        try:
            file = self._disk.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return "missing"
        except OSError:
            return "failed" if self._has(key) else "missing"  # a link, or something else that is no file
        try:
            status = self._disk.status_of(file)
            first = bytearray(ENTRY)
            whole = stat.S_ISREG(status.st_mode) and status.st_size == ENTRY + len(into)
            whole = whole and self._disk.read(file, [memoryview(first), into], 0) == ENTRY + len(into)
            found = decoded(self._head(key, len(into)), 0, first) if whole else "corrupt"
            good = isinstance(found, Entry) and found.key == key and found.digest == digest_of(into)
            if good:
                self._touch(file)
        except OSError:
            return "failed"
        finally:
            self._disk.close(file)
        if not good:
            self._remove(path, "corrupt")
        return "done" if good else "corrupt"

    def _touch(self, file: int) -> None:
        try:
            self._disk.touch(file)
        except OSError as error:  # who may only read does not say that it was used
            _log.debug("A block that was read looks as old as before: %s", error)

    def _remove(self, path: Path, cause: str) -> bool:
        nbytes = self._namespace.root.nbytes(path)
        if not self._unlink(path):
            return False
        with self._lock:
            self._stored = max(0, self._stored - nbytes)
            self._counts.add("offload_removed_total", medium=self._options.label, cause=cause)
        return True

    def _unlink(self, path: Path) -> bool:
        try:
            self._disk.unlink(path)
        except FileNotFoundError:
            return False
        except OSError as error:
            _log.debug("%s stays: %s", path, error)
            return False
        return True

    def _all(self) -> Iterator[tuple[bytes, Path]]:
        for shelf in self._disk.names(self._blocks):
            if not _SHELF.fullmatch(shelf):
                continue
            for name in self._disk.names(self._blocks / shelf):
                match = _BLOCK.fullmatch(name)
                if match:
                    yield bytes.fromhex(match[1]), self._blocks / shelf / name

    def _sweep(self) -> None:
        """Count what is there, and remove what was not used for longest until it fits."""
        found = []
        for _, path in self._all():
            try:
                status = self._disk.status(path)
            except OSError:
                continue  # it went meanwhile
            found.append((status.st_mtime_ns, status.st_blocks * 512, path))
        with self._lock:
            self._stored = sum(nbytes for _, nbytes, _ in found)
        quota = self._options.max_bytes
        if quota and self._stored > quota:
            for _, _, path in sorted(found):
                if self._stored <= quota * _LEAVE:
                    break
                self._remove(path, "evicted")
        self._tidy()

    def _tidy(self) -> None:
        """Remove what writers that were killed have left half-written."""
        for name in self._disk.names(self._fresh):
            if not _HALF.fullmatch(name):
                continue  # not ours, if somebody put a link to their files here
            path = self._fresh / name
            try:
                old = time.time() - self._disk.status(path).st_mtime > _ABANDONED
            except OSError:
                continue  # it is whole by now
            if old:
                self._unlink(path)
