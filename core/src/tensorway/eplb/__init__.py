"""Rebalance: what an engine, a communicator and the movement between them agree on. No array library, no engine.

Room `eplb`; may import the rooms below. The planning and the cycle over a `Session` are the dist `tensorway-eplb`,
whose mathematics needs numpy; who writes a communicator needs this room only.
"""

from __future__ import annotations

from tensorway.eplb.checks import check_move
from tensorway.eplb.contract import (
    Capabilities,
    Control,
    Drained,
    EplbCommunicator,
    EplbContext,
    Event,
    Failed,
    Fetch,
    Filled,
    Group,
    PeerFailed,
    Reservation,
    Send,
    Served,
    Session,
)
from tensorway.eplb.layout import ExpertLayout, ExpertTensor
from tensorway.eplb.staging import Staging

__all__ = [
    "Capabilities",
    "Control",
    "Drained",
    "EplbCommunicator",
    "EplbContext",
    "Event",
    "ExpertLayout",
    "ExpertTensor",
    "Failed",
    "Fetch",
    "Filled",
    "Group",
    "PeerFailed",
    "Reservation",
    "Send",
    "Served",
    "Session",
    "Staging",
    "check_move",
]
