"""What the files of a folder say, read without an index and beside who writes them. May import this dist."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import attrs

from tensorway.offload import OffloadKey, key_tenant
from tensorway_fs.disk import Disk
from tensorway_fs.namespace import Named, Root, read_facts, read_head
from tensorway_fs.owner import lives
from tensorway_fs.records import ENTRY, Entry, Head, State, decoded, used
from tensorway_fs.segment import read_state, read_table


@attrs.frozen
class Survey:
    """One file that is called as a segment is."""

    disk: Disk
    named: Named
    nbytes: int
    #: None where the file could not be read as one; then `problem` says why.
    head: Head | None = None
    state: State = attrs.field(factory=State)
    table: bytes = b""
    problem: str = ""

    def entries(self) -> Iterator[tuple[int, Entry | None]]:
        """Places that are not free or dead; None for an entry that is damaged."""
        for place in range(used(self.table) if self.head is not None else 0):
            assert self.head is not None
            found = decoded(self.head, place, self.table[place * ENTRY : (place + 1) * ENTRY])
            if found != "missing":
                yield place, None if found == "corrupt" else found

    @property
    def blocks(self) -> int:
        """How many it has."""
        return sum(1 for _, found in self.entries() if found is not None)

    def tenants(self) -> Counter[str]:
        """Blocks of each tenant, as `gc` takes it."""
        found = (key_tenant(OffloadKey(each.key)).hex() for _, each in self.entries() if each is not None)
        return Counter("none" if not tenant.strip("0") else tenant for tenant in found)

    def last(self) -> int | None:
        """When its last block was stored, by the clock of who stored it."""
        return max((found.stored for _, found in self.entries() if found is not None), default=None)

    def facts(self) -> dict[str, str]:
        """What its blocks are of."""
        return read_facts(self.disk, self.named.path.parent)

    def row(self) -> dict[str, Any]:
        """For people and programs."""
        last = self.last()
        return {
            "space": self.named.space,
            "number": self.named.number,
            "file": self.named.path.name,
            "state": self._word(),
            "problem": self.problem,
            "blocks": self.blocks,
            "places": self.head.places if self.head else 0,
            "block_bytes": self.head.kind.stride if self.head else 0,
            "bytes": self.nbytes,
            "age_seconds": None if last is None else max(0.0, time.time() - last),
            "pid": self.head.owner.pid if self.head else 0,
        }

    def _word(self) -> str:
        """`written` by a process that lives, `left` by one that ended, `sealed`, or `damaged`."""
        if self.head is None:
            return "damaged"
        if self.state.sealed:
            return "sealed"
        return "written" if lives(self.head.owner) or self._locked() else "left"

    def _locked(self) -> bool:
        """By another process than the one that made it."""
        try:
            file = self.disk.open(self.named.path, os.O_RDONLY)
        except OSError:
            return False
        try:
            return not self.disk.flock(file)
        finally:
            self.disk.close(file)


def surveys(root: Root) -> Iterator[Survey]:
    """All files that are called as segments are, the oldest first."""
    for named in root.segments():
        try:
            found = survey(root, named)
        except FileNotFoundError:
            continue  # removed meanwhile
        if found is not None:
            yield found


def survey(root: Root, named: Named) -> Survey | None:
    """One of them; None of one that is being made."""
    nbytes = root.nbytes(named.path)
    try:
        file = root.disk.open(named.path, os.O_RDONLY)
    except FileNotFoundError:
        raise
    except OSError as error:
        return Survey(root.disk, named, nbytes, problem=str(error.strerror))
    try:
        head = read_head(root.disk, named, file)
        if isinstance(head, str):
            being_made = not root.disk.status_of(file).st_size or root.disk.flock(file) is False
            return None if being_made else Survey(root.disk, named, nbytes, problem=head)
        state = read_state(root.disk, file)
        return Survey(root.disk, named, nbytes, head, state, bytes(read_table(root.disk, file, 0, head.places)))
    except OSError as error:
        return Survey(root.disk, named, nbytes, problem=str(error.strerror))
    finally:
        root.disk.close(file)
