"""Blocks out of segments into the buffers of who asked: places that lie together in one call, and every byte checked.

May import this dist. An entry is read before its block, every time, for other processes delete and remove; and the
block's checksum is taken from the caller's buffer, after which nothing touches it.
"""

from __future__ import annotations

import errno
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Literal

import attrs

from tensorway.offload import Outcome
from tensorway_fs.disk import MOST_BUFFERS, Disk
from tensorway_fs.handles import Handles
from tensorway_fs.records import DIRECT, ENTRY, PAGE, Entry, decoded, digest_of
from tensorway_fs.segment import Block, Segment, read_table

#: Bytes that are read before the deadline is looked at again.
_AT_ONCE: Final = 16 << 20


@attrs.frozen
class Wanted:
    """A block, where it should be, and where it goes."""

    key: bytes
    place: int
    into: memoryview
    #: Which of the call's items it is.
    position: int


@attrs.frozen
class Read:
    """What became of one."""

    wanted: Wanted
    outcome: Outcome
    segment: Segment


class Reader:
    """Reads; threads share it."""

    def __init__(self, disk: Disk, handles: Handles, *, direct: bool) -> None:
        self._disk, self._handles, self._direct = disk, handles, direct
        self._scratch = bytearray(PAGE)

    def read(self, wanted: Iterable[tuple[Segment, Wanted]], until: float) -> Iterator[Read]:
        """All of these, segment by segment; raises nothing for what a file holds."""
        by_segment: dict[int, list[tuple[Segment, Wanted]]] = defaultdict(list)
        for segment, one in wanted:
            by_segment[id(segment)].append((segment, one))
        for found in by_segment.values():
            segment = found[0][0]
            for run in _runs(sorted((one for _, one in found), key=lambda one: one.place), segment.head.kind.stride):
                if time.monotonic() >= until:
                    yield from (Read(one, "late", segment) for one in run)
                    continue
                try:
                    yield from self._run(segment, run)
                except FileNotFoundError:  # removed for room
                    yield from (Read(one, "missing", segment) for one in run)
                except OSError as error:
                    outcome: Outcome = "corrupt" if error.errno in (errno.EIO, errno.ELOOP) else "failed"
                    yield from (Read(one, outcome, segment) for one in run)

    def rescue(self, segment: Segment, most: int) -> list[Block]:
        """Blocks that were read since they were written, to be written elsewhere before their segment goes."""
        places = [at for at, hot in enumerate(segment.hot) if hot and segment.keys[at]][: max(0, most)]
        blocks = []
        try:
            with self._handles.reading(segment.path) as file:
                for place in places:
                    found = decoded(segment.head, place, read_table(self._disk, file, place, 1))
                    if not isinstance(found, Entry):
                        continue
                    data = bytearray(found.nbytes)
                    count = self._disk.read(file, [memoryview(data)], segment.head.at(place))
                    if count == found.nbytes and digest_of(data) == found.digest:
                        blocks.append(Block(found.key, memoryview(data), found.digest))
        except OSError:
            return []  # what cannot be read goes with its segment
        return blocks

    def _run(self, segment: Segment, run: list[Wanted]) -> list[Read]:
        head, first = segment.head, run[0].place
        done: list[Read] = []
        with self._handles.reading(segment.path) as file:
            table = memoryview(read_table(self._disk, file, first, len(run)))
            sound: list[tuple[Wanted, Entry]] = []
            for at, one in enumerate(run):
                found = _matching(decoded(head, one.place, table[at * ENTRY : (at + 1) * ENTRY]), one)
                if isinstance(found, Entry):
                    sound.append((one, found))
                else:
                    done.append(Read(one, found, segment))
            for part in [sound] if len(sound) == len(run) else [[each] for each in sound]:
                got = self._fill(segment, file, [one for one, _ in part])
                for at, (one, found) in enumerate(part):
                    whole = at * head.kind.stride + len(one.into) <= got
                    good = whole and digest_of(one.into) == found.digest
                    outcome = "done" if good else self._again(segment, file, one)
                    done.append(Read(one, outcome, segment))
        return done

    def _fill(self, segment: Segment, file: int, run: Sequence[Wanted]) -> int:
        """Read places that lie together into their buffers; how many bytes there were."""
        stride, buffers = segment.head.kind.stride, []
        for one in run:
            buffers.append(one.into)
            rest = stride - len(one.into)
            if rest:  # what follows a block is nobody's, so threads may write over each other's
                buffers.append(memoryview(self._scratch)[:rest])
        at = segment.head.at(run[0].place)
        if self._direct and len(buffers) == len(run) and len(run) * stride >= DIRECT:
            try:
                with self._handles.reading(segment.path, direct=True) as other:
                    return self._disk.read(other, buffers, at)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # These buffers, or this file system, want the page cache between.
        return self._disk.read(file, buffers, at)

    def _again(self, segment: Segment, file: int, one: Wanted) -> Literal["missing", "corrupt"]:
        """Whether a block that is not what it was is gone by now, or damaged."""
        found = decoded(segment.head, one.place, read_table(self._disk, file, one.place, 1))
        return "missing" if found == "missing" else "corrupt"


def _matching(found: Entry | Literal["missing", "corrupt"], one: Wanted) -> Entry | Literal["missing", "corrupt"]:
    if isinstance(found, Entry) and (found.key != one.key or found.nbytes != len(one.into)):
        return "corrupt"
    return found


def _runs(ordered: Sequence[Wanted], stride: int) -> Iterator[list[Wanted]]:
    """Places that lie together, as many as one call takes."""
    most = max(1, min(MOST_BUFFERS // 2, _AT_ONCE // stride))
    run: list[Wanted] = []
    for one in ordered:
        if run and (one.place != run[-1].place + 1 or len(run) >= most):
            yield run
            run = []
        run.append(one)
    if run:
        yield run
