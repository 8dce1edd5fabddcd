"""Room for blocks: segments that are open for writing, new ones, and old ones that have to go.

May import the core's logging and this dist. Whether a segment may be removed is decided by its lock and nothing else,
so that processes that share a folder need not know of each other. Removing takes a name away: who reads goes on.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import attrs

from tensorway._logging import logger
from tensorway.offload import Outcome
from tensorway_fs.disk import Disk, is_full
from tensorway_fs.handles import Handles
from tensorway_fs.index import Index
from tensorway_fs.namespace import Named, Namespace
from tensorway_fs.options import FsOptions
from tensorway_fs.owner import myself
from tensorway_fs.records import Head, Kind, keys_of
from tensorway_fs.segment import Block, Run, Segment, Writer, adopt, claimed, create, read_table

_log = logger("offload.fs")
#: The first segment of a kind has one part in so many of the size that is set, and each further one twice the last.
_FIRST: Final = 16
#: Of the quota, so that removing the oldest leaves the most.
_OF_QUOTA: Final = 8
_PAUSE: Final = 0.002
#: Numbers of segments that were counted up to; whatever has a higher one was not.
_HIGHEST: Final = 1 << 63


class NoRoom(Exception):
    """Why a block cannot be written."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome: Outcome = outcome


@attrs.define
class Removed:
    """What was removed for room, since it was counted last."""

    segments: int = 0
    blocks: int = 0


class Space:
    """Open segments by kind. Threads share it; what waits has a deadline."""

    def __init__(
        self,
        namespace: Namespace,
        index: Index,
        handles: Handles,
        options: FsOptions,
        facts: Mapping[str, str],
        rescue: Callable[[Segment, int], list[Block]],
    ) -> None:
        """`rescue` says which blocks of a segment that is to go are worth to be written again, at most so many."""
        self._namespace, self._index, self._handles = namespace, index, handles
        self._disk: Disk = namespace.root.disk
        self._options, self._facts, self._rescue = options, facts, rescue
        self._writers: dict[Kind, Writer] = {}
        self._sizes: dict[Kind, int] = {}
        self._lock, self._growing, self._closed = threading.Lock(), threading.Lock(), False
        #: Why nothing can be written for now, and until when that is believed.
        self._trouble: tuple[Outcome, float] | None = None
        self._said = ""
        self.removed = Removed()

    @property
    def trouble(self) -> Outcome | None:
        """Why nothing can be written for now."""
        trouble = self._trouble
        return trouble[0] if trouble is not None and time.monotonic() < trouble[1] else None

    def reserve(self, kind: Kind, wish: int, until: float) -> Run:
        """Up to so many places; raises `NoRoom`."""
        while True:
            with self._lock:
                writer = self._writers.get(kind)
                run = None if writer is None else writer.take(wish)
            if run is not None:
                return run
            if trouble := self.trouble:
                raise NoRoom(trouble)
            if not self._growing.acquire(timeout=max(0.0, until - time.monotonic())):
                raise NoRoom("late")
            try:
                self._grow(kind, writer, until)
            finally:
                self._growing.release()

    def give(self, run: Run, *, failed: bool) -> None:
        """A run is written, or cannot be."""
        with self._lock:
            over = run.writer.give(run, failed=failed)
            if over and self._writers.get(run.writer.segment.head.kind) is run.writer:
                del self._writers[run.writer.segment.head.kind]
        if over:
            self._seal(run.writer)

    def note(self, error: OSError) -> Outcome:
        """What an error means for blocks; nothing is written until it may be over."""
        outcome: Outcome = "full" if is_full(error) else "failed"
        if self._said != str(error):  # once, and not as long as it lasts
            _log.warning("Blocks are not stored for now: %s", error)
        self._said = str(error)
        self._trouble = (outcome, time.monotonic() + self._options.retry)
        return outcome

    def recovered(self) -> None:
        """Something could be written again."""
        self._trouble, self._said = None, ""

    def segment_bytes(self) -> int:
        """Of a segment that is neither a first one nor small for its kind."""
        quota = self._options.max_bytes
        return min(self._options.segment_bytes, quota // _OF_QUOTA) if quota else self._options.segment_bytes

    def discard(self, segment: Segment) -> None:
        """Remove a segment in which nothing is left, as its table says and not only this process."""
        if segment.ours or not segment.state.sealed:
            return
        with self._handles.reading(segment.path) as file:
            table = read_table(self._disk, file, 0, segment.head.places)
        if not any(keys_of(segment.head, table, segment.head.places)):
            self._disk.unlink(segment.path)
            self._handles.forget(segment.path)
            self._index.drop(segment)

    def used(self) -> int:
        """Bytes that all segments in the folder take of the disk."""
        return sum(self._namespace.root.nbytes(named.path) for named in self._namespace.root.segments())

    def close(self) -> None:
        """Give all locks back; others may go on with what is not full. What is being written ends by itself."""
        with self._lock:
            self._closed = True
            writers, self._writers = list(self._writers.values()), {}
            for writer in writers:
                if not writer.idle:  # its descriptor stays for as long as somebody writes to it
                    writer.end()
            idle = [writer for writer in writers if writer.idle]
        for writer in idle:
            try:
                if self._options.durability != "none":
                    writer.sync()
            except OSError as error:  # what had to be on the disk was synced before it was `done`
                _log.warning("%s could not be synced: %s", writer.segment.path.name, error)
            finally:
                writer.close()

    # -- growing, one thread at a time

    def _grow(self, kind: Kind, full: Writer | None, until: float) -> None:
        with self._lock:
            if self._closed:
                raise NoRoom("failed")
            if self._writers.get(kind) is not full:
                return  # another thread has
        try:
            fresh = self._adopted(kind) or self._created(kind, until)
        except OSError as error:
            raise NoRoom(self.note(error)) from error
        if not self._kept(kind, fresh):
            fresh.close()
            raise NoRoom("failed")
        self._said = ""

    def _kept(self, kind: Kind, writer: Writer) -> bool:
        with self._lock:
            if not self._closed:
                self._writers[kind] = writer
            return not self._closed

    def _adopted(self, kind: Kind) -> Writer | None:
        """A segment with places left that a process has left behind."""
        for segment in self._index.segments():
            if segment.head.kind != kind or segment.ours or segment.state.sealed:
                continue
            writer = adopt(self._disk, segment, direct=self._options.direct)
            if writer is None:
                continue
            try:
                writer.begin(self._index.reread(segment))
                if self._options.durability != "none":  # who made it may have been killed before it did
                    self._disk.sync_folder(self._namespace.path)
            except BaseException:
                writer.close()
                raise
            if not writer.full:
                segment.ours = True
                return writer
            self._seal(writer)  # who wrote it was killed before it could say so
        return None

    def _created(self, kind: Kind, until: float) -> Writer:
        size = min(self.segment_bytes(), max(self.segment_bytes() // _FIRST, self._sizes.get(kind, 0) * 2))
        places = kind.places(size)
        head = Head(kind, places, 0, secrets.randbits(64), self._namespace.mark, myself())
        self._namespace.make(self._facts, sync=self._options.durability != "none")
        rescued: list[Block] = []
        with self._locked(until):
            head = attrs.evolve(head, number=self._make_room(head, rescued))
            try:
                writer = self._create(head)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._remove_oldest(head, rescued):
                    raise
                writer = self._create(head)
        self._sizes[kind] = head.nbytes
        self._index.add(writer.segment)
        if rescued:
            self._write_again(writer, rescued)
        return writer

    def _create(self, head: Head) -> Writer:
        sync = self._options.durability != "none"
        return create(self._disk, self._namespace.path, head, direct=self._options.direct, sync=sync)

    def _write_again(self, writer: Writer, blocks: list[Block]) -> None:
        run = writer.take(len(blocks))
        if run is None:
            return
        try:
            writer.write(run, blocks[: run.count])
            self._index.publish(writer.segment, run.first, [block.key for block in blocks[: run.count]])
            # Unless they are synced, who is told that they are stored must do it first.
            writer.segment.unsynced = True
        except OSError as error:  # they go, as the others of their segment did
            _log.debug("Blocks could not be kept: %s", error)
        finally:
            writer.give(run, failed=False)

    @contextmanager
    def _locked(self, until: float) -> Iterator[None]:
        """No other process makes room meanwhile, where files can be locked."""
        file = self._disk.open(self._namespace.root.lock, os.O_RDWR | os.O_CREAT)
        try:
            while self._disk.flock(file) is False:
                if time.monotonic() >= until:
                    raise NoRoom("late")
                time.sleep(_PAUSE)
            yield
        finally:
            self._disk.unlock(file)
            self._disk.close(file)

    def _make_room(self, head: Head, rescued: list[Block]) -> int:
        """Remove the oldest until a segment fits into the quota; the number of the next one."""
        found = self._namespace.root.segments()
        quota = self._options.max_bytes
        if quota:
            if head.nbytes > quota:  # whatever went
                raise OSError(errno.ENOSPC, f"max_bytes is {quota:,}, and a segment would have {head.nbytes:,}")
            sizes = {named.path: self._namespace.root.nbytes(named.path) for named in found}
            over = sum(sizes.values()) + head.nbytes - quota
            for named in found:
                if over <= 0:
                    break
                if self._remove(named, head, rescued):
                    over -= sizes[named.path]
            if over > 0:
                raise OSError(errno.ENOSPC, f"max_bytes is {quota:,}, and segments in use leave too little of it")
        return max((named.number for named in found if named.number < _HIGHEST), default=0) + 1

    def _remove_oldest(self, head: Head, rescued: list[Block]) -> bool:
        """The disk is full, as if that was the quota: whether as much went as is needed."""
        need, root = head.nbytes, self._namespace.root
        for named in root.segments():
            nbytes = root.nbytes(named.path)
            if self._remove(named, head, rescued):
                need -= nbytes
            if need <= 0:
                return True
        return False

    def _remove(self, named: Named, head: Head, rescued: list[Block]) -> bool:
        """Whether a segment could go, for nobody writes it."""
        segment = self._index.named(named.path.name) if named.path.parent == self._namespace.path else None
        if segment is not None and segment.ours:
            return False
        try:
            with claimed(self._disk, named) as free:
                if not free:
                    return False
                if segment is not None and segment.head.kind == head.kind:
                    rescued += self._rescue(segment, head.places // 4 - len(rescued))
                self._disk.unlink(named.path)
        except FileNotFoundError:
            return True
        except OSError as error:
            _log.debug("%s cannot be removed: %s", named.path, error)
            return False
        self.removed.segments += 1
        if segment is not None:
            self._handles.forget(named.path)
            self.removed.blocks += self._index.drop(segment)
        return True

    def _seal(self, writer: Writer) -> None:
        try:
            writer.seal(sync=self._options.durability != "none")
        except OSError as error:
            _log.warning("%s was not sealed: %s", writer.segment.path.name, error)
            writer.segment.unsynced = True
        writer.segment.ours = False
