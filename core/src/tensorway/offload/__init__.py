"""Offload: KV blocks by content in memory, files and object stores; the contracts of manager, worker, tier and policy.

Room `offload`; may import the rooms below. The manager that is built in is the dist `tensorway-offload`; who writes a
tier, a policy or a whole backend needs this room only.
"""

from __future__ import annotations

from tensorway.offload.base import (
    EngineSpec,
    Hint,
    LoadStoreSpec,
    LookupResult,
    OffloadContext,
    OffloadingEvent,
    OffloadingManager,
    OffloadingWorker,
    OffloadKey,
    PrefixLookup,
    PrepareLoadOutput,
    PrepareStoreOutput,
    ReqContext,
    Ticket,
    TransferResult,
    key_group,
    key_hash,
    key_tenant,
    make_offload_key,
    tenant_of_salt,
)
from tensorway.offload.policy import EvictionPolicy, PolicyContext
from tensorway.offload.tier import OUTCOMES, Lender, OfTenant, Outcome, Tier, TierCapabilities, TierContext
from tensorway.offload.vocabulary import CAUSES, METRICS

__all__ = [
    "CAUSES",
    "METRICS",
    "OUTCOMES",
    "EngineSpec",
    "EvictionPolicy",
    "Hint",
    "Lender",
    "LoadStoreSpec",
    "LookupResult",
    "OfTenant",
    "OffloadContext",
    "OffloadKey",
    "OffloadingEvent",
    "OffloadingManager",
    "OffloadingWorker",
    "Outcome",
    "PolicyContext",
    "PrefixLookup",
    "PrepareLoadOutput",
    "PrepareStoreOutput",
    "ReqContext",
    "Ticket",
    "Tier",
    "TierCapabilities",
    "TierContext",
    "TransferResult",
    "key_group",
    "key_hash",
    "key_tenant",
    "make_offload_key",
    "tenant_of_salt",
]
