"""All that this dist asks of the operating system: a campaign that kills at every system call takes this one's place.

Ground of this dist; may import nothing of it. Files are opened so that neither a link nor a pipe leads astray, and
belong to who runs the process alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

Buffer = bytes | bytearray | memoryview

#: Never through a link, never waiting for the other end of a pipe, never in another program.
_COMMON: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
#: Buffers that one system call takes.
MOST_BUFFERS: Final = 512
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_full(error: OSError) -> bool:
    """Whether a disk, a quota or a limit of the process is used up."""
    return error.errno in _FULL


class Disk:
    """System calls, each a method of its own; `write` and `read` go on where one of them stopped."""

    def open(self, path: Path, flags: int) -> int:
        """A descriptor."""
        return os.open(path, flags | _COMMON, 0o600)

    def close(self, file: int) -> None:
        """Give a descriptor back, and the lock that is held through it, unless a child has it, too: see `unlock`."""
        os.close(file)

    def pwritev(self, file: int, buffers: Sequence[Buffer], offset: int) -> int:
        """How many bytes were written."""
        return os.pwritev(file, buffers, offset)

    def preadv(self, file: int, buffers: Sequence[Any], offset: int) -> int:
        """How many bytes were read."""
        return os.preadv(file, buffers, offset)

    def fallocate(self, file: int, nbytes: int) -> None:
        """Give a file all its room, so that a full disk is met before anything is written."""
        os.posix_fallocate(file, 0, nbytes)

    def fdatasync(self, file: int) -> None:
        """Return when what was written is on the disk."""
        os.fdatasync(file)

    def sync_folder(self, path: Path) -> None:
        """Return when the names in a folder are on the disk."""
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def flock(self, file: int) -> bool | None:
        """Take a file's lock, which ends with the process; False if another has it, None where there are no locks."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                return False
            if error.errno in _NO_LOCKS:
                # Nobody can say whose a file is, so it is somebody else's, unless it was just made.
                return None
            raise
        return True

    def unlock(self, file: int) -> None:
        """Give a file's lock back, also if a child was forked meanwhile that still has the descriptor."""
        try:
            fcntl.flock(file, fcntl.LOCK_UN)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise

    def unlink(self, path: Path) -> None:
        """Remove a name."""
        path.unlink()

    def replace(self, path: Path, by: Path) -> None:
        """Give the file `by` this name, in place of what has it."""
        by.replace(path)

    def mkdir(self, path: Path) -> None:
        """Make a folder, unless it is there."""
        path.mkdir(mode=0o700, exist_ok=True)

    def touch(self, file: int) -> None:
        """Say that a file was used now."""
        os.utime(file)

    def names(self, path: Path) -> list[str]:
        """What is in a folder; nothing in one that is not there."""
        try:
            return os.listdir(path)  # noqa: PTH208 - names are wanted, a million paths are not
        except (FileNotFoundError, NotADirectoryError):
            return []

    def status(self, path: Path) -> os.stat_result:
        """Of what has this name, be it a link."""
        return path.lstat()

    def status_of(self, file: int) -> os.stat_result:
        """Of an open file."""
        return os.fstat(file)

    def write(self, file: int, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all of these, one behind the other."""
        left = [buffer for buffer in buffers if len(buffer)]
        while left:
            count = self.pwritev(file, left[:MOST_BUFFERS], offset)
            if count <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            offset += count
            left = _behind(left, count)

    def read(self, file: int, buffers: Sequence[Any], offset: int) -> int:
        """Fill these, one behind the other, as far as the file goes; how many bytes that were."""
        left, done = [buffer for buffer in buffers if len(buffer)], 0
        while left:
            count = self.preadv(file, left[:MOST_BUFFERS], offset + done)
            if not count:
                break
            done += count
            left = _behind(left, count)
        return done


def _behind(buffers: list[Any], count: int) -> list[Any]:
    """What is left of buffers behind their first bytes."""
    for number, buffer in enumerate(buffers):
        if count < len(buffer):
            return [memoryview(buffer)[count:], *buffers[number + 1 :]] if count else buffers[number:]
        count -= len(buffer)
    return []
