"""What the router counts, by the names that dashboards know: see `tensorway.metrics`. May import the core's ground."""

from __future__ import annotations

from typing import Final

from tensorway.metrics import Metric, vocabulary

#: What became of the wish to have a prompt prefilled elsewhere. `ticket`: a decode engine was given the ticket; `none`:
#: the prefill engine gave none, as it does for a prompt shorter than a page; `down`: no prefill engine was there;
#: `late`, `lost`, `refused`, `garbage`: it took too long, its connection broke, it answered with an error, or with what
#: cannot be read; `short`, `several`, `whole`: the request is too small, has several prompts or answers, or asks about
#: every token of its prompt, so that it was not tried.
HANDED: Final = frozenset({"ticket", "none", "down", "late", "lost", "refused", "garbage", "short", "several", "whole"})
#: Why an engine failed a request. `unreachable`: no connection; `lost`: it broke; `late`: nothing came in time;
#: `status`: it answered that it cannot; `error`: its stream began with an error; `out`: its health was bad meanwhile;
#: `garbage`: its answer cannot be read.
CAUSES: Final = frozenset({"unreachable", "lost", "late", "status", "error", "out", "garbage"})
#: Why a request was refused before any engine was asked.
REFUSED: Final = frozenset({"busy", "draining", "large", "slow", "invalid", "ticket", "unknown"})

#: `engine` is host and port of an engine, `role` is `prefill` or `decode`, `path` is that of the request.
METRICS: Final = vocabulary(
    Metric("router_requests_total", "counter", ("path", "status"), "Requests that were answered, by HTTP status."),
    Metric("router_requests_running", "gauge", (), "Requests that are being answered."),
    Metric("router_refused_total", "counter", ("cause",), "Requests that were refused before any engine was asked."),
    Metric("router_handed_over_total", "counter", ("result",), "Requests by what became of their hand-over."),
    Metric("router_seconds", "seconds", ("phase",), "Time of requests: prefill, first (word to the client), whole."),
    Metric("router_retries_total", "counter", ("cause",), "Requests that were offered to another decode engine."),
    Metric("router_broken_total", "counter", ("cause",), "Answers that ended in the middle, at the client."),
    Metric("router_gone_total", "counter", (), "Clients that went away before their answer was whole."),
    Metric("router_engine_up", "gauge", ("role", "engine"), "1: the engine is asked; 0: it is left alone."),
    Metric("router_engine_running", "gauge", ("role", "engine"), "Requests that the engine has of this router."),
    Metric(
        "router_engine_failures_total",
        "counter",
        ("role", "engine", "cause"),
        "Requests that it failed, by why.",
    ),
    Metric("router_ejections_total", "counter", ("role", "engine"), "How often an engine was found to be down."),
)
