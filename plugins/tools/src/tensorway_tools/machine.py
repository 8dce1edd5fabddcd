"""What a run was made on, as far as its figures depend on it: no name of a host, of a user or of an address.

Everything of the dist may import this; it may import the core.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import msgspec

from tensorway.plugins.scan import printable


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What figures of two runs must share to be compared."""

    processor: str
    cores: int
    memory_bytes: int
    system: str


def this_machine() -> Machine:
    """The one that this process runs on."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8", "replace"))
    return Machine(
        printable(cpu[1]) if cpu else platform.machine(),
        len(os.sched_getaffinity(0)),
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        f"{platform.system()} {platform.release()} {platform.machine()}",
    )
