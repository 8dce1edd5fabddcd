"""What every KV connector counts, by the names that dashboards know: see `tensorway.metrics`.

Room `kv`; may import the rooms below. Each value also has the labels `backend`, `engine` and, at a mover, `rank`.
"""

from __future__ import annotations

from typing import Final

from tensorway.metrics import Metric, vocabulary

#: Why a request ended that did not succeed; `Result.cause` is one of them. `handshake`: the engine or the store was not
#: reached; `failed`, `deadline`: what moves did not work, or not in time; `lost`: this life of the engine is over;
#: `expired`, `stale`, `missing`: the blocks are not there any more, or were not whole; `short`: only the beginning was;
#: `refused`: ids or a ticket that were not believed; `incompatible`: the two cannot be read into each other.
CAUSES: Final = frozenset({
    "cancelled", "deadline", "expired", "failed", "handshake", "incompatible", "lost", "missing", "refused", "short",
    "stale",
})  # fmt: skip

#: `direction` is `pull` (blocks are read), `push` (blocks are written), `save` or `load` (a store that others share);
#: `peer` is the other engine, or the store; `cause` is `none` for what succeeded.
METRICS: Final = vocabulary(
    Metric(
        "kv_requests_total",
        "counter",
        ("direction", "peer", "cause"),
        "Requests whose blocks were to come from elsewhere, at the planner.",
    ),
    Metric(
        "kv_transfers_total",
        "counter",
        ("direction", "peer", "cause"),
        "The same requests as one rank moved them, at its mover.",
    ),
    Metric("kv_bytes_total", "counter", ("direction", "peer"), "Bytes of KV blocks that have arrived, or were saved."),
    Metric("kv_pieces_total", "counter", ("direction", "peer"), "Pieces of memory that the transport was given."),
    Metric(
        "kv_phase_seconds",
        "seconds",
        ("direction", "peer", "phase"),
        "Time of one request: queued (for a step), handshake, posted (posting), done (until it is known to be whole).",
    ),
    Metric("kv_requests_waiting", "gauge", ("direction",), "Requests that are known and not yet complete."),
    Metric("kv_tickets_total", "counter", ("what",), "Tickets that were issued, and that were opened."),
    Metric("kv_tickets_refused_total", "counter", ("cause",), "Tickets that were not believed, or could not be made."),
    Metric("kv_leases", "gauge", (), "Requests whose blocks are kept now."),
    Metric("kv_leases_ended_total", "counter", ("cause",), "Leases that ended: acknowledged, expired or forced."),
    Metric("kv_leases_refused_total", "counter", (), "Requests whose blocks were to be kept and are not."),
    Metric("kv_messages_total", "counter", ("what",), "Messages to other engines: sent, again, given_up."),
    Metric("kv_messages_refused_total", "counter", ("cause",), "Messages that were not believed, or came too late."),
    Metric("kv_results_refused_total", "counter", (), "What a mover said of a request that nobody waits for."),
    Metric("kv_links", "gauge", ("state",), "Lives of other engines: known, and connected."),
    Metric("kv_staging_blocks", "gauge", ("state",), "Blocks of staging memory: free, used, and held back."),
    Metric("kv_fallbacks_total", "counter", ("peer", "cause"), "Requests that went on to another source, and why."),
    Metric("kv_blocks_refused_total", "counter", ("peer", "cause"), "Blocks of a store that were not believed."),
    Metric("kv_stored_bytes", "gauge", ("peer",), "Bytes that a store holds."),
)
