"""What a run was made on: machine, versions, choices, command and date. For JSON, and for the end of the report.

May import the core's host. Nothing here names the machine, its user or its addresses.
"""

from __future__ import annotations

import datetime
import platform
import shlex
from collections.abc import Sequence
from typing import Any

import tensorway
from tensorway.plugins import host
from tensorway_tools.machine import this_machine


def facts(rows: list[dict[str, Any]], arguments: Sequence[str]) -> dict[str, Any]:
    """The first fields of `--json`; `rows` are the decisions of `auto`."""
    the_host = host()
    brought = [slot.declaration for slot in the_host.slots()] + [*the_host.demos, *the_host.commands]
    winners = {each["request"]["kind"]: each["winner"] for each in rows if each["winner"]}
    here = this_machine()
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "date": now.isoformat(timespec="seconds"),
        "command": shlex.join(["tensorway", "demo", *arguments]),
        "tensorway": tensorway.__version__,
        "machine": {
            "system": here.system,
            "devices": winners["platform"]["reason"] if "platform" in winners else "",
            "cores": here.cores,
            "memory": here.memory_bytes,
            "python": platform.python_version(),
        },
        "dists": {row.dist: row.version for row in sorted(brought, key=lambda row: row.dist)},
        "chosen": {kind: winner["name"] for kind, winner in winners.items()},
    }
