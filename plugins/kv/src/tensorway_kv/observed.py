"""What is told of a transfer that has ended: counters, and a span of OpenTelemetry for who collects traces.

May import the core and this package's transfers. All of it is worked out when a request has ended, from times that
were taken anyway: nothing here is in the way of a transfer. OpenTelemetry is imported only if spans are asked for.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs

from tensorway.errors import BackendUnavailable
from tensorway.kv import KVContext, Result
from tensorway.metrics import Counters
from tensorway.transport import State
from tensorway_kv.asking import Moving

#: Phases in the order in which a request goes through them.
PHASES: Final = ("queued", "handshake", "posted", "done")


@attrs.frozen
class Ended:
    """A request as one rank moved it."""

    #: `pull` or `push`, and the other engine.
    direction: str
    peer: str
    result: Result
    #: Seconds that it waited for a step, which the planner has counted, and of its other phases that have ended.
    queued: float
    seconds: Mapping[str, float]
    #: Since it was submitted, until now.
    took: float
    #: Bytes that have arrived, and pieces that the transport was given here.
    nbytes: int = 0
    pieces: int = 0


def moved(transfers: Iterable[Moving]) -> tuple[int, int]:
    """Bytes of those that are done, and pieces of all."""
    nbytes = pieces = 0
    for transfer in transfers:
        pieces += transfer.pieces
        nbytes += transfer.nbytes if transfer.poll() is State.DONE else 0
    return nbytes, pieces


class Observer:
    """Counts, and tells OpenTelemetry if that is wanted."""

    def __init__(self, counts: Counters, context: KVContext, *, spans: bool) -> None:
        self._counts = counts
        self._spans = Spans(context) if spans else None

    def ended(self, one: Ended) -> None:
        """A request has ended."""
        labels = {"direction": one.direction, "peer": one.peer}
        self._counts.add("kv_transfers_total", **labels, cause=one.result.cause or "none")
        for phase, seconds in one.seconds.items():
            self._counts.took("kv_phase_seconds", seconds, **labels, phase=phase)
        if one.nbytes:
            self._counts.add("kv_bytes_total", one.nbytes, **labels)
        if one.pieces:
            self._counts.add("kv_pieces_total", one.pieces, **labels)
        if self._spans is not None:
            self._spans.ended(one)


class Spans:
    """One span for each request, with one below it for each phase that has ended."""

    def __init__(self, context: KVContext) -> None:
        try:
            self._trace: Any = importlib.import_module("opentelemetry.trace")
        except ImportError as error:
            raise BackendUnavailable(
                f"Spans of hand-overs were asked for by engine {context.engine}.",
                f"OpenTelemetry cannot be imported: {error}.",
                'pip install opentelemetry-sdk, or leave out the option "spans".',
            ) from None
        # Whose provider it is, the application says; without one, spans cost nothing and go nowhere.
        self._tracer = self._trace.get_tracer("tensorway.kv")
        self._about = {
            "tensorway.backend": "handover",
            "tensorway.engine": context.engine,
            "tensorway.rank": context.rank,
        }

    def ended(self, one: Ended) -> None:
        """Write them down with the times that they had."""
        end = time.time_ns()
        begin = end - int((one.queued + one.took) * 1e9)
        about = {
            **self._about,
            "tensorway.request": one.result.request,
            "tensorway.peer": one.peer,
            "tensorway.direction": one.direction,
            "tensorway.cause": one.result.cause or "none",
            "tensorway.bytes": one.nbytes,
        }
        root = self._trace.NonRecordingSpan(self._trace.INVALID_SPAN_CONTEXT)
        span = self._tracer.start_span(
            f"kv.{one.direction}", self._trace.set_span_in_context(root), attributes=about, start_time=begin
        )
        inside = self._trace.set_span_in_context(span)
        at = begin
        for phase in PHASES:
            seconds = {"queued": one.queued, **one.seconds}.get(phase)
            if seconds is None:
                break
            child = self._tracer.start_span(f"kv.{phase}", inside, start_time=at)
            at += int(seconds * 1e9)
            child.end(min(at, end))
        if one.result.cause:
            why = one.result.why or one.result.cause
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, why))
        span.end(end)
