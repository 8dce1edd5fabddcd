"""Signals to a child; one that is stopped is known to be.

Room `testing`; may import the standard library only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any, Final

_SECONDS: Final = 10.0


def send(process: subprocess.Popen[Any], number: int) -> None:
    """Send a child a signal; returns when it has stopped, if that is asked of one that runs."""
    if number == signal.SIGSTOP and process.poll() is None:
        stop(process)
    else:
        process.send_signal(number)


def stop(process: subprocess.Popen[Any]) -> None:
    """Stop a child, and return when it is: on a busy machine it may do something more before the signal reaches it."""
    process.send_signal(signal.SIGSTOP)
    until = time.monotonic() + _SECONDS
    while os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > until:
            raise TimeoutError(f"process {process.pid} did not stop within {_SECONDS:g} s")
        time.sleep(0.001)
