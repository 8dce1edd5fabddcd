"""What every offloading backend counts, by the names that dashboards know: see `tensorway.metrics`.

Room `offload`; may import the rooms below. Each value also has the labels `backend` and `engine`, at a worker `rank`.
"""

from __future__ import annotations

from typing import Final

from tensorway.metrics import Metric, vocabulary

#: Why something failed or was not done. `late`: it took longer than it may; `full`: there was no room; `failed`: the
#: copy or the tier failed; `corrupt`: bytes were not what had been stored; `missing`: it was gone; `refused`: what was
#: asked cannot be; `pressure`: the tier is slower than what comes; `quota`: the tenant has what it may have there;
#: `open`: the tier's breaker is; `lost`: a worker or this life of the engine is over.
CAUSES: Final = frozenset(
    {"late", "full", "failed", "corrupt", "missing", "refused", "pressure", "quota", "open", "lost"}
)

#: `medium` is `cpu` or a tier's name; `tenant` is what keys say of it, in hexadecimal, or `none`.
METRICS: Final = vocabulary(
    Metric("offload_lookups_total", "counter", ("result",), "Blocks that were looked up, by what was found."),
    Metric("offload_blocks", "gauge", ("medium", "state"), "Blocks that are here: ready, in use, or being written."),
    Metric("offload_capacity_blocks", "gauge", ("medium",), "Blocks for which there is room."),
    Metric("offload_tenant_blocks", "gauge", ("medium", "tenant"), "Blocks of each tenant."),
    Metric("offload_stored_total", "counter", ("medium",), "Blocks that were stored."),
    Metric("offload_loaded_total", "counter", ("medium",), "Blocks that were loaded from there."),
    Metric("offload_removed_total", "counter", ("medium", "cause"), "Blocks that are gone, by why."),
    Metric("offload_failures_total", "counter", ("medium", "what", "cause"), "Blocks that were not moved, by why."),
    Metric("offload_dropped_total", "counter", ("medium", "cause"), "Blocks that were not offered to a tier, by why."),
    Metric("offload_leases_expired_total", "counter", (), "Leases that ended before anybody loaded."),
    Metric("offload_bytes_total", "counter", ("medium", "what"), "Bytes that were copied, to store or to load."),
    Metric("offload_seconds", "seconds", ("medium", "what"), "How long a call of a tier or a worker's job took."),
    Metric("offload_queue_blocks", "gauge", ("medium", "what"), "Blocks that wait for a tier."),
    Metric("offload_breaker", "gauge", ("medium",), "0: the tier is used; 1: it is tried; 2: it is left alone."),
    Metric("offload_used_bytes", "gauge", ("medium",), "Bytes that a tier has in use."),
    Metric("offload_capacity_bytes", "gauge", ("medium",), "Bytes that a tier may use."),
    Metric("offload_policy_hits_total", "counter", ("policy",), "Blocks that a policy has or would have had."),
)
