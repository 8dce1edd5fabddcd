"""A folder with the segments of one fingerprint, below the folder that an operator named; and all of them together.

May import msgspec, the core's errors and this dist's disk and records. Names in a folder are hostile: what does not
look like ours is left alone, and nothing is opened through a link.

    FOLDER/v1/lock                      held while room is made; there is nothing in it
    FOLDER/v1/<32 hex>/facts.json       what the blocks are of, for people
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
