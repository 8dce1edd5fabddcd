"""The process in which a probe may die: runs one probe, writes its result to a pipe. `probing` is the other side.

Room `plugins`; may import the ground. Started as a fresh interpreter with the parent's `sys.path`; nothing else
imports this module.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

from tensorway.references import resolve
from tensorway.types import ProbeResult

#: What a native library may write to its output before the kernel stops it.
MAX_OUTPUT_BYTES = 16 << 20


def main(reference: str, result_fd: int, seconds: float) -> None:
    """Run the probe `module:attribute` and write one JSON object to `result_fd`; never returns."""
    # If the parent dies, nobody else ends this process; the default action of SIGALRM does, whatever native code is
    # running.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + 1.0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_OUTPUT_BYTES, MAX_OUTPUT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.set_inheritable(result_fd, False)
    try:
        answer = _answer(resolve(reference)())
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit and whatever else a library raises while it is probed
        answer = {"error": type(error).__name__, "message": str(error)[:2000], "code": getattr(error, "code", None)}
    with os.fdopen(result_fd, "w", encoding="ascii") as pipe:
        pipe.write(json.dumps(answer, default=str) + "\n")
    # Not sys.exit: whatever a library does in its teardown (abort, hang) is nobody's concern any more.
    os._exit(0)


def _answer(result: object) -> dict[str, Any]:
    if not isinstance(result, ProbeResult):
        return {"error": "TypeError", "message": f"the probe returned {type(result).__name__}, not a ProbeResult"}
    return {
        "usable": bool(result.usable),
        "reason": str(result.reason),
        "remedy": str(result.remedy),
        "facts": {str(key): value for key, value in result.facts.items()},
    }


if __name__ == "__main__":
    sys.exit("this module is started by tensorway.plugins.probing")
