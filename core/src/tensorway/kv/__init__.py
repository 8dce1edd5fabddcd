"""Hand over: what engines and KV connectors agree on, and how KV memory is described. No array library, no engine.

Room `kv`; may import the rooms below. How two geometries meet and the connector that is built in are the dist
`tensorway-kv`, whose mathematics needs numpy; who writes a connector of another system needs this room only.
"""

from __future__ import annotations

from tensorway.geometry import Group, Part, Plane, RankGeometry, Share
from tensorway.kv.contract import (
    Blocks,
    Capabilities,
    Event,
    KVContext,
    LayerwiseMover,
    LayerwisePlanner,
    Match,
    Mover,
    Planner,
    RequestView,
    Result,
    Retention,
    Step,
)
from tensorway.kv.vocabulary import CAUSES, METRICS
from tensorway.memory import Copier

__all__ = [
    "CAUSES",
    "METRICS",
    "Blocks",
    "Capabilities",
    "Copier",
    "Event",
    "Group",
    "KVContext",
    "LayerwiseMover",
    "LayerwisePlanner",
    "Match",
    "Mover",
    "Part",
    "Plane",
    "Planner",
    "RankGeometry",
    "RequestView",
    "Result",
    "Retention",
    "Share",
    "Step",
]
