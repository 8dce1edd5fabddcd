"""Sockets that a forked child does not keep: its copy of one would hide from peers that this process has ended.

Room `transport`; imports nothing of tensorway. The end of a process is seen by the end of its connections, and the
kernel ends one when nobody holds it any more. So every socket of `local` and of a mover's life is made by `kept` and
closed by `close`; the child that `os.fork` makes closes all of them before anything else of it runs. Starting another
program needs none of this, since Python's files are not inherited by one.
"""

from __future__ import annotations

import os
import socket
import threading
import weakref
from collections.abc import Callable
from typing import Final

#: Held while there is a file of which a child would not know, and by who forks: never while something waits.
unforked: Final = threading.Lock()
#: Every socket that a forked child would inherit.
_sockets: Final[weakref.WeakSet[socket.socket]] = weakref.WeakSet()


def kept(make: Callable[[], tuple[socket.socket, ...]]) -> tuple[socket.socket, ...]:
    """New sockets, of which a child that is forked from now on knows; `make` must not wait."""
    with unforked:
        made = make()
        _sockets.update(made)
        return made


def close(channel: socket.socket) -> None:
    """Close it, and not while somebody forks: between forgetting the file and closing it, a child would inherit it."""
    with unforked:
        channel.close()


def unix_socket() -> tuple[socket.socket]:
    """A socket of messages in order, for `kept`."""
    return (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET),)


def _close_inherited() -> None:
    unforked.release()
    for channel in list(_sockets):
        channel.close()


os.register_at_fork(before=unforked.acquire, after_in_parent=unforked.release, after_in_child=_close_inherited)
