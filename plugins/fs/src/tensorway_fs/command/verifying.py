"""Every block of a folder, read and compared with its checksum. May import this dist.

Engines may run: what they remove meanwhile is not there, and what they write is read when it is whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

import attrs

from tensorway_fs.command.survey import Survey, surveys
from tensorway_fs.namespace import Root
from tensorway_fs.records import ENTRY, Entry, decoded, digest_of
from tensorway_fs.segment import bury, read_table

#: Seconds between two words of progress, and problems that are named one by one.
_EVERY: Final = 1.0
_NAMED: Final = 20


@attrs.define
class Verified:
    """What was found."""

    sound: int = 0
    damaged: int = 0
    #: Files that cannot be read as segments.
    files: int = 0
    nbytes: int = 0
    problems: list[str] = attrs.field(factory=list)

    def note(self, text: str) -> None:
        """Name a problem, if there are not too many."""
        if len(self.problems) < _NAMED:
            self.problems.append(text)


def verify_all(root: Root, say: Callable[[str], None], *, repair: bool) -> Verified:
    """Read all there is; with `repair` mark dead what is not what was stored."""
    found, said = Verified(), time.monotonic()
    total = len(root.segments())
    for number, survey in enumerate(surveys(root), 1):
        if survey.problem:
            found.files += 1
            found.note(f"{survey.named.path.name}: {survey.problem}")
        try:
            bad = _verify(survey, found)
        except FileNotFoundError:
            continue  # removed meanwhile
        if bad and repair:
            _repair(survey, bad, found)
        if time.monotonic() - said >= _EVERY:
            said = time.monotonic()
            say(f"{number} of {total} segments, {found.sound:,} blocks are sound, {found.damaged:,} damaged")
    return found


def _repair(survey: Survey, bad: list[int], found: Verified) -> None:
    try:
        bury(survey.disk, survey.named.path, bad, sync=False)
    except FileNotFoundError:
        return  # removed meanwhile
    except OSError as error:
        found.note(f"{survey.named.path.name}: not repaired: {error.strerror}")


def _verify(survey: Survey, found: Verified) -> list[int]:
    """Places that are not what they should be."""
    bad: list[int] = []
    if survey.head is None:
        return bad
    file = survey.disk.open(survey.named.path, os.O_RDONLY)
    try:
        # No more than there is, whatever a head says.
        buffer = memoryview(bytearray(min(survey.head.kind.stride, survey.disk.status_of(file).st_size)))
        for place, entry in survey.entries():
            if entry is not None:
                data = buffer[: entry.nbytes]
                count = _read(survey, file, place, data)
                found.nbytes += count
                if count == entry.nbytes and digest_of(data) == entry.digest:
                    found.sound += 1
                    continue
            now = bytes(read_table(survey.disk, file, place, 1))
            if now != survey.table[place * ENTRY : (place + 1) * ENTRY] and not isinstance(
                decoded(survey.head, place, now), Entry
            ):
                continue  # deleted meanwhile
            bad.append(place)
            found.damaged += 1
            found.note(f"{survey.named.path.name}: place {place}: {'entry' if entry is None else 'block'}")
    finally:
        survey.disk.close(file)
    return bad


def _read(survey: Survey, file: int, place: int, into: memoryview) -> int:
    """How many bytes of a block there are; none of one that the disk does not give."""
    assert survey.head is not None
    try:
        return survey.disk.read(file, [into], survey.head.at(place))
    except OSError:
        return 0
