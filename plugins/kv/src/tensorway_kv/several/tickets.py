"""The ticket of `several`: the tickets of its children, by their names.

May import the core's errors. It is not sealed: what a child's ticket says, the child checks. A client may have written
it, so it is bounded, and whatever is not as it should be is a miss. Who routes requests may put tickets of several
engines that have the same blocks into one list: they are tried one after the other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from tensorway.errors import TicketInvalid
from tensorway_kv.several.options import MOST_CHILDREN

KEY: Final = "tensorway_several"
VERSION: Final = 1
#: Tickets for one child.
MOST: Final = 16

Ticket = Mapping[str, Any]


def merged(parts: Mapping[str, Ticket]) -> Ticket | None:
    """One ticket of those of the children; None if there are none."""
    return {KEY: VERSION, "children": dict(parts)} if parts else None


def split(ticket: object, names: Collection[str]) -> dict[str, tuple[Ticket, ...]]:
    """The tickets of the children that are here; raises `TicketInvalid`."""
    if not isinstance(ticket, Mapping) or KEY not in ticket:
        raise _invalid("foreign", "It is not of several connectors.")
    if (version := ticket[KEY]) != VERSION or type(version) is not int:
        raise _invalid("foreign", f"It is of another version than {VERSION}.")
    parts = ticket.get("children")
    if not isinstance(parts, Mapping) or len(parts) > MOST_CHILDREN:
        raise _invalid("malformed", f"Its children are no mapping of at most {MOST_CHILDREN}.")
    return {name: _several(name, parts[name]) for name in names if name in parts}


def _several(name: str, part: object) -> tuple[Ticket, ...]:
    found = part if isinstance(part, list | tuple) else [part]
    if len(found) > MOST or not all(isinstance(one, Mapping) for one in found):
        raise _invalid("malformed", f"What it has for child {name} is neither a ticket nor a list of at most {MOST}.")
    return tuple(found)


def _invalid(cause: str, true: str) -> TicketInvalid:
    asked = "A ticket for several connectors came with a request."
    return TicketInvalid(asked, true, "Let routers pass tickets on unchanged, or join them by child.", cause)
