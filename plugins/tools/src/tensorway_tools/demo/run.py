"""Drives the demo: discover, select, and each movement in turn, with what it does said while it does it.

May import the core's host and command line, and this package. That a movement fails keeps no other one from being
shown; each has a deadline, and none outlives this process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any, Final

from tensorway import hookspecs
from tensorway.cli import brought, reports
from tensorway.cli.demonstration import MOVEMENTS, Shown, Stage
from tensorway.cli.ending import ended_in_order
from tensorway.cli.output import Output
from tensorway.cli.probe import usable
from tensorway.errors import (
    BackendNotFound,
    BackendUnavailable,
    PluginDefect,
    TensorwayError,
    Unsupported,
)
from tensorway.plugins import host, report
from tensorway_tools.demo.facts import facts
from tensorway_tools.demo.seen import NAMES, Seen, code_of, row

_ALL: Final = "all"
_STEPS: Final = 2 + len(MOVEMENTS)
_WORDS: Final = {"right": "right", "wrong": "WRONG"}


def run(given: argparse.Namespace, arguments: Sequence[str], out: Output) -> int:
    """Show it all, and write the report; returns the exit code."""
    started = time.monotonic()
    reports.writable(given.report, "--report")
    with ended_in_order():
        rows = _selected(out)
        transports = _transports(given.backend, rows, out)
        seen = [
            _shown(out, f"{number}/{_STEPS}", name, over, given)
            for number, name in enumerate(MOVEMENTS, 3)
            for over in (transports if MOVEMENTS[name][1] else [""])
        ]
    fields = {
        **facts(rows, arguments),
        "movements": [row(each) for each in seen],
        "seconds": round(time.monotonic() - started, 1),
        "exit_code": code_of(seen),
    }
    report_file = _reported(given, fields, seen)
    out.json("tensorway.demo/1", {**fields, "report": report_file})
    _table(out, seen)
    if report_file:
        out.line(f"report: {report_file}")
    out.text(f"Done in {fields['seconds']} s. Reasons: tensorway why KIND. Remedies: tensorway doctor.")
    return int(fields["exit_code"])


def _selected(out: Output) -> list[dict[str, Any]]:
    """Discover and select; the decisions of `auto`, which probes as little as it needs."""
    the_host = host()
    slots = the_host.slots()
    dists = sorted({slot.declaration.dist for slot in slots})
    out.progress(f"1/{_STEPS} discover: {len(slots)} backends from {len(dists)} dists, by their metadata alone")
    out.progress(f"2/{_STEPS} select: what `auto` takes, and what it does not")
    rows = []
    for kind in (kind for kind in hookspecs.HOOKS if the_host.slots(kind)):
        rows.append(report.decision_row(the_host.decide(kind)))
        winner, losers = rows[-1]["winner"], [loser["name"] for loser in rows[-1]["losers"]]
        name = winner["name"] if winner else "nothing"
        out.text(f"{kind}: {name}{', not ' + ', '.join(losers) if losers else ''}", indent=4, hang=4)
    return rows


def _transports(asked: str, rows: list[dict[str, Any]], out: Output) -> list[str]:
    """What is moved over, in this order; one that is empty if nothing can be used."""
    if asked == _ALL:
        return usable(out)
    if asked == "auto":
        kinds = {each["request"]["kind"]: each["winner"] for each in rows}
        return [kinds["transport"]["name"] if kinds.get("transport") else ""]
    host().named(asked, "transport")  # a name that nobody offers is an error of its own
    decision = host().decide("transport", asked)
    if decision.winner is None:
        raise host().refusal(decision)
    return [asked]


def _shown(out: Output, step: str, name: str, over: str, given: argparse.Namespace) -> Seen:
    """One movement over one transport, or why it was not shown."""
    title, _, extra = MOVEMENTS[name]
    head = f"{step} {NAMES[name]}"
    stage = Stage(out, title, over, time.monotonic() + given.deadline, given.quick)
    dist = ""
    excused: tuple[type[TensorwayError], ...] = (BackendNotFound, BackendUnavailable)
    try:
        part = brought.declared(host().demos, name, stage.asked, extra=extra)
        if MOVEMENTS[name][1] and not over:
            raise BackendUnavailable(stage.asked, "No transport can be used here.", "Ask tensorway why transport.")
        dist, excused = f"{part.dist} {part.version}", (Unsupported,)
        out.progress(f"{head}: {'over ' + over + ', ' if over else ''}as {dist} shows it")
        shown = brought.called(part, stage.asked, out, stage)
        if not isinstance(shown, Shown):
            true = f"{dist} brings it, and it returned no Shown."
            raise PluginDefect(stage.asked, true, "Report this to the plugin's author.")
    except TensorwayError as error:
        out.live()
        if not dist:
            out.progress(f"{head}: nothing here shows it. {error.to_do}")
        else:
            out.text(f"{type(error).__name__}: {error.asked}", indent=4, hang=2)
            for line in (error.true, error.to_do):
                out.text(line, indent=6)
        return Seen(name, over, dist, error=error, excused=isinstance(error, excused))
    finally:
        out.live()
    out.text(shown.text, indent=4)
    return Seen(name, over, dist, shown)


def _table(out: Output, seen: Sequence[Seen]) -> None:
    """One line for each movement."""
    wide = max(len("over"), *(len(each.shown.over if each.shown else each.transport) for each in seen))
    out.line()
    out.line(out.paint(f"{'':<9}  {'over':<{wide}}  processes      moved  bytes", "strong"))
    for each in seen:
        line = f"{NAMES[each.movement]:<9}  {each.shown.over if each.shown else each.transport:<{wide}}"
        if (shown := each.shown) is None:
            out.line(f"{line}  {out.paint(each.state, 'bad')}")
            continue
        word = out.paint(f"{_WORDS[each.state]}", "good" if shown.right else "bad")
        moved = f"{shown.nbytes / (1 << 20):.1f} MiB"
        out.line(f"{line}  {shown.processes:>9}  {moved:>9}  {word}  {' '.join(shown.headline)}")
    out.line()


def _reported(given: argparse.Namespace, fields: dict[str, Any], seen: Sequence[Seen]) -> str:
    """Write the report, if there is anything to be seen; its file."""
    if not any(each.shown or not each.excused for each in seen):
        return ""
    from tensorway_tools.demo.report import page_of

    reports.write(given.report, page_of(fields, seen).encode(), "--report")
    return str(given.report)
