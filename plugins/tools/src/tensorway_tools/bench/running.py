"""Runs benchmarks: each in processes of its own, by a deadline, one after the other. What fails costs its own rows.

Of the package `bench` the command imports this; it may import `results` and the core.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, Final

import attrs

from tensorway.plugins.scan import Declaration, printable
from tensorway_tools.bench.results import MOST_RATIO, BenchResult, RowResult, Sample, State, row_result

_BOOT: Final = (
    "import json, sys; sys.path[:] = json.load(sys.stdin); from tensorway_tools.bench.child import main; "
    "main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])"
)
#: Of what one process says; all of its rows.
_MOST_BYTES: Final = 64 << 20
_TAIL: Final = 300
_CLOCKS: Final = ("wall", "cpu")


@attrs.define
class _Gathered:
    """Rows of one benchmark, of the processes so far."""

    rows: dict[str, tuple[dict[str, Any], list[Sample]]] = attrs.field(factory=dict)
    state: State = "measured"
    why: str = ""

    def row(self, name: str) -> RowResult:
        """One of them."""
        said, samples = self.rows[printable(name)[:300]]
        return row_result(printable(name)[:300], said["to"], said["clock"], said["nbytes"], samples)

    def results(self) -> list[RowResult]:
        """In the order in which they were first measured."""
        return [self.row(name) for name in self.rows]


def run(
    row: Declaration, summary: str, *, short: bool, processes: int, deadline: float, tell: Callable[[str], None]
) -> BenchResult:
    """One benchmark, in so many processes one after the other; `tell` hears of each row."""
    started, gathered = time.monotonic(), _Gathered()
    for process in range(processes):
        tell(f"{row.name}: process {process + 1} of {processes}")
        left = started + deadline - time.monotonic()
        try:
            for said in _answers(row, "short" if short else "full", left):
                if "row" in said:
                    _take(gathered, said["row"], process)
                else:
                    gathered.state, gathered.why = said["state"], printable(said["why"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            gathered.state, gathered.why = "failed", f"what it says cannot be meant: {printable(str(error))}"
        if gathered.state != "measured":
            break
    seconds = round(time.monotonic() - started, 3)
    if gathered.state == "measured" and not gathered.rows:
        gathered.state, gathered.why = "failed", "it has measured nothing"
    return BenchResult(
        row.name, row.dist, row.version, summary, gathered.state, gathered.why, seconds, gathered.results()
    )


def shown(row: RowResult) -> str:
    """One row for people: the ratio first."""
    speed = f", {row.nbytes / row.seconds / 1e9:.2f} GB/s" if row.nbytes and row.seconds else ""
    spread = f"{row.median:.2f} times {row.to} ({row.least:.2f} to {row.most:.2f}, {len(row.samples)} rounds)"
    return f"{row.name}: {spread}; {row.clock} {times(row.seconds)}{speed}"


def times(seconds: float) -> str:
    """Seconds with a unit that fits."""
    unit, name = next(((unit, name) for unit, name in ((1, "s"), (1e-3, "ms")) if seconds >= unit), (1e-6, "us"))
    return f"{seconds / unit:.3g} {name}"


def _take(gathered: _Gathered, said: Any, process: int) -> None:
    """A row of one process; raises ValueError for what is none."""
    name = printable(str(said["name"]))[:300]
    if said["clock"] not in _CLOCKS or not isinstance(said["nbytes"], int) or said["nbytes"] < 0:
        raise ValueError(f"the row {name} has no clock or no bytes")
    pairs = list(zip(map(float, said["ours"]), map(float, said["reference"]), strict=True))
    are_times = all(0 <= ours <= 1e6 >= theirs > 0 and ours / theirs < MOST_RATIO for ours, theirs in pairs)
    if not name or not pairs or not are_times:
        raise ValueError(f"the row {name} has no samples, or such as are no times")
    known, samples = gathered.rows.setdefault(name, ({**said, "to": printable(str(said["to"]))}, []))
    if any(sample.process == process for sample in samples) or (known["clock"], known["nbytes"]) != (
        said["clock"], said["nbytes"],
    ):  # fmt: skip
        raise ValueError(f"the row {name} is there twice, and differs")
    samples += [Sample(process, ours, theirs) for ours, theirs in pairs]


def _answers(row: Declaration, size: str, seconds: float) -> Iterator[dict[str, Any]]:
    """What one process says, line by line, and in the end how it ended; it and all it started are gone then."""
    if seconds <= 0:
        yield {"state": "failed", "why": "its time is over"}
        return
    ours, theirs = os.pipe()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, row.value, str(theirs), str(seconds), size],
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, pass_fds=(theirs,), start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and says so below
                assert process.stdin is not None
                process.stdin.write(json.dumps([str(entry) for entry in sys.path]).encode())
                process.stdin.close()
            ended = yield from _lines(ours, time.monotonic() + seconds)
            if ended == "late":
                yield {"state": "failed", "why": f"it had not ended after {seconds:.0f} s, and was killed"}
            elif ended:
                yield {"state": "failed", "why": _how(process, output)}
        finally:
            os.close(ours)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _lines(descriptor: int, until: float) -> Any:
    """Yields the objects that come; returns `late`, `dead`, or nothing if the last one said how it ended."""
    unread, size = bytearray(), 0
    while True:
        if not select.select([descriptor], [], [], max(0.0, until - time.monotonic()))[0]:
            return "late"
        chunk = os.read(descriptor, 1 << 16)
        size += len(chunk)
        if not chunk or size > _MOST_BYTES:
            return "dead"
        unread += chunk
        if b"\n" not in chunk:  # or a line that never ends would be searched from its start each time
            continue
        *lines, unread = unread.split(b"\n")
        for line in lines:
            said = json.loads(line)
            yield said
            if "state" in said:
                return ""


def _how(process: subprocess.Popen[bytes], output: IO[bytes]) -> str:
    """Why nothing more is read of a process: it has ended, or lives on and is killed."""
    try:
        return f"its process ended with {process.wait(10)}: {_tail(output)}"
    except subprocess.TimeoutExpired:
        return "it said no more, or too much, and was killed"


def _tail(output: IO[bytes]) -> str:
    """The end of what a process printed: libraries say there why they end it."""
    output.seek(max(0, output.seek(0, os.SEEK_END) - _TAIL))
    return printable(" ".join(output.read().decode("utf-8", "replace").split())) or "it printed nothing"
