"""`tensorway check NAME`: the conformance kit against a backend that is installed, without a test to write.

Room `cli`. pytest runs the kit's suites in a child process, because a native library may abort or hang the process
that uses it; a test that does so has failed, and the others still run. What came of it goes into a file that others
can read: `conformance.json`.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

import tensorway
from tensorway.cli import badge, exits, reports
from tensorway.cli.ending import ended_in_order
from tensorway.cli.output import Output
from tensorway.errors import BackendConflict, BackendUnavailable, PluginDefect, TensorwayError
from tensorway.plugins import host
from tensorway.plugins.slots import Slot

#: Kind -> the suites of what its backends construct. Every offer of every kind has `OfferSuite`.
_SUITES: Final = {
    "eplb_communicator": ["SessionSuite"],
    "eviction_policy": ["EvictionPolicySuite"],
    "kv_connector": ["ConnectorSuite"],
    "offload_tier": ["TierSuite"],
    "offloading": ["OffloadingManagerSuite", "OffloadingWorkerSuite"],
    "placement_policy": ["PlacementPolicySuite"],
    "rendezvous": ["RendezvousSuite"],
    "transport": ["TransportSuite"],
}
#: Where a suite is that is not the kit's: with the movement that alone knows the kind, and that its backends need.
_ELSEWHERE: Final = {"PlacementPolicySuite": "tensorway_eplb.testing.policies"}
_MARKS: Final = {"passed": ("+", "good"), "failed": ("-", "bad"), "skipped": ("o", "strong")}
_FILE: Final = "test_conformance.py"
_SUITE_TEXT: Final = """\
import json
import pytest
from {module} import {suite}


def _options(folder):
    return json.loads({options!r}.replace("{{folder}}", json.dumps(str(folder))[1:-1]))


class Test{suite}({suite}):
    kind, name, dist = {kind!r}, {name!r}, {dist!r}
"""
#: How each suite asks for the options of its backend.
_OPTIONS_TEXT: Final = """\
    options = _options("{folder}")

    @classmethod
    def options_in(cls, folder):
        return _options(folder)
"""
_ENTRANCE_TEXT: Final = """\
    @pytest.fixture
    def options(self, tmp_path):
        return _options(tmp_path)
"""


@attrs.frozen
class Asked:
    """What a person asks for."""

    name: str
    kind: str | None
    #: Where the report goes, and badges of it.
    report: Path
    badges: Sequence[Path] = ()
    #: Seconds that one test may take.
    seconds: float = 120.0
    #: What the backend is made with; `{folder}` in a text is a new folder of each test.
    options: Mapping[str, object] = attrs.field(factory=dict)


@attrs.define
class _Run:
    """What is known of the tests so far."""

    #: Every test, by pytest's id, in the order in which it runs.
    rows: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    collected: int = 0
    #: The test that runs right now, and what to do if it fails.
    current: str = ""
    remedy: str = ""
    #: The suite whose tests are being shown.
    shown: str = ""

    def end(self, test: str, outcome: str, reason: str, seconds: float, detail: str = "") -> dict[str, Any]:
        """One test is over."""
        row = {"id": _short(test), "outcome": outcome, "seconds": seconds, "reason": reason}
        self.rows[test] = row | {"remedy": self.remedy if outcome == "failed" else "", "detail": detail}
        self.current = self.remedy = ""
        return self.rows[test]


@ended_in_order()
def run(out: Output, asked: Asked) -> int:
    """Check one backend, write the file, say what failed; returns the exit code."""
    slot = _slot(asked.name, asked.kind)
    _check_places(slot, (asked.report, *asked.badges))
    _check_badges(slot, asked.badges)
    suites, left_out = _plan(slot, asked.options)
    _examine(slot)
    row = slot.declaration
    out.progress(f"Checking {row.kind} {row.name} from {row.dist} {row.version} ...")
    started = time.monotonic()
    done = _run_suites(out, slot, suites, asked)
    tests = list(done.rows.values())
    totals = {outcome: sum(test["outcome"] == outcome for test in tests) for outcome in _MARKS}
    # A skip is not a pass: where nothing passed, nothing was proven.
    code = exits.OK if totals["passed"] and not totals["failed"] else exits.BROKEN
    if not out.debug:
        tests = [{key: value for key, value in test.items() if key != "detail"} for test in tests]
    fields = _facts(slot) | {
        "options": sorted(asked.options),  # their names: a value may be a secret
        "suites": suites,
        "left_out": left_out,
        "tests": tests,
        "totals": {**totals, "seconds": round(time.monotonic() - started, 1)},
        "exit_code": code,
    }
    report = json.dumps({"schema": "tensorway.conformance/1", **fields}, indent=2) + "\n"
    reports.write(asked.report, report.encode(), "--output")
    for path in asked.badges:
        reports.write(path, badge.badge(fields, path.suffix).encode(), "--badge")
    out.json("tensorway.conformance/1", fields)
    _show(out, fields, asked.report)
    return code


def _slot(name: str, kind: str | None) -> Slot:
    """The one backend that is meant."""
    slots = host().named(name, kind)
    if len(slots) > 1:
        labels = ", ".join(f"{slot.declaration.kind} {slot.label}" for slot in slots)
        raise BackendConflict(
            f"The conformance of {name!r} was to be checked.",
            f"{len(slots)} installed backends are called that: {labels}.",
            "Say which: --hook KIND, or NAME@DIST.",
        )
    return slots[0]


def _asked(slot: Slot) -> str:
    return f"The conformance of {slot.declaration.kind} {slot.label} was to be checked."


def _check_places(slot: Slot, paths: Sequence[Path]) -> None:
    """Before minutes of tests, not after them."""
    for path, option in zip(paths, ("--output", *["--badge"] * len(paths)), strict=False):
        reports.writable(path, option)
    if len({path.resolve() for path in paths}) < len(paths):
        true = f"Two of these are the same file: {', '.join(map(str, paths))}."
        raise TensorwayError(_asked(slot), true, "Give each a file of its own: --output FILE, --badge FILE.")


def _check_badges(slot: Slot, badges: Sequence[Path]) -> None:
    for path in badges:
        if path.suffix not in badge.KINDS:
            true = f"A badge is a picture (.svg) or an endpoint for shields.io (.json), and {path.name} is neither."
            raise TensorwayError(_asked(slot), true, "Give the file one of these endings: --badge badge.svg.")


def _plan(slot: Slot, options: Mapping[str, object]) -> tuple[list[str], list[dict[str, str]]]:
    """Which suites run, and why not the others. Loads the plugin."""
    if importlib.util.find_spec("pytest") is None:
        true = "The suites of the kit run on pytest, and pytest is not installed."
        raise BackendUnavailable(_asked(slot), true, 'pip install "tensorway[testing]"')
    slot.load(host().context, host().settings.probe_timeout)
    suites = _SUITES.get(slot.declaration.kind)
    if suites is None:
        return ["OfferSuite"], [{"suite": "", "reason": f"the kit has no suite for a {slot.declaration.kind} yet"}]
    reason = ""
    if slot.offer is not None and slot.offer.factory is None:
        reason = "this version of the backend constructs nothing"
    elif slot.declaration.kind == "rendezvous" and not options:
        reason = "the suite needs to know where its store is: --options"
    elif missing := [suite for suite in suites if not _there(suite)]:
        reason = f"{_home(missing[0])} is not installed here, and has {missing[0]}"
    if reason:
        return ["OfferSuite"], [{"suite": suite, "reason": reason} for suite in suites]
    return ["OfferSuite", *suites], []


def _home(suite: str) -> str:
    return _ELSEWHERE.get(suite, "tensorway.testing")


def _there(suite: str) -> bool:
    """Whether its module is here: a movement's dist may be older than this core."""
    try:
        return importlib.util.find_spec(_home(suite)) is not None
    except ModuleNotFoundError:
        return False


def _examine(slot: Slot) -> None:
    """Refuse what is broken or cannot be used here, with its reason and remedy."""
    host().examine(slot)
    if (record := slot.record) is not None:
        kind, what = (PluginDefect, "is broken") if record.defect else (BackendUnavailable, "cannot be used here")
        raise kind(_asked(slot), f"It {what}: {record.reason}.", record.remedy)


def _facts(slot: Slot) -> dict[str, Any]:
    """What was checked, and on what."""
    row, offer, probe = slot.declaration, slot.offer, slot.probe_result
    assert offer is not None and probe is not None, "it was examined"
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "tensorway": tensorway.__version__,
        "date": now.isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "api": row.api,
        "kind": row.kind,
        "name": row.name,
        "dist": row.dist,
        "version": row.version,
        "probe": {"usable": probe.usable, "reason": probe.reason, "facts": dict(probe.facts)},
        "devices": sorted(offer.devices),
        "capabilities": sorted(offer.capabilities),
    }


# -- running


def _run_suites(out: Output, slot: Slot, suites: list[str], asked: Asked) -> _Run:
    """Run every test; when one takes the process with it, go on in another without that test."""
    run = _Run()
    with tempfile.TemporaryDirectory(prefix="tensorway-check-") as folder:
        texts = [_text(slot, suite, asked.options) for suite in suites]
        Path(folder, _FILE).write_text("\n\n".join(texts), "utf-8")
        Path(folder, "pytest.ini").write_text("[pytest]\n", "utf-8")
        while True:
            with contextlib.closing(_events(Path(folder), list(run.rows), asked.seconds)) as events:
                if any(_take(out, run, event) for event in events):
                    return run


def _text(slot: Slot, suite: str, options: Mapping[str, object]) -> str:
    """The file of one suite. A backend is made by its name alone, here and in the processes that the suite starts."""
    row = slot.declaration
    text = _SUITE_TEXT.format(
        module=_home(suite), suite=suite, options=json.dumps(dict(options)),
        kind=row.kind, name=row.name if suite == "OfferSuite" else row.label, dist=row.dist,
    )  # fmt: skip
    if suite == "OfferSuite" or not options:
        return text
    return text + (_ENTRANCE_TEXT if suite == "RendezvousSuite" else _OPTIONS_TEXT)


def _take(out: Output, run: _Run, event: dict[str, Any]) -> bool:
    """Keep what one line of the recorder says, or how its process ended; whether nothing is left to run."""
    if "collected" in event:
        run.collected = run.collected or len(event["collected"])
    elif "start" in event:
        run.current, run.remedy = event["start"], event["remedy"]
    elif "end" in event:
        row = run.end(event["end"], *(event[key] for key in ("outcome", "reason", "seconds", "detail")))
        _show_test(out, row, run)
    elif "broken" in event:
        _show_test(out, run.end("::pytest::collection", "failed", event["broken"], 0.0, event["detail"]), run)
    elif "ended" in event:  # the process is gone, and did not say goodbye
        known, test = bool(run.current), run.current or "::pytest::session"
        row = run.end(test, "failed", event["ended"], event["seconds"], event["output"])
        _show_test(out, row, run)
        return not known  # nothing of a test's: it would end the same way again
    return "finished" in event


def _events(folder: Path, without: list[str], seconds: float) -> Generator[dict[str, Any], None, None]:
    """One child with pytest in it: what it records, and at last how it ended."""
    read_fd, write_fd = os.pipe()
    command = [sys.executable, "-m", "pytest", "-c", str(folder / "pytest.ini"), "--rootdir", str(folder)]
    command += ["-p", "no:cacheprovider", "-p", "tensorway.testing.recorder", f"--tensorway-record={write_fd}"]
    command += [f"--deselect={test}" for test in without] + [str(folder / _FILE)]
    with os.fdopen(read_fd, "rb", buffering=0) as pipe, tempfile.TemporaryFile() as output:
        try:
            # In a session of its own, so that what a test left running goes with it.
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(write_fd,),
                start_new_session=True,
            )
        finally:
            os.close(write_fd)
        began, late = time.monotonic(), False
        try:
            for line in _lines(pipe.fileno(), seconds):
                if line is None:
                    late = True
                    break
                began = time.monotonic()
                yield json.loads(line)
        finally:
            # What has ended keeps its status; what a library still does in its teardown is nobody's concern.
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left of it
                os.killpg(child.pid, signal.SIGKILL)
            status = child.wait()
        took = round(time.monotonic() - began, 3)
        output.seek(0)
        printed = output.read().decode("utf-8", "backslashreplace")[-4000:]
        yield {"ended": f"no end after {seconds:g} s" if late else _how(status), "seconds": took, "output": printed}


def _lines(fd: int, seconds: float) -> Iterator[bytes | None]:
    """Lines as they come; None, once, when none has come for so long."""
    poller, data = select.poll(), b""
    poller.register(fd, select.POLLIN)
    while poller.poll(seconds * 1000):
        chunk = os.read(fd, 65_536)
        if not chunk:
            return
        *lines, data = (data + chunk).split(b"\n")
        yield from lines
    yield None


def _how(status: int) -> str:
    if status >= 0:
        return f"its process ended with exit status {status}"
    try:
        return f"its process was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"its process was killed by signal {-status}"


# -- showing


def _short(test: str) -> str:
    """`TransportSuite::test_x[y]`: without the file and class that only this command sees."""
    return test.partition("::")[2].removeprefix("Test")


def _show_test(out: Output, row: dict[str, Any], run: _Run) -> None:
    """One line; a test's name is a sentence without its spaces."""
    suite, _, name = row["id"].partition("::")
    if suite != run.shown:
        run.shown = suite
        out.progress(f"{suite}, {run.collected} tests in all" if len(run.rows) == 1 else suite)
    mark, style = _MARKS[row["outcome"]]
    out.progress(f"  {out.paint(mark, style)} {name.removeprefix('test_').replace('_', ' ')}")


def _show(out: Output, fields: dict[str, Any], path: Path) -> None:
    """What did not pass, whole; then the sum."""
    for test in fields["tests"]:
        if test["outcome"] != "passed":
            out.line()
            out.line(f"{out.paint(test['outcome'], _MARKS[test['outcome']][1])}: {test['id']}")
            out.text(test["reason"], indent=4)
            out.text(f"-> {test['remedy']}" if test["remedy"] else "", indent=4, hang=3)
            for line in test.get("detail", "").splitlines():
                out.line(f"    | {line}")
    out.line()
    for row in fields["left_out"]:
        out.text(f"Only the offer was checked: {row['reason']}.")
    totals = fields["totals"]
    skipped = f", {totals['skipped']} skipped (a skip is not a pass)" if totals["skipped"] else ""
    text = f"{totals['passed']} passed, {totals['failed']} failed{skipped} in {totals['seconds']:g} s."
    out.text(out.paint(text, "bad" if fields["exit_code"] else "good"))
    out.text(f"Report: {path}")
