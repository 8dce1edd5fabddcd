"""A folder with the segments of one fingerprint, below the folder that an operator named; and all of them together.

May import the core's errors and this dist's disk and records. Names in a folder are hostile: what does not
look like ours is left alone, and nothing is opened through a link.

    FOLDER/v1/lock                      held while room is made; there is nothing in it
    FOLDER/v1/<32 hex>/facts.json       what the blocks are of, for people
    FOLDER/v1/<32 hex>/removed          segments in which blocks were marked dead
    FOLDER/v1/<32 hex>/<number>-<nonce>.seg
    FOLDER/v1/<32 hex>/blocks/<2 hex>/  plain files, where the layout is `files`
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import attrs

from tensorway_fs.disk import Disk
from tensorway_fs.records import FINGERPRINT, PAGE, Head

_TOP: Final = "v1"
_SPACE: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
_SEGMENT: Final = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})\.seg", re.ASCII)
FACTS: Final = "facts.json"
#: Which segments have lost blocks, one name after the other.
REMOVED: Final = "removed"
_RECORD: Final = 40
_LONGEST_LOG: Final = _RECORD << 12
#: Bytes of facts that are read; they are for people.
_LONGEST: Final = 1 << 16


@attrs.frozen
class Named:
    """A segment file, by its name alone."""

    path: Path
    number: int

    @property
    def space(self) -> str:
        """The namespace that it is in."""
        return self.path.parent.name


@attrs.frozen
class Root:
    """What is below the folder that an operator named."""

    folder: Path
    disk: Disk

    @property
    def top(self) -> Path:
        """Where this version's files are."""
        return self.folder / _TOP

    @property
    def lock(self) -> Path:
        """The file whose lock is held while room is made."""
        return self.top / "lock"

    def spaces(self) -> list[Path]:
        """The namespaces that are there."""
        found = (self.top / name for name in sorted(self.disk.names(self.top)) if _SPACE.fullmatch(name))
        return [path for path in found if self._is_folder(path)]

    def segments(self) -> list[Named]:
        """All that look like segments, the oldest first."""
        return sorted(
            (named for space in self.spaces() for named in named_in(self.disk, space)),
            key=lambda named: (named.number, named.path.name),
        )

    def nbytes(self, path: Path) -> int:
        """What a file takes of the disk; 0 if it is gone."""
        try:
            status = self.disk.status(path)
        except OSError:  # it went meanwhile, or cannot be seen
            return 0
        return status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0

    def _is_folder(self, path: Path) -> bool:
        try:
            return stat.S_ISDIR(self.disk.status(path).st_mode)
        except OSError:
            return False


def named_in(disk: Disk, space: Path) -> Iterator[Named]:
    """What looks like a segment in one namespace."""
    for name in disk.names(space):
        match = _SEGMENT.fullmatch(name)
        if match:
            yield Named(space / name, int(match[1], 16))


@attrs.frozen
class Namespace:
    """The segments of one fingerprint."""

    root: Root
    mark: bytes

    @classmethod
    def of(cls, folder: Path, fingerprint: bytes, disk: Disk) -> Namespace:
        """The one whose blocks have this fingerprint, of whatever length that is."""
        mark = hashlib.blake2b(fingerprint, digest_size=FINGERPRINT, person=b"tw.fs.space").digest()
        return cls(Root(folder, disk), mark)

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.root.top / self.mark.hex()

    def make(self, facts: Mapping[str, str], *, sync: bool) -> None:
        """Make it, and say for people what it is of; raises `OSError` where that cannot be."""
        disk = self.root.disk
        disk.mkdir(self.root.top)
        disk.mkdir(self.path)
        if FACTS not in disk.names(self.path):
            self._tell(facts)
        if sync:
            for folder in (self.root.folder, self.root.top, self.path):
                disk.sync_folder(folder)

    def _tell(self, facts: Mapping[str, str]) -> None:
        disk, fresh = self.root.disk, self.path / f"new-{secrets.token_hex(8)}"
        text = json.dumps({"namespace": self.mark.hex(), "facts": dict(sorted(facts.items()))}, indent=2)
        file = disk.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            disk.write(file, [text.encode(errors="replace")], 0)
        finally:
            disk.close(file)
        disk.replace(self.path / FACTS, fresh)


def tell_removed(disk: Disk, segment: Path) -> None:
    """Let other processes know that blocks of a segment are dead; who is not told learns it when it reads them."""
    log = segment.parent / REMOVED
    file = disk.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        over = disk.status_of(file).st_size >= _LONGEST_LOG
        if not over:
            disk.write(file, [segment.name.encode()[:_RECORD].ljust(_RECORD)], 0)
    finally:
        disk.close(file)
    if over:
        disk.unlink(log)  # who reads it begins anew, and so do we
        tell_removed(disk, segment)


class Removals:
    """What others have told by `tell_removed` since it was asked last. One thread at a time uses it."""

    def __init__(self, disk: Disk, space: Path) -> None:
        self._disk, self._log = disk, space / REMOVED
        self._file, self._at = 0, 0

    def names(self) -> set[str]:
        """Segments of which blocks are dead; whatever the file says, no more than it has."""
        try:
            file = self._disk.open(self._log, os.O_RDONLY)
        except OSError:
            return set()  # nobody has said anything, or it is no file of ours
        try:
            status = self._disk.status_of(file)
            if not stat.S_ISREG(status.st_mode):
                return set()
            if status.st_ino != self._file or status.st_size < self._at:
                self._file, self._at = status.st_ino, 0
            raw = bytearray(max(0, min(status.st_size, _LONGEST_LOG + _RECORD) - self._at))
            count = self._disk.read(file, [memoryview(raw)], self._at) // _RECORD
            self._at += count * _RECORD
        finally:
            self._disk.close(file)
        rows = (bytes(raw[at * _RECORD : (at + 1) * _RECORD]) for at in range(count))
        return {row.decode("ascii", "replace").strip() for row in rows}


def read_facts(disk: Disk, space: Path) -> dict[str, str]:
    """What people are told of a namespace; nothing if it cannot be read."""
    try:
        file = disk.open(space / FACTS, os.O_RDONLY)
    except OSError:
        return {}
    try:
        data = bytearray(_LONGEST)
        found = json.loads(data[: disk.read(file, [memoryview(data)], 0)])
    except (OSError, ValueError, RecursionError):
        return {}
    finally:
        disk.close(file)
    facts = found.get("facts") if isinstance(found, dict) else None
    return {str(name): str(value) for name, value in facts.items()} if isinstance(facts, dict) else {}


def read_head(disk: Disk, named: Named, file: int) -> Head | str:
    """What an open file says that it is, if that is what its name says; else what is wrong with it."""
    if not stat.S_ISREG(disk.status_of(file).st_mode):
        return "foreign"
    page = bytearray(PAGE)
    disk.read(file, [memoryview(page)], 0)
    head = Head.decoded(page)
    if isinstance(head, str):
        return head
    if head.name != named.path.name or head.fingerprint.hex() != named.space:
        return "foreign"
    return head
