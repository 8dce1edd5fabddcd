"""Can this backend be used on this machine? Pure Python, so the host asks in its own process."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from tensorway import ProbeResult

#: Whether one user's processes may open each other's memory; where there is no such file, they may.
SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")


def probe() -> ProbeResult:
    """Read memory of this process through its file, and see whether that of others may be opened."""
    canary = ctypes.create_string_buffer(b"procmem")
    try:
        memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return ProbeResult.failed(
            f"/proc/self/mem cannot be opened: {error.strerror}", "Use Linux, with /proc mounted."
        )
    try:
        right = os.pread(memory, 7, ctypes.addressof(canary)) == b"procmem"
    except OSError as error:
        return ProbeResult.failed(f"/proc/self/mem cannot be read: {error.strerror}", "Use another transport.")
    finally:
        os.close(memory)
    scope = int(SCOPE.read_text("ascii")) if SCOPE.exists() else 0
    if not right or (scope and os.geteuid() != 0):
        remedy = "sysctl kernel.yama.ptrace_scope=0, or run with CAP_SYS_PTRACE."
        return ProbeResult.failed(f"processes may not open each other's memory (ptrace_scope {scope})", remedy)
    return ProbeResult.passed("/proc/PID/mem can be read", ptrace_scope=scope)
