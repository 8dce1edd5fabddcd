"""Disks that stop: one kills its process at its n-th system call, one loses its power and all that was not synced.

May import this dist. Both take the place of `tensorway_fs.disk.Disk` and nothing else in a tier changes.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from tensorway_fs.disk import Buffer, Disk

How = Literal["before", "after", "half"]
HOWS: Final[tuple[How, ...]] = ("before", "after", "half")
#: What a disk writes as a whole.
_SECTOR: Final = 512
_R = TypeVar("_R")


class _CountingDisk(Disk):
    """Every system call goes through `_call`."""

    def _call(self, call: Callable[..., _R], *arguments: Any) -> _R:
        raise NotImplementedError

    def open(self, path: Path, flags: int) -> int:
        return self._call(super().open, path, flags)

    def close(self, file: int) -> None:
        self._call(super().close, file)

    def pwritev(self, file: int, buffers: Sequence[Buffer], offset: int) -> int:
        return self._call(super().pwritev, file, buffers, offset)

    def preadv(self, file: int, buffers: Sequence[Any], offset: int) -> int:
        return self._call(super().preadv, file, buffers, offset)

    def fallocate(self, file: int, nbytes: int) -> None:
        self._call(super().fallocate, file, nbytes)

    def fdatasync(self, file: int) -> None:
        self._call(super().fdatasync, file)

    def sync_folder(self, path: Path) -> None:
        self._call(super().sync_folder, path)

    def flock(self, file: int) -> bool | None:
        return self._call(super().flock, file)

    def unlock(self, file: int) -> None:
        self._call(super().unlock, file)

    def unlink(self, path: Path) -> None:
        self._call(super().unlink, path)

    def replace(self, path: Path, by: Path) -> None:
        self._call(super().replace, path, by)

    def mkdir(self, path: Path) -> None:
        self._call(super().mkdir, path)

    def names(self, path: Path) -> list[str]:
        return self._call(super().names, path)

    def status(self, path: Path) -> os.stat_result:
        return self._call(super().status, path)


class StoppingDisk(_CountingDisk):
    """Ends its process, without a word, at the n-th call: before it, after it, or when half of a write is done."""

    def __init__(self, at: int, how: How) -> None:
        self._at, self._how, self._count = at, how, 0

    def _call(self, call: Callable[..., _R], *arguments: Any) -> _R:
        self._count += 1
        if self._count != self._at:
            return call(*arguments)
        if self._how == "half" and call.__name__ == "pwritev":
            file, buffers, offset = arguments
            whole = b"".join(buffers)
            os.pwrite(file, whole[: len(whole) // 2 // _SECTOR * _SECTOR], offset)
        elif self._how != "before":
            try:
                return call(*arguments)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("the process has ended")


class PowerLost(BaseException):
    """Everything ends here; nothing that a tier does afterwards reaches the disk."""


class PowerDisk(_CountingDisk):
    """Loses its power at the n-th call. `lose` then takes back, sector by sector and name by name, what was not synced:
    some of it, as chance has it, and in any order."""

    def __init__(self, at: int, aside: Path) -> None:
        self._at, self._aside, self._count = at, aside, 0
        self._paths: dict[int, Path] = {}
        #: Of each sector that was written to since its file was synced: all that it has held, the oldest first.
        self._sectors: dict[tuple[Path, int], list[bytes]] = {}
        self._created: set[Path] = set()
        self._unlinked: dict[Path, Path] = {}

    def _call(self, call: Callable[..., _R], *arguments: Any) -> _R:
        self._count += 1
        if self._count >= self._at:
            raise PowerLost
        return call(*arguments)

    def open(self, path: Path, flags: int) -> int:
        made = bool(flags & os.O_CREAT) and not path.exists()
        file = super().open(path, flags)
        self._paths[file] = path
        if made:
            self._created.add(path)
        return file

    def close(self, file: int) -> None:
        path = self._paths.pop(file, None)
        if path is not None:  # also without power: processes end, and locks with them
            os.close(file)

    def pwritev(self, file: int, buffers: Sequence[Buffer], offset: int) -> int:
        path, size = self._paths[file], sum(map(len, buffers))
        sectors = range(offset // _SECTOR, -(-(offset + size) // _SECTOR))
        before = [self._read(path, sector) for sector in sectors]
        count = super().pwritev(file, buffers, offset)
        for sector, old in zip(sectors, before, strict=True):
            self._sectors.setdefault((path, sector), [old]).append(self._read(path, sector))
        return count

    def fdatasync(self, file: int) -> None:
        super().fdatasync(file)
        path = self._paths[file]
        self._sectors = {key: value for key, value in self._sectors.items() if key[0] != path}

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        self._created = {each for each in self._created if each.parent != path}
        self._unlinked = {each: kept for each, kept in self._unlinked.items() if each.parent != path}

    def unlink(self, path: Path) -> None:
        kept = self._aside / f"{len(self._unlinked)}-{path.name}"
        path_there = path.is_file()
        if path_there:
            os.link(path, kept)
        super().unlink(path)
        if path_there:
            self._unlinked[path] = kept

    def lose(self, rng: random.Random) -> int:
        """Let chance decide what had reached the disk; how many sectors and names it took back."""
        for file in list(self._paths):
            self.close(file)
        count = 0
        for path, kept in self._unlinked.items():
            if rng.random() < 0.5 and not path.exists():
                os.link(kept, path)
                count += 1
        for (path, sector), versions in self._sectors.items():
            if path.exists():
                with path.open("r+b") as damaged:
                    damaged.seek(sector * _SECTOR)
                    damaged.write(rng.choice(versions))
                count += 1
        for path in self._created:
            if rng.random() < 0.3 and path.exists():
                path.unlink()
                count += 1
        return count

    @staticmethod
    def _read(path: Path, sector: int) -> bytes:
        file = os.open(path, os.O_RDONLY)
        try:
            return os.pread(file, _SECTOR, sector * _SECTOR)
        finally:
            os.close(file)
