"""A pytest plugin that tells another process what each test does, one JSON object a line: for `tensorway check`.

Room `testing`. The other process must know which test was running when this one dies, so a line goes out before a
test begins and when it has ended. Nothing happens without `--tensorway-record=FD`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator
from typing import IO, Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that turns it on."""
    parser.addoption("--tensorway-record", type=int, default=None, help="file descriptor to write JSON lines to")


def pytest_configure(config: pytest.Config) -> None:
    """Record, if that was asked for."""
    fd = config.getoption("--tensorway-record")
    if fd is not None:
        os.set_inheritable(fd, False)  # or a peer that a test starts would keep the pipe open
        config.pluginmanager.register(_Recorder(os.fdopen(fd, "w", encoding="ascii")))


class _Recorder:
    """Writes what happens."""

    def __init__(self, pipe: IO[str]) -> None:
        self._pipe = pipe
        self._reports: list[pytest.TestReport] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._say(broken=_first_line(report), detail=report.longreprtext)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._say(collected=[item.nodeid for item in session.items])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self._reports.clear()
        text = " ".join((getattr(getattr(item, "obj", None), "__doc__", None) or "").split())
        remedy = re.search(r"\*If this fails:\*\s*(.+)", text)
        self._say(start=item.nodeid, remedy=remedy[1] if remedy else "")
        try:
            return (yield)
        finally:
            self._say(end=item.nodeid, **self._outcome())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def pytest_sessionfinish(self) -> None:
        self._say(finished=True)

    def _outcome(self) -> dict[str, object]:
        """One outcome of set-up, call and tear-down: a failure of any, else a skip of any, else passed."""
        seconds = round(sum(report.duration for report in self._reports), 3)
        for outcome in ("failed", "skipped"):
            for report in self._reports:
                if report.outcome == outcome:
                    row = {"outcome": outcome, "reason": _first_line(report), "seconds": seconds}
                    return row | {"detail": report.longreprtext if outcome == "failed" else ""}
        return {"outcome": "passed", "reason": "", "seconds": seconds, "detail": ""}

    def _say(self, **fields: object) -> None:
        self._pipe.write(json.dumps(fields) + "\n")
        self._pipe.flush()


def _first_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    """What went wrong, in one line; of a skip its reason."""
    longrepr: Any = report.longrepr
    if isinstance(longrepr, tuple):
        return str(longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(longrepr, "reprcrash", None)
    lines = str(crash.message if crash else longrepr).strip().splitlines()
    return " ".join(lines[0].split())[:400] if lines else ""
