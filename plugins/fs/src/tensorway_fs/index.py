"""Which block is where, as far as this process knows: rebuilt from the tables of segments, one read for each.

May import the core's logging and this dist. Other processes write segments of their own meanwhile; `refresh` finds what
is new in them, and what is gone. What the index says of a block is where to look, never what is there.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from tensorway._logging import logger
from tensorway_fs.disk import Disk
from tensorway_fs.namespace import Named, Namespace, Removals, named_in, read_head
from tensorway_fs.records import MOST_PLACES, keys_of, used
from tensorway_fs.segment import Segment, read_state, read_table

_log = logger("offload.fs")
#: A refresh that takes long is not repeated at once: it has at most one part in so many of the time.
_SHARE: Final = 10
#: What a place is in the index: the segment's own number, and the place in it.
_SHIFT: Final = MOST_PLACES.bit_length()
_PLACE: Final = (1 << _SHIFT) - 1
#: What a segment's `keys` say of a place whose block is gone: places are written once, so that nothing comes after it.
_GONE: Final = b""


class Index:
    """Blocks by key. Threads share one; asking needs no lock."""

    def __init__(self, namespace: Namespace, disk: Disk, interval: float) -> None:
        self._namespace, self._disk, self._interval = namespace, disk, interval
        self._places: dict[bytes, int] = {}
        self._segments: dict[int, Segment] = {}
        self._by_name: dict[str, Segment] = {}
        #: What could not be read, and how it looked: it is read again when that changes.
        self._odd: dict[str, tuple[int, int, int]] = {}
        self._count, self._removals = 0, Removals(disk, namespace.path)
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._due = 0.0

    def __len__(self) -> int:
        return len(self._places)

    def has(self, key: bytes) -> bool:
        """Whether a block is known."""
        return key in self._places

    def find(self, key: bytes) -> tuple[Segment, int] | None:
        """Where to look for a block."""
        place = self._places.get(key)
        segment = None if place is None else self._segments.get(place >> _SHIFT)
        return None if place is None or segment is None else (segment, place & _PLACE)

    def copies(self, wanted: Callable[[bytes], bool]) -> dict[bytes, list[tuple[Segment, int]]]:
        """All places of each of the blocks: processes that did not know of each other may have stored one twice."""
        found: dict[bytes, list[tuple[Segment, int]]] = {}
        for segment in self.segments():
            for place, key in enumerate(list(segment.keys)):
                if key and wanted(key):
                    found.setdefault(key, []).append((segment, place))
        return found

    def segments(self) -> list[Segment]:
        """All that are known."""
        with self._lock:
            return list(self._segments.values())

    def named(self, name: str) -> Segment | None:
        """A segment by its file's name."""
        return self._by_name.get(name)

    def add(self, segment: Segment) -> None:
        """A segment with all that its table has. When all are read, the newest says where a block is."""
        with self._lock:
            known = self._places if self._due and not segment.ours else {}
            segment.ident = self._count
            self._count += 1
            self._segments[segment.ident] = segment
            self._by_name[segment.path.name] = segment
            self._learn(segment, 0, [None if key in known else key for key in segment.keys] if known else segment.keys)

    def publish(self, segment: Segment, first: int, keys: Sequence[bytes | None], *, certain: bool = True) -> None:
        """These places of a segment have blocks from now on.

        What is only read from a table is not `certain`, and does not come before a place that is known.
        """
        with self._lock:
            base, known = (segment.ident << _SHIFT) + first, segment.keys[first:]
            keys = [_GONE if old == _GONE else new for old, new in zip(known, keys, strict=False)]
            for at, (old, new) in enumerate(zip(known, keys, strict=False)):
                if old is not None and old != new and self._places.get(old) == base + at:
                    del self._places[old]
            segment.keys[first : first + len(keys)] = keys
            if not certain:
                keys = [None if key in self._places else key for key in keys]
            self._learn(segment, first, keys)

    def forget(self, segment: Segment, place: int) -> None:
        """A place's block is gone."""
        with self._lock:
            key = segment.keys[place]
            segment.keys[place] = _GONE
            if key is not None and self._places.get(key) == segment.ident << _SHIFT | place:
                del self._places[key]

    def drop(self, segment: Segment) -> int:
        """A segment is gone; how many blocks with it."""
        with self._lock:
            if self._segments.pop(segment.ident, None) is None:
                return 0
            self._by_name.pop(segment.path.name, None)
            count, base = 0, segment.ident << _SHIFT
            for place, key in enumerate(segment.keys):
                if key is not None and self._places.get(key) == base | place:
                    del self._places[key]
                    count += 1
            return count

    def refresh(self, until: float, *, force: bool = False) -> list[Segment]:
        """See what others have written and removed, unless that was just done; segments that are gone."""
        if not force and time.monotonic() < self._due:
            return []
        if not self._refreshing.acquire(timeout=max(0.0, until - time.monotonic())):
            return []
        try:
            begun = time.monotonic()
            if not force and begun < self._due:
                return []  # another thread has done it meanwhile
            gone = self._look(until)
            now = time.monotonic()
            self._due = now + max(self._interval, _SHARE * (now - begun) if self._interval else 0.0)
            return gone
        finally:
            self._refreshing.release()

    def reread(self, segment: Segment) -> int:
        """Take in a segment's whole table, such as of one that is adopted; how many places are not free."""
        file = self._disk.open(segment.path, os.O_RDONLY)
        try:
            table = read_table(self._disk, file, 0, segment.head.places)
            segment.state = read_state(self._disk, file)
        finally:
            self._disk.close(file)
        count = used(table)
        segment.unsynced = True
        self.publish(segment, 0, keys_of(segment.head, table, count), certain=False)
        return count

    def _learn(self, segment: Segment, first: int, keys: Iterable[bytes | None]) -> None:
        # Not one by one: opening has to know of a million of them in less than a second.
        base = (segment.ident << _SHIFT) + first
        self._places.update(zip(keys, range(base, base + segment.head.places), strict=False))  # type: ignore[arg-type]
        self._places.pop(None, None)  # type: ignore[call-overload]
        self._places.pop(_GONE, None)

    def _look(self, until: float) -> list[Segment]:
        named = {each.path.name: each for each in named_in(self._disk, self._namespace.path)}
        removed = self._removals.names()
        gone = [segment for segment in self.segments() if segment.path.name not in named and not segment.ours]
        for segment in gone:
            self.drop(segment)
        self._odd = {name: looks for name, looks in self._odd.items() if name in named}
        for name in sorted(named):
            if time.monotonic() >= until:
                break
            known = self._by_name.get(name)
            try:
                if known is not None and name in removed:
                    self._recheck(known)
                if known is None:
                    self._load(named[name])
                elif not known.ours and not known.state.sealed:
                    self._follow(known)
            except FileNotFoundError:
                continue  # removed meanwhile
            except OSError as error:
                self._note_odd(named[name], str(error))
        return gone

    def _load(self, named: Named) -> None:
        status = self._disk.status(named.path)
        if self._odd.get(named.path.name) == (status.st_size, status.st_mtime_ns, status.st_ino):
            return
        file = self._disk.open(named.path, os.O_RDONLY)
        try:
            head = read_head(self._disk, named, file)
            if isinstance(head, str):
                self._note_odd(named, head)
                return
            # The state before the table: what is written meanwhile changes the state again.
            state = read_state(self._disk, file)
            table = read_table(self._disk, file, 0, head.places)
        finally:
            self._disk.close(file)
        keys = keys_of(head, table, used(table))
        keys += [None] * (head.places - len(keys))
        self.add(Segment(named.path, head, keys, state=state))
        self._odd.pop(named.path.name, None)

    def _follow(self, segment: Segment) -> None:
        """What another process has written to a segment since."""
        file = self._disk.open(segment.path, os.O_RDONLY)
        try:
            state = read_state(self._disk, file)
            if state == segment.state:
                return
            end = min(state.end, segment.head.places)
            first = next((place for place in range(end) if segment.keys[place] is None), end)
            table = read_table(self._disk, file, first, end - first)
        finally:
            self._disk.close(file)
        keys = keys_of(segment.head, table, end - first)
        segment.unsynced = True
        self.publish(segment, first, keys, certain=False)
        segment.state = state

    def _recheck(self, segment: Segment) -> None:
        """Forget what was marked dead."""
        known = list(segment.keys)  # before its table: what is stored meanwhile is not there, and not dead
        file = self._disk.open(segment.path, os.O_RDONLY)
        try:
            table = read_table(self._disk, file, 0, segment.head.places)
        finally:
            self._disk.close(file)
        now = keys_of(segment.head, table, segment.head.places)
        dead = [place for place, (old, new) in enumerate(zip(known, now, strict=True)) if old and old != new]
        for place in dead:
            self.forget(segment, place)

    def _note_odd(self, named: Named, why: str) -> None:
        try:
            status = self._disk.status(named.path)
        except OSError:
            return  # it is gone, and nothing is to be remembered
        looks = (status.st_size, status.st_mtime_ns, status.st_ino)
        if self._odd.get(named.path.name) != looks:
            _log.debug("%s is left alone: %s", named.path, why)
            self._odd[named.path.name] = looks
