"""`tensorway plugins list` and `tensorway plugins show`: what is installed, and everything about one backend.

Room `cli`. Listing imports no plugin; showing loads and probes the one that is asked for.
"""

from __future__ import annotations

from typing import Any

import tensorway
from tensorway import hookspecs
from tensorway.cli import exits
from tensorway.cli.backends import show_complaints, show_row
from tensorway.cli.output import Output
from tensorway.plugins import host, report


def list_all(out: Output, kind: str | None) -> int:
    """Every backend of every kind (or of one), from metadata alone."""
    rows = [report.slot_row(slot) for slot in host().slots(kind)]
    complaints = report.complaint_rows(host().complaints)
    out.json(
        "tensorway.plugins/1",
        {"core": tensorway.__version__, "api": hookspecs.API, "plugins": rows, "complaints": complaints},
    )
    for shown in dict.fromkeys(row["kind"] for row in rows):
        out.line(out.paint(shown, "strong"))
        for row in rows:
            if row["kind"] == shown:
                show_row(out, row)
    if not rows:
        out.text(f"Nothing that is installed offers a {kind or 'backend'}.")
    show_complaints(out, complaints)
    return exits.OK


def show(out: Output, name: str, kind: str | None) -> int:
    """Everything about the backends of one name: metadata, offer, options, probe."""
    slots = host().named(name, kind)
    for slot in slots:
        host().examine(slot)
    rows = [report.slot_details(slot, out.debug) for slot in slots]
    out.json("tensorway.plugin/1", {"plugins": rows})
    for row in rows:
        show_row(out, row)
        _show_offer(out, row)
    return exits.OK if all(not row["code"] for row in rows) else exits.UNAVAILABLE


def _show_offer(out: Output, row: dict[str, Any]) -> None:
    offer, probe = row["offer"], row["probe"]
    out.text(f"kind {row['kind']}, plugin API {row['api']}, from {row['location'] or 'this process'}", indent=15)
    if offer is not None:
        out.text(offer["summary"], indent=15)
        facts = f"devices {', '.join(offer['devices'])}; priority {offer['priority']}"
        out.text(f"{facts}; capabilities {', '.join(offer['capabilities']) or 'none declared'}", indent=15)
        if not offer["constructs"]:
            out.text("probe only: this version constructs nothing yet", indent=15)
        for option in offer["options"]:
            out.text(f"option {option['name']}: {option['type']} = {option['default']}", indent=15)
    if probe is not None:
        out.text(f"probe ({row['probe_ms']:g} ms): {probe['reason']}", indent=15)
        for fact, value in probe["facts"].items():
            out.text(f"{fact} = {'-' if value in (None, '') else value}", indent=17)
