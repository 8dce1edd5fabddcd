"""What the host knows, as plain data: the one source of what `tensorway` prints and of its JSON.

Room `plugins`; may import the ground and its own room. Every function returns dicts and lists that `json` takes. The
shapes are public: `cli/schemas.json` holds one JSON Schema for each; a change that breaks a reader raises its number.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs

from tensorway.hookspecs import HOOKS
from tensorway.plugins.host import Host
from tensorway.plugins.scan import Complaint
from tensorway.plugins.select import Decision
from tensorway.plugins.slots import Slot
from tensorway.types import Offer

Row = dict[str, Any]


def slot_row(slot: Slot) -> Row:
    """One backend as the listing shows it: metadata, how far it has come, what stopped it. Loads nothing."""
    row, record = slot.declaration, slot.record
    return {
        "kind": row.kind,
        "name": row.name,
        "dist": row.dist,
        "version": row.version,
        "api": row.api,
        "location": row.location,
        "state": slot.state.value,
        "code": record.code if record else "",
        "reason": record.reason if record else "",
        "remedy": record.remedy if record else "",
    }


def slot_details(slot: Slot, debug: bool = False) -> Row:
    """One backend as `plugins show` and `doctor` show it: the row, and what its offer and its probe say."""
    offer, probe = slot.offer, slot.probe_result
    details = slot_row(slot) | {
        "load_ms": slot.load_ms,
        "probe_ms": slot.probe_ms,
        "offer": _offer_row(offer) if offer else None,
        "probe": {"usable": probe.usable, "reason": probe.reason, "facts": dict(probe.facts)} if probe else None,
    }
    if debug:
        details["detail"] = slot.record.detail if slot.record else ""
    return details


def decision_row(decision: Decision) -> Row:
    """A decision: who was asked for, who won, and why each of the others lost."""
    request, winner = decision.request, decision.winner
    return {
        "request": attrs.asdict(request) | {"needs": sorted(request.needs)},
        "winner": None
        if winner is None
        else {"name": winner.name, "dist": winner.dist, "reason": winner.probe.reason if winner.probe else ""},
        "losers": [
            {"name": loser.candidate.name, "dist": loser.candidate.dist, "reason": loser.reason, "remedy": loser.remedy}
            for loser in decision.losers
        ],
    }


def complaint_rows(complaints: Iterable[Complaint]) -> list[Row]:
    """Metadata that could not be used as it is."""
    return [attrs.asdict(complaint) for complaint in complaints]


def choices(host: Host) -> list[Row]:
    """What `auto` would choose for each kind that somebody offers. Loads and probes everything."""
    return [decision_row(host.decide(kind, probe_all=True)) for kind in HOOKS if host.slots(kind)]


def broken(host: Host) -> list[str]:
    """What is broken, as opposed to what cannot be used here: `kind:name@dist`, and conflicts of names."""
    slots = [
        f"{slot.declaration.kind}:{slot.label}"
        for slot in host.slots()
        if slot.record is not None and slot.record.defect
    ]
    return slots + [f"conflict: {complaint.reason}" for complaint in host.complaints if complaint.code == "conflict"]


def _offer_row(offer: Offer) -> Row:
    return {
        "summary": offer.summary,
        "devices": sorted(offer.devices),
        "capabilities": sorted(offer.capabilities),
        "priority": offer.priority,
        "constructs": offer.factory is not None,
        "options": [
            {"name": field.alias, "type": _type_text(field.type), "default": _default_text(field)}
            for field in attrs.fields(attrs.resolve_types(offer.options))
            if field.init
        ],
    }


def _type_text(kind: object) -> str:
    if kind is None:
        return "any"
    return (
        kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind).replace("typing.", "")
    )


def _default_text(field: attrs.Attribute[Any]) -> str:
    if field.default is attrs.NOTHING:
        return "required"
    # A factory makes a value for each instance; what it makes is what a reader wants to see.
    make = getattr(field.default, "factory", None)
    return repr(field.default) if make is None else repr(make())
