"""Signals to a child; one that is stopped is known to be.

Room `testing`; may import the standard library and `waiting`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Final

from tensorway.testing.waiting import eventually

_SECONDS: Final = 10.0


def send(process: subprocess.Popen[Any], number: int, meant: int | None = None) -> None:
    """Send a child a signal; returns when it has stopped, if that is asked of one that runs.

    `meant` is the process that the child only waits for, as `nsenter` does: it stops, goes on and ends with it.
    """
    if number == signal.SIGSTOP and process.poll() is None:
        stop(process, meant)
    elif meant is None or number == signal.SIGCONT:
        process.send_signal(number)
    elif process.poll() is None:
        with contextlib.suppress(ProcessLookupError):  # it has ended, and the child is about to
            os.kill(meant, number)
        process.send_signal(signal.SIGCONT)  # one that is stopped would not see the end of what it waits for


def stop(process: subprocess.Popen[Any], meant: int | None = None) -> None:
    """Stop a child, and return when it is: on a busy machine it may do something more before the signal reaches it."""
    if meant is None:
        process.send_signal(signal.SIGSTOP)
    else:
        os.kill(meant, signal.SIGSTOP)
    until = time.monotonic() + _SECONDS
    while os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > until:
            raise TimeoutError(f"process {process.pid} did not stop within {_SECONDS:g} s")
        time.sleep(0.001)


def children(pid: int) -> list[int]:
    """Processes that one has started, in whichever thread."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended meanwhile
            found += map(int, task.read_text().split())
    return found


def stop_whole(pid: int) -> None:
    """Stop a process that need not be a child; returns when no thread of it runs: each takes the signal in its time."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    eventually(lambda: all(") T" in (task / "stat").read_text() for task in tasks.iterdir()), _SECONDS)


def inner(process: subprocess.Popen[Any]) -> int:
    """The one process that a child has started and waits for; the child itself if it has ended."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + _SECONDS
    while process.poll() is None:
        if found := children.read_text().split():
            return int(found[0])
        if time.monotonic() > until:
            raise TimeoutError(f"process {process.pid} started nothing within {_SECONDS:g} s")
        time.sleep(0.001)
    return process.pid
