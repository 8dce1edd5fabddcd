"""`tensorway probe PEER` and `tensorway probe --serve`: the two ends of a measurement between machines.

Room `cli`. The serving end registers memory and runs a rendezvous; the other finds it there, takes the transport that
it offers, and measures. Both know the deployment's secret, because who reads memory over a fabric must. A host policy
that is given to either is that of the bytes, too, where the transport takes one.
"""

from __future__ import annotations

import time
import uuid
from contextlib import closing
from typing import Final

import attrs

from tensorway.cli import exits, probe
from tensorway.cli.output import Output
from tensorway.errors import Incompatible
from tensorway.plugins import host
from tensorway.rendezvous import Directory, Fact, Rendezvous
from tensorway.rendezvous.environment import this_host
from tensorway.rendezvous.hosts import policy_of
from tensorway.rendezvous.members import decode
from tensorway.testing.peer import content
from tensorway.transport import Transport

_GROUP: Final = "/tensorway-probe"
_SERVER: Final = "server"
#: How often the serving end looks whether somebody has measured.
_LOOK: Final = 0.2


def serve(out: Output, name: str | None, policy: str, port: int, seconds: float) -> int:
    """Let others measure reads from this machine, for so many seconds or until it is interrupted."""
    listening = policy_of(policy, "auto")
    out.progress(f"Registering {probe.LARGE >> 20} MiB, and listening by host policy {listening} ...")
    memory = content(probe.SEED, probe.LARGE)
    options = {"host": listening, "port": port}
    with host().create("rendezvous", "direct", options) as rendezvous, closing(_transport(name, policy)) as endpoint:
        endpoint.register(memory)
        with Directory(rendezvous, endpoint, _SERVER, _GROUP, {"host": Fact(this_host(), "inform")}) as directory:
            directory.live()
            try:
                _announce(out, rendezvous.address, endpoint.name, seconds)
                _watch(out, endpoint, time.monotonic() + seconds)
            except KeyboardInterrupt:
                out.progress("Interrupted; saying goodbye ...")
    return exits.OK


def run(out: Output, address: str, name: str | None, policy: str, deadline: float) -> int:
    """Measure reads from the machine that serves at this address."""
    out.progress(f"Entering the rendezvous at {address} ...")
    with host().create("rendezvous", "direct", {"address": address}) as rendezvous:
        offered, there = _offer(rendezvous, deadline)
        if name not in (None, offered, offered.partition("@")[0]):
            raise Incompatible(
                f"The peer at {address} was to be measured over {name}.",
                f"It serves transport {offered}.",
                f"Start it with --transport {name}, or leave --transport away here.",
            )
        with closing(_transport(name or offered, policy)) as endpoint:
            me = f"client-{uuid.uuid4().hex[:12]}"
            with Directory(rendezvous, endpoint, me, _GROUP, {"host": Fact(this_host(), "inform")}) as directory:
                out.progress(f"Connecting over {offered}, then measuring memmove and reads of 64 MiB ...")
                peer = directory.connect(_SERVER, deadline)
                copied = probe.memmove()
                found = probe.measure(endpoint, peer, same_host=there == this_host(), deadline=deadline)
                row = probe.row_of(offered, found, probe.verified(endpoint, peer), copied)
                endpoint.notify(peer, f"{me} measured {row['latency_median'] * 1e6:.1f} us".encode())
    code = exits.OK if row["verified"] else exits.UNAVAILABLE
    probe.report(out, address, copied, [row], code)
    return code


def _transport(name: str | None, policy: str) -> Transport:
    the_host, asked = host(), name or "auto"
    winner = the_host.decide("transport", asked).winner
    takes = winner is not None and winner.offer is not None and "host" in attrs.fields_dict(winner.offer.options)
    endpoint: Transport = the_host.create("transport", asked, {"host": policy} if policy and takes else {})
    return endpoint


def _offer(rendezvous: Rendezvous, deadline: float) -> tuple[str, str]:
    """The transport that the other end serves, and its host."""
    record = rendezvous.wait(f"{_GROUP}/{_SERVER}", deadline)
    facts = decode(record.key, record.value).facts
    return str(facts["transport"].value), str(facts["host"].value) if "host" in facts else ""


def _announce(out: Output, address: str, transport: str, seconds: float) -> None:
    out.json("tensorway.probe-serve/1", {"address": address, "transport": transport, "seconds": seconds})
    out.line(f"Serving transport {transport}. On the other machine, with the same TENSORWAY_SECRET:")
    out.line(f"  tensorway probe {address}")


def _watch(out: Output, endpoint: Transport, until: float) -> None:
    while time.monotonic() < until:
        for note in endpoint.notifications():
            out.progress(f"{note.payload.decode('ascii', 'replace')[:120]} for 4 KiB")
        time.sleep(_LOOK)
