"""The process in which a benchmark runs: one of them, once. `running` is the other side.

Of the dist nothing else imports this module; it may import the core and `benchmark`. It writes one JSON object a line:
each row as it is measured, then how it ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import Any

import attrs

import tensorway
from tensorway.errors import TensorwayError
from tensorway.references import resolve
from tensorway.testing.peer import PeerProcess
from tensorway_tools.benchmark import Benchmark, Row, Run


def main(reference: str, answers: int, seconds: float, short: str) -> None:
    """Run the benchmark `module:attribute` and write to the descriptor `answers`; never returns."""
    # If the parent dies, nobody else ends this process and those that it starts.
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds + 5.0)
    os.set_inheritable(answers, False)
    with os.fdopen(answers, "w", encoding="ascii") as pipe:

        def tell(**said: Any) -> None:
            pipe.write(json.dumps(said) + "\n")
            pipe.flush()

        try:
            tell(**_run(resolve(reference), Run(short == "short", tensorway.create, PeerProcess), tell))
        except KeyboardInterrupt:
            raise
        except TensorwayError as error:
            tell(state="failed", why=" ".join((error.asked, error.true)))
        except BaseException as error:  # SystemExit, and whatever else a library raises
            traceback.print_exc()
            tell(state="failed", why=f"{type(error).__name__}: {error}"[:500])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _run(found: Any, run: Run, tell: Any) -> dict[str, str]:
    if not isinstance(found, Benchmark):
        return {"state": "failed", "why": f"it is of type {type(found).__name__}, not a Benchmark"}
    if missing := found.missing():
        return {"state": "cannot", "why": missing}
    row: Any
    for row in found.run(run):
        if not isinstance(row, Row):
            return {"state": "failed", "why": f"it yields {type(row).__name__}, not a Row"}
        tell(row=attrs.asdict(row))
    return {"state": "measured", "why": ""}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
