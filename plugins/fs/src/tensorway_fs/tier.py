"""The tier `fs` with segments: seven calls, each of many blocks, over an index, room, and a reader.

May import the core and this dist. It has no thread of its own: what it does, it does on the caller's, until that one's
deadline. A disk that hangs holds that thread, as it would hold any.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, cast

import attrs

from tensorway._logging import logger
from tensorway.errors import Closed, OptionsInvalid
from tensorway.metrics import Counters, Sample
from tensorway.offload import (
    METRICS,
    OffloadKey,
    OfTenant,
    Outcome,
    TierCapabilities,
    TierContext,
    key_tenant,
)
from tensorway.types import ProbeResult
from tensorway_fs.disk import MOST_BUFFERS, Disk
from tensorway_fs.handles import Handles
from tensorway_fs.index import Index
from tensorway_fs.namespace import Namespace
from tensorway_fs.options import FsOptions
from tensorway_fs.probe import writable
from tensorway_fs.reading import Read, Reader, Wanted
from tensorway_fs.records import LARGEST, LONGEST_KEY, PAGE, Kind, digest_of
from tensorway_fs.segment import Block, Run, Segment, bury
from tensorway_fs.space import NoRoom, Space

_log = logger("offload.fs")
#: Bytes that are written before the deadline is looked at again.
_AT_ONCE: Final = 16 << 20
Items = Sequence[tuple[OffloadKey, memoryview]]


@attrs.define
class _Written:
    """Runs of one call that are in files and not in the index yet."""

    runs: list[tuple[Run, list[Block]]] = attrs.field(factory=list)


class SegmentTier:
    """Blocks in preallocated segment files. Threads share it, and processes share its folder."""

    def __init__(self, options: FsOptions, context: TierContext, disk: Disk | None = None) -> None:
        """`disk` takes the place of the operating system, for who wants to see what a call of it may do."""
        self._disk, self._options = disk or Disk(), options
        self.capabilities = TierCapabilities(
            persistent=True, shared=True, alignment=PAGE if options.direct else 1, calls=4
        )
        self._namespace = Namespace.of(Path(options.folder), context.fingerprint, self._disk)
        self._index = Index(self._namespace, self._disk, options.refresh)
        self._handles = Handles(self._disk, options.files)
        self._reader = Reader(self._disk, self._handles, direct=options.direct)
        self._space = Space(
            self._namespace, self._index, self._handles, options, dict(context.facts), self._reader.rescue
        )
        self._counts, self._counting = Counters(METRICS), threading.Lock()
        self._process, self._closed = os.getpid(), False
        try:
            self._namespace.make(context.facts, sync=options.durability != "none")
        except OSError as error:  # it may be read all the same, and `probe` says when it can be written
            self._space.note(error)
        self._index.refresh(time.monotonic() + context.deadline, force=True)

    def probe(self, deadline: float) -> ProbeResult:
        """Whether a file can be written here."""
        self._check("probed")
        result = writable(self._disk, self._namespace.root.top)
        if result.usable:
            self._space.recovered()
        return result

    def contains(self, keys: Sequence[OffloadKey], deadline: float) -> list[bool]:
        """Which of these there are, as far as tables say it."""
        self._check("asked")
        if deadline > 0:
            self._refresh(time.monotonic() + deadline)
        return [self._index.has(key) for key in keys]

    def put(self, items: Items, deadline: float) -> list[Outcome]:
        """Store blocks: one after the other in a segment, those of a call in as few writes as they fit."""
        self._check("written to")
        until = time.monotonic() + deadline
        if deadline > 0 and any(self._index.has(key) for key, _ in items):
            self._refresh(until)  # what others have removed is not there any more
        outcomes: dict[bytes, Outcome] = {}
        there: list[bytes] = []
        kinds: dict[Kind, list[tuple[bytes, memoryview]]] = defaultdict(list)
        for key, buffer in items:
            if key in outcomes:
                continue
            data = bytes_of(buffer)
            check_block(key, data)
            outcomes[key] = self._space.trouble or "late"
            if self._index.has(key):
                there.append(key)
            else:
                kinds[Kind.of(key, len(data))].append((bytes(key), data))
        if self._space.trouble is None:
            for kind, blocks in kinds.items():
                written = _Written()
                try:
                    self._write(kind, blocks, until, outcomes, written)
                finally:
                    self._publish(written, outcomes)
        self._confirm(there, until, outcomes)
        return [outcomes[key] for key, _ in items]

    def get(self, items: Items, deadline: float) -> list[Outcome]:
        """Read blocks into their buffers."""
        self._check("read")
        until = time.monotonic() + deadline
        if deadline > 0 and not all(self._index.has(key) for key, _ in items):
            self._refresh(until)
        outcomes: list[Outcome] = ["missing"] * len(items)
        wanted = []
        for position, (key, buffer) in enumerate(items):
            found = self._index.find(key)
            if found is not None:
                wanted.append((found[0], Wanted(bytes(key), found[1], bytes_of(buffer), position)))
        damaged: list[Read] = []
        for read in self._reader.read(wanted, until):
            outcomes[read.wanted.position] = read.outcome
            if read.outcome == "done":
                read.segment.hot[read.wanted.place] = 1
            elif read.outcome == "corrupt":
                damaged.append(read)
            elif read.outcome == "missing":
                self._index.forget(read.segment, read.wanted.place)
        self._remove(((read.segment, read.wanted.place) for read in damaged), "corrupt")
        return outcomes

    def delete(self, which: Sequence[OffloadKey] | OfTenant, deadline: float) -> int:
        """Mark these dead; their bytes go with their segment, at once if nothing else is in it."""
        self._check("deleted from")
        until = time.monotonic() + deadline
        self._refresh(until, force=deadline > 0)
        if isinstance(which, OfTenant):
            tenant = which.tenant
            found = self._index.copies(lambda key: key_tenant(cast(OffloadKey, key)) == tenant)
        else:
            found = self._index.copies(frozenset[bytes](which).__contains__)
        self._remove((place for places in found.values() for place in places), "deleted", until)
        return sum(not any(segment.keys[place] for segment, place in places) for places in found.values())

    def stats(self) -> Sequence[Sample]:
        """What the folder holds and may hold, and what is gone from it and why."""
        with self._counting:
            label, removed = self._options.label, self._space.removed
            self._counts.set("offload_used_bytes", 0 if self._closed else self._space.used(), medium=label)
            if self._options.max_bytes:
                self._counts.set("offload_capacity_bytes", self._options.max_bytes, medium=label)
            self._counts.set("offload_blocks", len(self._index), medium=label, state="ready")
            self._counts.set("offload_removed_total", removed.blocks, medium=label, cause="evicted")
            return self._counts.samples()

    def close(self, deadline: float = 5.0) -> None:
        """Give back locks and descriptors; everything stays where it is."""
        if self._closed:
            return
        self._closed = True
        if self._process == os.getpid():
            self._space.close()
            self._handles.close()

    def _check(self, what: str) -> None:
        if not self._closed and self._process == os.getpid():
            return
        true = "It was closed." if self._closed else "It belongs to the process that this one was forked from."
        raise Closed(f"The tier {self._options.label} was to be {what}.", true, "Make another one.")

    def _refresh(self, until: float, *, force: bool = False) -> None:
        for segment in self._index.refresh(until, force=force):
            self._handles.forget(segment.path)

    # -- writing

    def _write(
        self,
        kind: Kind,
        blocks: Sequence[tuple[bytes, memoryview]],
        until: float,
        outcomes: dict[bytes, Outcome],
        written: _Written,
    ) -> None:
        """Into files, not yet to be seen by this process; what became of those that could not be written."""
        most = max(1, min(MOST_BUFFERS // 2, _AT_ONCE // kind.stride))
        at = 0
        while at < len(blocks) and time.monotonic() < until:
            wish = blocks[at : at + most]
            try:
                run = self._space.reserve(kind, len(wish), until)
            except NoRoom as error:
                outcomes.update((key, error.outcome) for key, _ in blocks[at:])
                return
            run_blocks = [Block(key, data, digest_of(data)) for key, data in wish[: run.count]]
            at += run.count
            try:
                run.writer.write(run, run_blocks)
            except OSError as error:
                outcomes.update((key, self._space.note(error)) for key, _ in blocks[at - run.count :])
                self._space.give(run, failed=True)
                return
            except BaseException:
                self._space.give(run, failed=True)
                raise
            written.runs.append((run, run_blocks))
            if self._options.durability != "strict":  # which waits for the disk once in a call, and not for each run
                self._publish(written, outcomes)

    def _publish(self, written: _Written, outcomes: dict[bytes, Outcome]) -> None:
        """Say that blocks are stored, when they are as surely as they are to be."""
        synced: dict[int, bool] = {}
        runs, written.runs = written.runs, []
        for run, blocks in runs:
            good = True
            if self._options.durability == "strict":
                good = synced.get(id(run.writer), False) or self._sync(run)
                synced[id(run.writer)] = good
            if good:
                self._index.publish(run.writer.segment, run.first, [block.key for block in blocks])
            outcomes.update((block.key, "done" if good else "failed") for block in blocks)
            self._space.give(run, failed=not good)

    def _sync(self, run: Run) -> bool:
        try:
            run.writer.sync()
        except OSError as error:
            # What the disk has of it, nobody knows; the kernel will not say it a second time.
            self._space.note(error)
            return False
        return True

    def _confirm(self, there: Sequence[bytes], until: float, outcomes: dict[bytes, Outcome]) -> None:
        """Blocks that were there are done; under `strict` when what another process wrote is on the disk."""
        for key in there:
            found = self._index.find(key)
            if found is None or self._options.durability != "strict" or not found[0].unsynced:
                outcomes[key] = "done"  # if it is gone by now, then after it was stored
            elif time.monotonic() < until:
                outcomes[key] = "done" if self._sync_other(found[0]) else "failed"

    def _sync_other(self, segment: Segment) -> bool:
        segment.unsynced = False  # before: what is found meanwhile sets it again
        try:
            with self._handles.reading(segment.path) as file:
                self._disk.fdatasync(file)
            self._disk.sync_folder(self._namespace.path)
        except OSError as error:
            _log.warning("%s could not be synced: %s", segment.path.name, error)
            segment.unsynced = True
        return not segment.unsynced

    # -- removing

    def _remove(self, which: Iterable[tuple[Segment, int]], cause: str, until: float | None = None) -> None:
        """Mark places dead and forget them."""
        by_segment: dict[int, tuple[Segment, list[int]]] = {}
        for segment, place in which:
            by_segment.setdefault(id(segment), (segment, []))[1].append(place)
        count = 0
        for segment, places in by_segment.values():
            if until is not None and time.monotonic() >= until:
                break
            try:
                bury(self._disk, segment.path, places, sync=self._options.durability == "strict")
            except FileNotFoundError:
                pass  # the whole segment is gone
            except OSError as error:
                _log.warning("Blocks of %s could not be removed: %s", segment.path.name, error)
                if cause == "deleted":
                    continue
            for place in places:
                self._index.forget(segment, place)
            count += len(places)
            if not any(segment.keys):
                self._discard(segment)
        if count:
            with self._counting:
                self._counts.add("offload_removed_total", count, medium=self._options.label, cause=cause)

    def _discard(self, segment: Segment) -> None:
        try:
            self._space.discard(segment)
        except OSError as error:  # its blocks are dead all the same
            _log.debug("%s stays: %s", segment.path.name, error)


def bytes_of(buffer: memoryview) -> memoryview:
    """A buffer as bytes, whatever it is of."""
    view = memoryview(buffer)
    return view if view.format == "B" and view.ndim == 1 and view.c_contiguous else view.cast("B")


def check_block(key: bytes, data: memoryview) -> None:
    """Raise for what no entry can say."""
    if not 0 < len(key) <= LONGEST_KEY or len(data) > LARGEST:
        raise OptionsInvalid(
            f"A block of {len(data):,} bytes was to be stored under a key of {len(key)} bytes.",
            f"A key has 1 to {LONGEST_KEY} bytes here, and a block at most {LARGEST:,}.",
            "Make keys with make_offload_key, and blocks smaller.",
        )
