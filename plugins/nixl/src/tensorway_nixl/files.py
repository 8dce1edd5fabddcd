"""Blocks between memory and a file, through NIXL's POSIX backend.

May import tensorway's ground, the transport's block tables, and its own package but the fabric. NIXL has no deadline,
cannot cancel, and checks no ids: all three are made good here. Before 1.5.1 it says that what failed is done: refused.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import Any, Final

import attrs

from tensorway import _logging
from tensorway.errors import Closed, DeadlineExceeded, MemoryInvalid, Unsupported
from tensorway.memory import Region
from tensorway.transport.blocks import BlockTable, block_ids, covered
from tensorway.transport.contract import Operation
from tensorway_nixl import agent as agents
from tensorway_nixl import posix, tables
from tensorway_nixl.jobs import Jobs
from tensorway_nixl.links import Job, Remote

#: What is posted at once: a deadline may be late by what the kernel takes for it. NIXL refuses more than 65,536 pieces.
_MAX_PIECES: Final = 1024
_MAX_BYTES: Final = 64 << 20
#: Waiting: this many looks without a pause, then pauses that grow by the first to the last.
_SPINS, _PAUSE, _LAST_PAUSE = 20, 5e-6, 100e-6

_log = _logging.logger("nixl")


@attrs.frozen(eq=False)
class Memory(AbstractContextManager["Memory"]):
    """Memory that is registered with a file; `close` gives it back once nothing can touch it any more."""

    regions: tuple[Region, ...]
    _file: BlockFile = attrs.field(repr=False)
    _handles: list[Any] = attrs.field(repr=False)

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self, deadline: float = 30.0) -> None:
        """Deregister; waits for what uses it, and raises `DeadlineExceeded` with nothing changed."""
        self._file._deregister(self, self._handles, time.monotonic() + deadline)


class BlockFile(AbstractContextManager["BlockFile"]):
    """A file of `count` blocks of `block_bytes`. Threads may share it; every deadline is in seconds from now.

    A table with several planes has the planes of a block one after another in the file's block.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        block_bytes: int,
        count: int,
        *,
        create: bool = False,
        writable: bool = True,
        direct: bool = False,
    ) -> None:
        """Open it; `create` makes it if it is not there, and long enough; `direct` goes around the page cache."""
        nbytes = BlockTable((1,), block_bytes, block_bytes, count).span  # which checks the numbers
        self.path, self.block_bytes, self.count = os.fspath(path), block_bytes, count
        self.writable, self.direct = writable, direct
        asked = f"{self.path} was to be opened for {count:,} blocks of {block_bytes:,} bytes."
        self._pid, self._closed, self._lock = os.getpid(), False, threading.RLock()
        #: What is registered; the tables of calls that run; jobs that came too late or failed, with their tables.
        self._known: dict[Memory, None] = {}
        self._using: dict[object, BlockTable] = {}
        self._late: dict[Job, BlockTable] = {}
        self._prepared: dict[BlockTable, posix.Lists] = {}
        self._remote = Remote(self.path, f"file-{self._pid}-{id(self)}")
        self._agent, self.queue = posix.create(self._remote.incarnation, asked)
        self._jobs = Jobs(self._agent, threading.RLock(), lambda remote: None)
        self._agent.drain = self._jobs.drain
        try:
            self._file = posix.open_file(self.path, nbytes if create else 0, writable, direct, asked)
            with posix.ours(self._remote, asked):
                self._agent.attach(self._file, nbytes)
        except BaseException:
            self._agent.close()
            raise

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def pending(self) -> int:
        """How many operations failed or came too late and are not over: their blocks may still change."""
        self._check_open(f"What is pending with {self.path} was asked for.")
        with self._lock:
            self._sweep()
            return len(self._late)

    def register(self, *memory: object) -> Memory:
        """Make host memory usable for reads and writes: tensors, arrays, buffers or regions."""
        made = Memory(tuple(map(Region.of, memory)), self, [])
        asked = f"{sum(region.nbytes for region in made.regions):,} bytes were to be registered with {self.path}."
        self._check_open(asked)
        if any(region.device != "cpu" for region in made.regions):
            raise Unsupported(asked, "NIXL's POSIX backend moves host memory only.", "Copy through host memory.")
        with self._lock, posix.ours(self._remote, asked):
            self._check_open(asked)
            made._handles.extend(map(self._agent.register, made.regions))
            self._known[made] = None
        return made

    def read(
        self, table: BlockTable, local_ids: Iterable[int], file_ids: Iterable[int], deadline: float = 30.0
    ) -> None:
        """Fetch blocks of the file into these blocks of the table; returns when they are there."""
        self._move("read", table, local_ids, file_ids, time.monotonic() + deadline)

    def write(
        self, table: BlockTable, local_ids: Iterable[int], file_ids: Iterable[int], deadline: float = 30.0
    ) -> None:
        """Put these blocks of the table into blocks of the file; returns when the kernel has them."""
        self._move("write", table, local_ids, file_ids, time.monotonic() + deadline)

    def close(self, deadline: float = 5.0) -> None:
        """Wait for what is under way, and close; what is not over then keeps its memory and the open file.

        The second call does nothing, and neither does one in a forked child.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed, self._known = True, {}
        try:
            self._wait(self._idle, f"{self.path} was to be closed.", time.monotonic() + deadline)
        except DeadlineExceeded as error:
            agents.keep_for_ever(self._agent)
            _log.warning("%s It stays open until this process ends", error.asked, extra={"path": self.path})
            return
        if self._agent.close():
            self._file.close()

    # -- inside

    def _move(self, operation: Operation, table: BlockTable, local: Any, remote: Any, until: float) -> None:
        asked = f"A {operation} of blocks of {self.path} was asked for."
        self._check_open(asked)
        if operation == "write" and not self.writable:
            raise Unsupported(asked, "The file was opened with writable=False.", "Open it for writing.")
        posix.check_table(table, self.block_bytes, self.direct, asked)
        ours = block_ids(local, table.count, unique=operation == "read", whose="local")
        theirs = block_ids(remote, self.count, unique=operation == "write", whose="the file's")
        if len(ours) != len(theirs):
            raise MemoryInvalid(asked, f"There are {len(ours)} local ids, and {len(theirs)} of the file.", "Pair them.")
        # What came too late may still write: a later call must not be overtaken by it.
        self._wait(self._sweep, asked, until)
        with self._held(asked, until), posix.ours(self._remote, asked):
            self._check_open(asked)
            if not covered(table, (region for known in self._known for region in known.regions)):
                raise MemoryInvalid(asked, "The table reaches beyond what is registered with the file.", "Register it.")
            lists = self._lists(table)
            self._using[call := object()] = table
        try:
            step = max(1, min(_MAX_PIECES // len(table.bases), _MAX_BYTES // self.block_bytes))
            for part in (slice(first, first + step) for first in range(0, len(ours), step)):
                self._part(operation, lists, ours[part], theirs[part], asked, until)
        finally:
            del self._using[call]

    def _part(
        self, operation: Operation, lists: posix.Lists, ours: array[int], theirs: array[int], asked: str, until: float
    ) -> None:
        """Move a part; the file's length is looked at before and after, since it may be cut at any time."""
        native, bindings, reading = self._agent.native, self._agent.bindings, operation == "read"
        kind = bindings.NIXL_READ if reading else bindings.NIXL_WRITE
        with self._held(asked, until), posix.ours(self._remote, asked):
            self._check_open(asked)  # it may have been closed since the part before
            if reading:
                posix.check_length(self._file, self.block_bytes, theirs, asked)
            local, remote = tables.indices(lists.table, ours), tables.indices(lists.blocks, theirs)
            handle = native.makeXferReq(kind, lists.ours.handle, local, lists.theirs.handle, remote, b"", [], False)
            job = self._jobs.start(Job(self._remote, asked, handle, lists))
        if job is not None:
            try:
                self._wait(lambda: self._jobs.done(job), asked, until)
            except BaseException:  # whatever ends the wait does not end the job
                self._late[job] = lists.table
                raise
        if reading:
            posix.check_length(self._file, self.block_bytes, theirs, asked)

    def _lists(self, table: BlockTable) -> posix.Lists:
        lists = self._prepared.get(table)
        if lists is None or lists.ours.epoch != self._agent.epoch:
            if len(self._prepared) >= 64:  # an engine has a few
                self._prepared.clear()
            name = self._remote.incarnation
            lists = posix.prepare(self._agent, name, table, self._file, (self.block_bytes, self.count))
            self._prepared[table] = lists
        return lists

    def _deregister(self, memory: Memory, handles: list[Any], until: float) -> None:
        if self._closed or os.getpid() != self._pid or memory not in self._known:
            return
        asked = f"Memory was to be taken from {self.path}."
        del self._known[memory]  # nothing new may use it
        try:
            self._wait(lambda: self._idle(memory.regions), asked, until)
            with self._held(asked, until):
                while handles and not self._closed:
                    self._agent.deregister(handles.pop())
        except DeadlineExceeded:
            self._known[memory] = None
            raise

    def _idle(self, regions: Iterable[Region] | None = None) -> bool:
        """Whether nothing uses these regions, or nothing at all."""
        self._sweep()
        return not any(
            regions is None or any(start < region.end and region.address < start + length for region in regions)
            for table in (*self._using.values(), *self._late.values())
            for start, length in table.extents()
        )

    def _sweep(self) -> bool:
        """Let go of what is over by now; whether that is all."""
        for job in tuple(self._late):
            if self._jobs.settled(job):
                self._late.pop(job, None)
        return not self._late

    def _wait(self, over: Callable[[], bool], asked: str, until: float) -> None:
        for look in count():
            with self._held(asked, until):
                if over():
                    return
            # NIXL hands the kernel 64 pieces at each look, and only then: so the first looks follow at once.
            if look >= _SPINS:
                time.sleep(min((look - _SPINS) * _PAUSE, _LAST_PAUSE))

    @contextmanager
    def _held(self, asked: str, until: float) -> Iterator[None]:
        """One call into NIXL at a time; another thread's may take as long as the kernel likes."""
        left = until - time.monotonic()
        if left <= 0 or not self._lock.acquire(timeout=min(left, threading.TIMEOUT_MAX)):
            raise DeadlineExceeded(asked, "It was not over by its deadline.", "See what holds the disk up.")
        try:
            yield
        finally:
            self._lock.release()

    def _check_open(self, asked: str) -> None:
        if os.getpid() != self._pid:  # before any lock: a thread that is not here may hold it for ever
            raise Closed(asked, "It belongs to the process that this one was forked from.", "Open it in this one.")
        if self._closed:
            raise Closed(asked, "It was closed.", "Open it anew.")
