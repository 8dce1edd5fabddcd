"""Keys and bytes in a folder that several hosts may see: whole files or none, whoever writes, dies or removes.

May import attrs. It knows nothing of blocks: what its files say, who may trust it, and which of them may go is decided
elsewhere, so that another store can take its place. Any call may take as long as the file system lets it.
"""

from __future__ import annotations

import os
import re
import stat
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs

#: Parts of a key are digests: nothing that a client has said becomes a path.
_KEY: Final = re.compile(r"[0-9a-f]{8,128}(/[0-9a-f]{8,128})?", re.ASCII)
_NAME: Final = re.compile(r"([0-9a-f]{8,128})\.r([0-9]{1,5})", re.ASCII)
#: Where files are while they are written, and what they are called there.
_FRESH: Final = "new"
_HALF: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
#: Never through a link, and never waiting for the other end of a pipe.
_FLAGS: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Bytes = bytes | bytearray | memoryview


@attrs.frozen
class Entry:
    """One file."""

    key: str
    rank: int
    nbytes: int
    #: When it was written or read last, in seconds of the file system's clock.
    used: float


class Folder:
    """Files by key and rank. Threads may share one."""

    def __init__(self, root: Path, *, sync: bool = False) -> None:
        self._root, self._sync = root, sync

    def put(self, key: str, rank: int, buffers: Sequence[Bytes]) -> int:
        """Write a file, in place of one that is there; readers see all of it or nothing. How many bytes it has."""
        fresh, path = self._root / _FRESH / uuid.uuid4().hex, self._path(key, rank)
        try:
            file = self._create(fresh)
            try:
                count = sum(_write(file, memoryview(buffer).cast("B")) for buffer in buffers)
                if self._sync:
                    os.fsync(file)
            finally:
                os.close(file)
            _into(fresh, path)
        except BaseException:
            _unlink(fresh)
            raise
        if self._sync:
            _sync_folder(path.parent)
        return count

    def get(self, key: str, rank: int, most: int) -> bytearray | None:
        """What a file holds, and of one that is longer than `most` one byte more; None if there is none."""
        try:
            file = os.open(self._path(key, rank), os.O_RDONLY | _FLAGS)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            if self.has(key, rank):
                raise
            return None  # a link, or something else that is no file
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                return None
            data = bytearray(min(status.st_size, most + 1))
            got = _read(file, memoryview(data))
            del data[got:]
            _touch(file)
        finally:
            os.close(file)
        return data

    def has(self, key: str, rank: int) -> bool:
        """Whether there is such a file."""
        try:
            return stat.S_ISREG(self._path(key, rank).lstat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def remove(self, key: str, rank: int) -> bool:
        """Whether there was one; it is gone."""
        return _unlink(self._path(key, rank))

    def list(self) -> Iterator[Entry]:
        """All files; those that come or go meanwhile may be there or not."""
        yield from _entries(self._root, "")

    def tidy(self, age: float) -> int:
        """Remove what writers that died have left half-written, once it is so many seconds old; how many.

        Whoever may write to the folder may put a link to somebody's files in place of this part of it: so it is opened
        as what it is, and only what has a name of ours goes.
        """
        count, now = 0, time.time()
        try:
            fresh = os.open(self._root / _FRESH, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
        except OSError:  # there is none, or it is a link
            return 0
        try:
            for entry in _scan(fresh):
                status = _status(entry)
                if _HALF.fullmatch(entry.name) and status is not None and now - status.st_mtime > age:
                    count += _unlink(entry.name, fresh)
        finally:
            os.close(fresh)
        return count

    def _path(self, key: str, rank: int) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key[:200]!r} is no key of a file")
        *above, name = key.split("/")
        return self._root.joinpath(*above, name[:2], f"{name}.r{int(rank)}")

    @staticmethod
    def _create(fresh: Path) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS
        try:
            return os.open(fresh, flags, 0o666)
        except FileNotFoundError:
            fresh.parent.mkdir(parents=True, exist_ok=True)
            return os.open(fresh, flags, 0o666)


def _into(fresh: Path, path: Path) -> None:
    try:
        fresh.replace(path)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.replace(path)


def _write(file: int, data: memoryview) -> int:
    done = 0
    while done < len(data):  # one call writes 2 GiB at most, and less where the disk ends
        done += os.write(file, data[done:])
    return done


def _read(file: int, into: memoryview) -> int:
    done = 0
    while done < len(into):
        count = os.readv(file, [into[done:]])
        if not count:
            break
        done += count
    return done


def _touch(file: int) -> None:
    try:
        os.utime(file)
    except OSError:
        pass  # who may only read is not asked how long things are kept


def _unlink(path: Path | str, folder: int | None = None) -> bool:
    try:
        os.unlink(path, dir_fd=folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _entries(folder: Path, above: str) -> Iterator[Entry]:
    """Files in folders of two letters, and below one folder for the first part of a key of two."""
    for shelf in _scan(folder):
        if not shelf.is_dir(follow_symlinks=False):
            continue
        if len(shelf.name) != 2:
            if not above and _KEY.fullmatch(shelf.name):
                yield from _entries(Path(shelf.path), f"{shelf.name}/")
            continue
        for file in _scan(Path(shelf.path)):
            name, status = _NAME.fullmatch(file.name), _status(file)
            if name and status is not None and stat.S_ISREG(status.st_mode):
                yield Entry(above + name[1], int(name[2]), status.st_size, status.st_mtime)


def _scan(folder: Path | int) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):
        return


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
