"""`tensorway doctor`: what is installed, what can be used here, why the rest cannot, and what to do about it.

Room `cli`.
"""

from __future__ import annotations

import platform
import sys
from typing import Any

import attrs

import tensorway
from tensorway import hookspecs, platforms, settings
from tensorway.cli import exits
from tensorway.cli.backends import show_complaints, show_probe, show_row
from tensorway.cli.output import Output
from tensorway.plugins import Host, report, scan


def run(out: Output, backend: str | None, seconds: float | None) -> int:
    """Examine everything, or one backend by name; returns the exit code."""
    # Strict mode raises at the first broken plugin, and a doctor is for seeing all of them.
    used = attrs.evolve(settings.from_environment(), strict=False)
    if seconds is not None:
        used = attrs.evolve(used, probe_timeout=seconds)
    out.progress("Reading the metadata of the installed dists ...")
    host = Host(scan.scan(), used)
    if backend is not None:
        return _one(out, host, backend)
    out.progress(f"Loading and probing {len(host.slots())} backends, each for at most {used.probe_timeout:g} s ...")
    host.probe_all()
    fields = {
        "environment": _environment(),
        "unknown_variables": settings.unknown_variables(),
        "plugins": [report.slot_details(slot, out.debug) for slot in host.slots()],
        "complaints": report.complaint_rows(host.complaints),
        "choices": report.choices(host),
        "broken": report.broken(host),
    }
    code = exits.BROKEN if fields["broken"] else exits.OK
    out.json("tensorway.doctor/1", {**fields, "exit_code": code})
    _show(out, fields)
    return code


def _one(out: Output, host: Host, backend: str) -> int:
    """Examine what is called `backend`, of whichever kind: `name`, `name@dist` or `kind:name`."""
    kind, _, name = backend.rpartition(":")
    out.progress(f"Loading and probing {name} ...")
    slots = host.named(name, kind or None)
    for slot in slots:
        host.examine(slot)
    rows = [report.slot_details(slot, out.debug) for slot in slots]
    code = exits.OK if all(not row["code"] for row in rows) else exits.UNAVAILABLE
    out.json("tensorway.doctor-backend/1", {"backend": backend, "plugins": rows, "exit_code": code})
    _show_plugins(out, rows)
    return code


def _environment() -> dict[str, Any]:
    import pluggy

    build = platforms.torch_build(tuple(sys.path))
    return {
        "tensorway": tensorway.__version__,
        "api": hookspecs.API,
        "python": platform.python_version(),
        "executable": sys.executable,
        "pluggy": pluggy.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": build.version if build else None,
        "local_rank": settings.local_rank(),
    }


def _show(out: Output, fields: dict[str, Any]) -> None:
    out.line()
    out.line(out.paint("environment", "strong"))
    for name, value in fields["environment"].items():
        out.text(f"{name:<12} {'not installed' if value is None else value}", indent=2)
    for name, near in fields["unknown_variables"].items():
        out.text(f"{name} is set and means nothing." + (f" Did you mean {near}?" if near else ""), indent=2)
    out.line()
    _show_plugins(out, fields["plugins"])
    show_complaints(out, fields["complaints"])
    out.line(out.paint("what auto chooses", "strong"))
    for row in fields["choices"]:  # the reasons of the others are above; `why` has them side by side
        winner = row["winner"]
        out.line(f"  {row['request']['kind']:<18} {winner['name'] if winner else out.paint('nothing', 'bad')}")
    out.line()
    if fields["broken"]:
        out.text(out.paint(f"{len(fields['broken'])} broken: {', '.join(fields['broken'])}", "bad"))
    else:
        out.line(out.paint("Nothing is broken.", "good"))


def _show_plugins(out: Output, rows: list[dict[str, Any]]) -> None:
    kind = ""
    for row in rows:
        if row["kind"] != kind:
            kind = row["kind"]
            out.line(out.paint(kind, "strong"))
        show_row(out, row)
        show_probe(out, row)
        if out.debug and row.get("detail"):
            out.line("\n".join(f"      | {line}" for line in row["detail"].splitlines()))
