"""What `files` needs of NIXL and of the system: an agent with a POSIX backend, an open file, lists of their blocks.

May import tensorway's ground, the transport's block tables, and its own package but the fabric.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import stat
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import attrs

from tensorway.errors import BackendUnavailable, MemoryInvalid, TensorwayError, TransferFailed, Unsupported
from tensorway.memory import PAGE
from tensorway.native import Absent
from tensorway.transport.blocks import BlockTable
from tensorway_nixl import agent as agents
from tensorway_nixl import tables
from tensorway_nixl.jobs import told
from tensorway_nixl.library import LIBRARY, keep_quiet
from tensorway_nixl.links import Remote
from tensorway_nixl.loopback import version

PLUGIN: Final = "POSIX"
#: Ways into the kernel, in the order to try. Containers allow the first as a rule, and not the second. Not the third
#: that NIXL has, `use_posix_aio`: after one error it fails for ever, and does not say when the rest is over.
QUEUES: Final = {"aio": {"use_aio": "true"}, "uring": {"use_uring": "true"}}
#: Before it, a read behind the end of the file and a write for which there is no room are done, and without a word.
_OLDEST: Final = (1, 5, 1)
#: Indices are 32 bits.
_MAX_INDEX: Final = 1 << 31
#: A block table begins above zero, and a file at zero.
_START: Final = 1


@attrs.frozen(eq=False)
class Lists:
    """A table of memory and the file's blocks in the same planes, prepared; released when it is forgotten."""

    ours: agents.List
    theirs: agents.List
    table: BlockTable
    blocks: BlockTable


class PosixAgent(agents.Agent):
    """An agent that knows files instead of peers."""

    def memory(self, device: str) -> Any:
        """NIXL's word for a kind of memory, and for files."""
        return self.bindings.FILE_SEG if device == "file" else super().memory(device)

    def attach(self, file: io.FileIO, nbytes: int) -> None:
        """Register a file, which then stays open as long as the agent lives."""
        handle = self.bindings.nixlRegDList(self.memory("file"), [(0, nbytes, file.fileno(), "")])
        self.native.registerMem(handle, [])
        self.regions[id(handle)] = (handle, file)  # type: ignore[assignment]  # kept, and never looked at


@contextmanager
def ours(remote: Remote, asked: str) -> Iterator[None]:
    """NIXL's exceptions, which have no common base, as ours."""
    try:
        yield
    except TensorwayError:
        raise
    except Exception as error:
        raise told(error, remote, asked) from error


def prepare(agent: PosixAgent, name: str, table: BlockTable, file: io.FileIO, size: tuple[int, int]) -> Lists:
    """Prepare a table and the file's blocks, of which `size` is length and count."""
    planes = range(_START, _START + size[0], table.block_bytes)  # one, if the table is stacked
    blocks = BlockTable(tuple(planes), table.block_bytes, size[0], size[1])
    largest = len(planes) * max(table.count, blocks.count)
    asked = f"{len(planes)} planes of {table.count:,} and {blocks.count:,} blocks were to be prepared."
    if largest > _MAX_INDEX:
        raise Unsupported(asked, "That is more than 2**31.", "Split the table, or the file.")

    def placed(rows: Any) -> Any:
        rows[:, 0] -= _START
        rows[:, 2] = file.fileno()
        return rows

    def refused() -> Any:
        raise _too_old(asked, "This NIXL has no strided lists")

    us = agent.bindings.NIXL_INIT_AGENT
    mine = agent.prepare(us, "cpu", lambda: tables.strided(table), refused)
    its = agent.prepare(name, "file", lambda: placed(tables.strided(blocks)), refused)
    return Lists(mine, its, table, blocks)


def create(name: str, asked: str) -> tuple[PosixAgent, str]:
    """An agent with a POSIX backend alone, and the way into the kernel that it takes."""
    keep_quiet()
    loaded = LIBRARY.result()
    if isinstance(loaded, Absent):
        raise BackendUnavailable(asked, f"NIXL cannot be loaded: {loaded.reason}.", loaded.remedy)
    found = version(loaded.module) or ""
    if tuple(map(int, re.findall(r"[0-9]+", found)[:3])) < _OLDEST:
        raise _too_old(asked, f"{loaded.module} is NIXL {found or 'of an unknown version'}")
    bindings = importlib.import_module(f"{loaded.module}._bindings")
    config = bindings.nixlAgentConfig()
    config.useProgThread = False  # whoever waits makes the progress
    config.syncMode = bindings.NIXL_THREAD_SYNC_STRICT
    reasons = {}
    for queue, parameters in QUEUES.items():
        try:
            native = bindings.nixlAgent(name, config)
            native.createBackend(PLUGIN, parameters)
        except Exception as error:  # NIXL's exceptions have no common base
            reasons[queue] = f"{type(error).__name__}: {error}"
        else:
            agent = PosixAgent(bindings, native)
            agents.opened.add(agent)  # for the end of the process, and for forked children
            return agent, queue
    missing = all(reason.startswith("nixlNotFoundError") for reason in reasons.values())
    each = "; ".join(f"{queue}: {reason}" for queue, reason in reasons.items())
    true = f"NIXL ({loaded.module}) {'has no' if missing else 'cannot start its'} {PLUGIN} plugin ({each})."
    raise Unsupported(asked, true, "See what seccomp and fs.aio-max-nr allow; NIXL's own reason is on stderr.")


def _too_old(asked: str, which: str) -> Unsupported:
    true = f"{which}; before 1.5.1 it says that reads and writes of files are done when they failed."
    return Unsupported(asked, true, "Use NIXL 1.5.1 or newer.")


def open_file(path: str, nbytes: int, writable: bool, direct: bool, asked: str) -> io.FileIO:
    """Open a regular file; unless `nbytes` is 0, make it if it is not there, and so long at least."""
    if nbytes and not writable:
        raise Unsupported(asked, "What is only read cannot be made.", "Leave out create, or writable=False.")
    flags = (os.O_RDWR if writable else os.O_RDONLY) | (os.O_CREAT if nbytes else 0) | (os.O_DIRECT if direct else 0)
    try:
        # Not to wait for ever for the other end of a pipe.
        file = io.FileIO(os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o600), "r+" if writable else "r")
        found = os.fstat(file.fileno())
        if stat.S_ISREG(found.st_mode) and found.st_size < nbytes:
            os.ftruncate(file.fileno(), nbytes)
    except OSError as error:
        raise TransferFailed(asked, f"The system does not open it: {error.strerror}.", "Look at the path.") from error
    if not stat.S_ISREG(found.st_mode):
        file.close()
        raise Unsupported(asked, "It is no regular file.", "Give one.")
    return file


def check_table(table: BlockTable, block_bytes: int, direct: bool, asked: str) -> None:
    """Refuse a table whose blocks are not the file's, or that the kernel would not take without its page cache."""
    if table.width * table.block_bytes != block_bytes:
        true = f"{table.width} times {table.block_bytes:,} bytes, which one id moves, are no block of {block_bytes:,}."
        raise MemoryInvalid(asked, true, "Give a table of the file's blocks.")
    if direct and any(number % PAGE for number in (*table.bases, table.block_bytes, table.stride)):
        true = f"With direct, bases, block lengths and strides are multiples of {PAGE:,}."
        raise MemoryInvalid(asked, true, "Use memory of tensorway.memory.shared.")


def check_length(file: io.FileIO, block_bytes: int, ids: array[int], asked: str) -> None:
    """Refuse a file that ends before the last of these blocks does."""
    last, there = max(ids), os.fstat(file.fileno()).st_size
    if there < (needed := (last + 1) * block_bytes):
        true = f"The file has {there:,} bytes, and block {last} ends at {needed:,}."
        raise TransferFailed(asked, true, "Treat the blocks as lost, and write them anew.")
