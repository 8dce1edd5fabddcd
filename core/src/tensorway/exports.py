"""What a process shows of itself to its owner: values at a socket, in the folder that TENSORWAY_METRICS names.

Ground; may import `metrics`, `metrics_server`, the settings, the loggers and the errors. Who counts calls `export` when
it is made. Without the variable that is one look at the environment; with it, sources are called when somebody looks,
and never on the way of a byte. What goes wrong here is said in the log and raised nowhere: it is not worth an engine.
"""

from __future__ import annotations

import atexit
import errno
import itertools
import os
import secrets
import socket
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final
from weakref import WeakMethod

from tensorway import settings
from tensorway._logging import logger
from tensorway.errors import SettingInvalid
from tensorway.metrics import Metric, Sample

if TYPE_CHECKING:
    from tensorway.metrics_server import MetricsServer

VARIABLE: Final = "TENSORWAY_METRICS"
#: The end of the name of a socket that answers; the name begins with the number of its process.
SUFFIX: Final = ".tensorway"
#: Bytes of a name that the system takes for a socket.
_LONGEST: Final = 107
#: So often a source is asked once more, beside a thread that counts and makes its tables larger.
_TRIES: Final = 3

_log = logger("metrics")
_lock = threading.Lock()
#: For each folder who answers there, and its socket; None where nobody can.
_servers: Final[dict[str, tuple[MetricsServer, Path] | None]] = {}
_numbers: Final = itertools.count(1)


def export(what: str, source: Callable[[], Iterable[Sample]], metrics: Mapping[str, Metric]) -> None:
    """Show what a bound method answers for as long as its object lives; nothing unless TENSORWAY_METRICS is set.

    It is called on a thread of its own, beside the one that counts: it may read, and must not wait for others.
    """
    folder = (settings.get(VARIABLE) or "").strip()
    if not folder:
        return
    with _lock:
        if folder not in _servers:
            _servers[folder] = _opened(folder)
        opened = _servers[folder]
    if opened is not None:
        server, name = opened[0], f"{what} {next(_numbers)}"
        method = WeakMethod(source, lambda _: server.remove(name))
        server.add(name, partial(_asked, method), metrics)


@contextmanager
def short(path: Path) -> Iterator[str]:
    """The same place by a name that a socket takes: one has 107 bytes at most, and folders of users are longer."""
    if len(os.fsencode(path)) <= _LONGEST:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _asked(method: WeakMethod[Callable[[], Iterable[Sample]]]) -> Iterable[Sample]:
    for _ in range(_TRIES):
        try:
            return (method() or tuple)()
        except RuntimeError:  # a table grew while it was read
            continue
    return (method() or tuple)()


def _opened(folder: str) -> tuple[MetricsServer, Path] | None:
    from tensorway.metrics_server import MetricsServer

    try:
        place = _private(Path(folder))
        for old in place.glob(f"*{SUFFIX}"):
            if _left_over(old):
                old.unlink(missing_ok=True)
        fresh = place / f"{os.getpid()}-{secrets.token_hex(4)}"
        # By its name only when it listens: one that is bound and refuses looks as if it were left over.
        with short(fresh) as name:
            server = MetricsServer({}, host=name)
        return server, fresh.rename(fresh.with_suffix(SUFFIX))
    except Exception as error:
        _log.warning("Nobody sees the metrics of this process: %s", " ".join(str(error).split()))
        return None


def _private(folder: Path) -> Path:
    """The folder, which nobody else can reach into."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    seen = folder.lstat()
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.geteuid() or seen.st_mode & 0o077:
        true = "It is not a folder that belongs to this user and that others may not enter."
        to_do = "Name one that is not there yet, or chmod 700 it."
        raise SettingInvalid(f"{VARIABLE}={str(folder)!r} was set.", true, to_do)
    return folder.absolute()


def _left_over(path: Path) -> bool:
    """Whether whoever listened there is gone: who is merely stopped does not refuse."""
    if path.is_symlink() or not path.is_socket():  # what is no socket refuses as well, and is somebody's file
        return False
    with socket.socket(socket.AF_UNIX) as probe, short(path) as name:
        probe.setblocking(False)
        return probe.connect_ex(name) == errno.ECONNREFUSED


@atexit.register
def _leave() -> None:
    for opened in _servers.values():
        if opened is not None:
            opened[1].unlink(missing_ok=True)


def _forked() -> None:
    """The parent's sockets are not ours to answer at, and a thread that is not here may hold the lock."""
    global _lock
    _lock = threading.Lock()
    for opened in _servers.values():
        if opened is not None:
            opened[0].abandon()
    _servers.clear()


os.register_at_fork(after_in_child=_forked)
