"""Who can be looked at, and what it says now: processes by their sockets, others by a URL.

Of the package `top` only the command imports this; it may import the core. Whoever is asked may be stopped, gone, busy,
or hostile: each has a deadline and a size of its own, and costs nobody else's answer.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

import attrs

from tensorway.errors import OptionsInvalid, TensorwayError
from tensorway.exports import SUFFIX, short
from tensorway.plugins.scan import printable
from tensorway_tools.top.values import Values, read

#: `silent`: it did not answer in time; `gone`: who listened there has ended; `refused`: what it says is not believed.
State = Literal["answers", "silent", "gone", "refused"]
#: Bytes of one answer.
MOST_BYTES: Final = 8 << 20
#: Sockets of one folder that are asked.
MOST_PROCESSES: Final = 512
_NAME: Final = re.compile(r"(\d{1,10})-[0-9a-f]{8}" + re.escape(SUFFIX), re.ASCII)
_COMMAND_LENGTH: Final = 60


@attrs.frozen
class Look:
    """What was seen of one process, or at one URL."""

    #: The path of its socket, or the URL.
    source: str
    state: State
    #: Why, if it does not answer.
    why: str = ""
    #: 0 if it is not known: of another host, or of another namespace of processes.
    pid: int = 0
    command: str = ""
    #: Of the clock that `rate` divides by.
    at: float = 0.0
    values: Values = attrs.field(factory=dict, repr=False)


def sockets(folder: str, pids: Iterable[int] = ()) -> list[Path]:
    """Sockets of processes in a folder, perhaps of these only."""
    wanted = set(pids)
    try:
        with os.scandir(folder) as entries:
            found = [(match, Path(entry.path)) for entry in entries if (match := _NAME.fullmatch(entry.name))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OptionsInvalid(
            f"Processes were to be looked for in {printable(folder)}.",
            f"The system does not list it: {error.strerror}.",
            "Name the folder that TENSORWAY_METRICS names where they run, as their user.",
        ) from None
    return sorted(path for match, path in found if not wanted or int(match[1]) in wanted)[:MOST_PROCESSES]


def look(paths: Iterable[Path], urls: Iterable[str], deadline: float) -> list[Look]:
    """Ask all of them at once; returns within the deadline, whatever they do."""
    until = time.monotonic() + deadline
    asked: dict[str, Callable[[], Look]] = {str(path): partial(_process, path, until) for path in paths}
    asked |= {url: partial(_url, url, until) for url in urls}
    found: dict[str, Look] = {}

    def ask(source: str) -> None:
        found[source] = _guarded(source, asked[source])

    # Daemons: a name that is being resolved has no deadline, and must not keep the command from ending.
    threads = [threading.Thread(target=ask, args=(source,), daemon=True) for source in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until + 0.1 - time.monotonic()))
    late = f"it did not answer within {deadline:g} s"
    return [found.get(source) or Look(source, "silent", late) for source in asked]


def target(url: str) -> tuple[str, int, str]:
    """Host, port and path of a URL; raises what is wrong with it."""
    try:
        parts = urlsplit(url)
        host, port, path = parts.hostname, parts.port or 80, parts.path or "/metrics"
    except ValueError:
        host, port, path, parts = None, 0, "", urlsplit("")
    if parts.scheme != "http" or not host or not url.isascii() or not url.isprintable() or " " in url:
        raise OptionsInvalid(
            f"Metrics at {printable(url)} were to be looked at.",
            "That is not http://HOST:PORT, perhaps with a path.",
            "Write it like http://127.0.0.1:9400/metrics",
        )
    return host, port, path


def _guarded(source: str, ask: Callable[[], Look]) -> Look:
    try:
        return ask()
    except (TimeoutError, BlockingIOError):  # as many wait for it already as may
        return Look(source, "silent", "it did not answer in time")
    except ConnectionRefusedError:
        return Look(source, "gone", "nobody listens there")
    except FileNotFoundError:
        return Look(source, "gone", "it has ended")
    except TensorwayError as error:
        return Look(source, "refused", error.true)
    except (OSError, ValueError) as error:
        return Look(source, "refused", f"it cannot be read: {printable(str(error))}")


def _process(path: Path, until: float) -> Look:
    seen = path.lstat()
    if not stat.S_ISSOCK(seen.st_mode):
        return Look(str(path), "refused", "it is not a socket")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_left(until))
        with short(path) as name:
            connection.connect(name)
        # Who called `listen`, as the kernel knows it.
        pid, user, _ = struct.unpack("iii", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user not in (os.geteuid(), seen.st_uid) or (os.geteuid() and user != os.geteuid()):
            return Look(str(path), "refused", f"it is of the user {user}")
        if pid and not Path(f"/proc/{pid}").exists():
            return Look(str(path), "gone", "a child has inherited its socket")
        command = _command(pid)
        named = int(path.name.partition("-")[0])
        if pid not in (0, named):
            return Look(str(path), "refused", f"process {pid} answers for {named}", pid, command)
        try:
            values = read(_page(connection, "tensorway", "/metrics", until))
        except TimeoutError:
            return Look(str(path), "silent", _silent(pid), pid, command)
        except ConnectionError:  # it ends, or as many wait for it already as may
            return Look(str(path), "silent", "it hung up", pid, command)
        except TensorwayError as error:
            return Look(str(path), "refused", error.true, pid, command)
    return Look(str(path), "answers", "", pid, command, time.monotonic(), values)


def _url(url: str, until: float) -> Look:
    host, port, path = target(url)
    with socket.create_connection((host, port), timeout=_left(until)) as connection:
        values = read(_page(connection, host, path, until))
    return Look(url, "answers", "", 0, "", time.monotonic(), values)


def _page(connection: socket.socket, host: str, path: str, until: float) -> str:
    """The body of an answer to GET, until whoever sends it ends it."""
    connection.settimeout(_left(until))
    connection.sendall(f"GET {path} HTTP/1.0\r\nHost: {host}\r\nAccept: text/plain\r\n\r\n".encode())
    parts, size = [], 0
    while True:
        connection.settimeout(_left(until))
        part = connection.recv(1 << 18)
        size += len(part)
        if size > MOST_BYTES:
            raise ValueError(f"it sends more than {MOST_BYTES >> 20} MiB")
        if not part:
            break
        parts.append(part)
    head, _, body = b"".join(parts).partition(b"\r\n\r\n")
    status = head.split(b"\r\n", 1)[0]
    if not re.fullmatch(rb"HTTP/1\.[01] 200( [ -~]*)?", status):
        raise ValueError(f"it answers {status[:80].decode('ascii', 'backslashreplace') or 'nothing'}")
    return body.decode("utf-8", "replace")


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _command(pid: int) -> str:
    """What a process was started as, for people."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes()[:4096].decode("utf-8", "replace").split("\0")
        return printable(" ".join([Path(words[0]).name, *words[1:]]).strip())[:_COMMAND_LENGTH]
    return ""


def _silent(pid: int) -> str:
    """Why a process may not answer."""
    with contextlib.suppress(OSError, IndexError):
        state = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0]
        if state in "Tt":
            return "it is stopped"
    return "it did not answer in time"
