"""What only tests of spans do in a process: collect what is told to OpenTelemetry, and say it in plain values."""

from __future__ import annotations

import sys
from unittest import mock

from tensorway.kv import KVContext
from tensorway_kv.offers import construct_handover
from tensorway_kv.options import HandoverOptions
from tensorway_kv.testing.memory import memory_of


def open_without_the_library(rank, engine, shape, options):
    """Make a mover that is to tell OpenTelemetry, where that is not installed."""
    there = [name for name in sys.modules if name.partition(".")[0] == "opentelemetry"]
    with mock.patch.dict(sys.modules):
        for name in there:
            del sys.modules[name]
        sys.modules["opentelemetry"] = None
        context = KVContext(engine, rank.rendezvous(), "mover", geometry=memory_of(shape, 0)[0])
        construct_handover(HandoverOptions(**options, spans=True), context)


def collect(rank):
    """Let spans be kept in memory."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    if "exporter" not in rank.notes:
        rank.notes["exporter"] = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(rank.notes["exporter"]))
        trace.set_tracer_provider(provider)
    rank.notes["exporter"].clear()


def told(rank):
    """Spans in the order in which they began: name, attributes, start, end, status, and the parent's name."""
    spans = sorted(rank.notes["exporter"].get_finished_spans(), key=lambda span: (span.start_time, span.end_time))
    names = {span.context.span_id: span.name for span in spans}
    return [
        {
            "name": span.name,
            "about": dict(span.attributes or {}),
            "start": span.start_time,
            "end": span.end_time,
            "status": span.status.status_code.name,
            "why": span.status.description,
            "parent": names[span.parent.span_id] if span.parent else "",
        }
        for span in spans
    ]
