"""How endpoints find and trust each other: records with leases and watches, members, hosts, environments.

Room `rendezvous`; may import the ground and `transport`. `tensorway.create("rendezvous", ...)` makes a `Rendezvous`
over a `Store`; a `Directory` is an endpoint's place in a group of members.
"""

from __future__ import annotations

from tensorway.rendezvous.contract import Changes, Event, Record, Store
from tensorway.rendezvous.directory import Directory
from tensorway.rendezvous.leases import Lease
from tensorway.rendezvous.members import Member
from tensorway.rendezvous.negotiation import Fact
from tensorway.rendezvous.rendezvous import Rendezvous, Watch

__all__ = [
    "Changes",
    "Directory",
    "Event",
    "Fact",
    "Lease",
    "Member",
    "Record",
    "Rendezvous",
    "Store",
    "Watch",
]
