"""`tensorway rendezvous`: run the service of `direct` in the foreground; and `--status`: who is in one that runs.

Room `cli`. What the service counts is served to Prometheus at a port of its own, if one is given.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, closing
from typing import Any, Final

from tensorway import settings
from tensorway.cli import exits
from tensorway.cli.ending import told_to_end
from tensorway.cli.output import Output
from tensorway.errors import DescriptionInvalid
from tensorway.metrics import Counters, Metric, Sample, vocabulary
from tensorway.process import raise_limit_of_files
from tensorway.rendezvous import members
from tensorway.rendezvous.contract import Record
from tensorway.rendezvous.direct import DirectStore
from tensorway.rendezvous.frames import Status
from tensorway.rendezvous.hosts import HostChoice, url
from tensorway.rendezvous.offer import secret_of
from tensorway.rendezvous.rendezvous import Rendezvous
from tensorway.rendezvous.service import Service

#: How often it is looked whether the service still runs, in seconds.
_LOOK: Final = 0.5

METRICS: Final = vocabulary(
    Metric("rendezvous_records", "gauge", (), "Records that are held."),
    Metric("rendezvous_record_bytes", "gauge", (), "Bytes of their values."),
    Metric("rendezvous_leases", "gauge", (), "Leases that are held."),
    Metric("rendezvous_watches", "gauge", (), "Watches that are told of changes."),
    Metric("rendezvous_memory_bytes", "gauge", (), "What the process has in memory."),
    Metric("rendezvous_calls_total", "counter", ("call",), "Calls of clients."),
    Metric("rendezvous_changes_total", "counter", (), "Changes that were told to watches."),
    Metric("rendezvous_frames_total", "counter", (), "Frames that these were in."),
)


def serve(
    out: Output, choice: HostChoice, port: int, secret_file: str, metrics_port: int | None, seconds: float | None
) -> int:
    """Hold records until SIGTERM or SIGINT, or for so many seconds."""
    secret = _secret(secret_file)
    raise_limit_of_files()  # each client has a connection
    with ExitStack() as stack:
        ended = stack.enter_context(told_to_end())
        service = stack.enter_context(closing(Service(choice, port, secret)))
        metrics = ""
        if metrics_port is not None:
            from tensorway.metrics_server import MetricsServer

            server = stack.enter_context(MetricsServer(METRICS, choice.bind, metrics_port))
            server.add("rendezvous", lambda: samples(service.status()))
            metrics = f"http://{url(choice.advertise, server.address[1])}/metrics"
        fields = {"address": service.address, "source": choice.source, "metrics": metrics}
        out.json("tensorway.rendezvous/1", fields)
        out.line(f"Holding records at {service.address} (from {choice.source}).")
        if metrics:
            out.line(f"Metrics at {metrics}")
        until = time.monotonic() + seconds if seconds is not None else math.inf
        while not ended.wait(min(_LOOK, max(0.0, until - time.monotonic()))) and time.monotonic() < until:
            if not service.alive:
                raise RuntimeError(f"the service at {service.address} has ended by itself")
        out.line("Ending; members go on with the connections that they have.")
    return exits.OK


def status(out: Output, address: str, prefix: str, secret_file: str, deadline: float) -> int:
    """Say how the service at an address is, and who has written what below a prefix."""
    store = DirectStore(address, _secret(secret_file))
    with Rendezvous(store) as rendezvous:
        said = store.status(prefix, deadline)
        records = rendezvous.list(prefix, deadline)
    sizes = {record.key: len(record.value) for record in records}
    rows = [_row(record, said, sizes) for record in records]
    found = [row for row in rows if row is not None]
    described = [members.description_key(row["group"], row["name"]) for row in found]
    fields = {
        "address": address,
        "incarnation": said.incarnation,
        "seconds": round(said.seconds, 1),
        "memory_bytes": said.memory_bytes,
        "records": said.records,
        "record_bytes": said.record_bytes,
        "leases": said.held_leases,
        "watches": said.watches,
        "calls": said.calls,
        "changes": said.changes,
        "frames": said.changes_frames,
        "members": found,
        "others": len(rows) - len(found) - sum(key in sizes for key in described),
    }
    out.json("tensorway.rendezvous-status/1", fields)
    _show(out, fields)
    return exits.OK


def samples(said: Status) -> list[Sample]:
    """What a service says about itself, as values of `METRICS`."""
    counters = Counters(METRICS)
    counters.set("rendezvous_records", said.records)
    counters.set("rendezvous_record_bytes", said.record_bytes)
    counters.set("rendezvous_leases", said.held_leases)
    counters.set("rendezvous_watches", said.watches)
    counters.set("rendezvous_memory_bytes", said.memory_bytes)
    counters.set("rendezvous_changes_total", said.changes)
    counters.set("rendezvous_frames_total", said.changes_frames)
    for call, count in said.calls.items():
        counters.set("rendezvous_calls_total", count, call=call)
    return counters.samples()


def _secret(file: str) -> str:
    return secret_of(settings.secret_in(file, "--secret-file") if file else "")


def _row(record: Record, said: Status, sizes: dict[str, int]) -> dict[str, Any] | None:
    """One member, with what it is described with; None if the record is none."""
    try:
        member = members.decode(record.key, record.value)
    except DescriptionInvalid:
        return None
    transport = member.facts.get("transport")
    left = said.leases.get(record.lease)
    group = record.key.removesuffix(f"/{member.name}")
    return {
        "group": group,
        "name": member.name,
        "state": member.state,
        "transport": str(transport.value) if transport else "",
        "incarnation": member.incarnation,
        "lease_seconds": None if left is None else round(left, 1),
        "bytes": len(record.value) + sizes.get(members.description_key(group, member.name), 0),
    }


def _show(out: Output, fields: dict[str, Any]) -> None:
    out.line(
        f"Up {fields['seconds']:g} s with {fields['memory_bytes'] / (1 << 20):.0f} MiB: {fields['records']} records of "
        f"{fields['record_bytes']:,} bytes, {fields['leases']} leases, {fields['watches']} watches."
    )
    group = ""
    for row in fields["members"]:
        if row["group"] != group:
            group = row["group"]
            out.line(out.paint(group, "strong"))
        left = "no lease" if row["lease_seconds"] is None else f"lease {row['lease_seconds']:g} s"
        out.line(f"  {row['name']:<20} {row['state']:<9} {row['transport']:<10} {left}")
    if fields["others"]:
        out.line(f"{fields['others']} records are no members.")
