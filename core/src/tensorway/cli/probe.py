"""`tensorway probe`: what a transport really does here: its lane, the time of a small read, the speed of a large one.

Room `cli`. `measure` takes an endpoint that is connected to a peer with registered memory, wherever that peer is and
however its description came; `run` brings the peer itself, a second process on this machine, and puts the transports
that work here side by side with a memmove of the same run. A figure means little alone, and so each has its ratio.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, Final

import attrs

from tensorway.cli import exits
from tensorway.cli.output import Output
from tensorway.errors import MemoryInvalid, TensorwayError
from tensorway.plugins import host
from tensorway.testing.peer import PeerProcess, content, digest
from tensorway.transport import BlockTable, Peer, Route, Transport

#: Reads of many blocks are of blocks of this size.
BLOCK: Final = 64 << 10
#: A read of this size takes the time of its way; one of the other takes the time of its bytes.
SMALL: Final = 4 << 10
LARGE: Final = 64 << 20
#: What the peer has registered is `content(SEED, LARGE)`.
SEED: Final = 1
_SMALL_READS: Final = 300
_LARGE_READS: Final = 5
#: The first reads set up connections, and touch pages.
_WARM_UP: Final = 20
#: Lanes that go through the kernel's network stack.
_SLOW_LANES: Final = ("tcp", "sockets")


@attrs.frozen
class Measurement:
    """What reads from one peer took. Seconds, bytes per second."""

    transport: str
    #: The path that bytes really took, as the fabric reports it.
    lane: str
    #: Reads of `SMALL` bytes.
    latency_median: float
    latency_p95: float
    #: The median of reads of `nbytes`.
    bandwidth: float
    nbytes: int
    #: Why this is slower than it need be; empty when nothing says so.
    slow: str


def measure(endpoint: Transport, peer: Peer, *, same_host: bool = False, deadline: float = 60.0) -> Measurement:
    """Read from the first region that the peer has registered: `LARGE` bytes of it if it has as many.

    Memory of this process is registered for it and given back. What a read fails with is raised as it is.
    """
    there = peer.regions[0] if peer.regions else None
    if there is None or there.nbytes < BLOCK:
        raise MemoryInvalid(
            f"Reads from peer {peer.name} were to be measured.",
            f"It has registered less than {BLOCK >> 10} KiB in its first region.",
            "Let it register memory before it describes itself.",
        )
    nbytes = min(LARGE, there.nbytes) // BLOCK * BLOCK
    mine = bytearray(nbytes)
    registration = endpoint.register(mine)
    try:
        here = registration.regions[0]
        small = endpoint.prepare(peer, BlockTable.over(here, SMALL), BlockTable.over(there, SMALL))
        large = endpoint.prepare(peer, BlockTable.over(here, BLOCK), BlockTable.over(there, BLOCK))
        count = nbytes // SMALL
        times = [_timed(endpoint, small, [i % count], deadline) for i in range(_WARM_UP + _SMALL_READS)][_WARM_UP:]
        blocks = range(nbytes // BLOCK)
        seconds = [_timed(endpoint, large, blocks, deadline) for _ in range(1 + _LARGE_READS)][1:]
    finally:
        registration.close()
    return Measurement(
        transport=endpoint.name,
        lane=peer.lane,
        latency_median=statistics.median(times),
        latency_p95=statistics.quantiles(times, n=20)[-1],
        bandwidth=nbytes / statistics.median(seconds),
        nbytes=nbytes,
        slow=_slow(peer.lane, same_host),
    )


def run(out: Output, name: str | None) -> int:
    """Measure one transport, or each that can be used here, with a second process on this machine."""
    the_host = host()
    names = [name] if name else usable(out)
    if name:
        decision = the_host.decide("transport", name)
        if decision.winner is None:
            raise the_host.refusal(decision)
    out.progress(f"Measuring memmove, then {', '.join(names)}: {LARGE >> 20} MiB from another process ...")
    copied = memmove()
    rows = [_row(each, copied) for each in names]
    code = exits.OK if all(not row["error"] for row in rows) else exits.UNAVAILABLE
    report(out, "", copied, rows, code)
    return code


def report(out: Output, peer: str, copied: dict[str, float], rows: list[dict[str, Any]], code: int) -> None:
    """The answer, as JSON or as a table; `peer` is empty for a second process on this machine."""
    fields = {"bytes": LARGE, "small_bytes": SMALL, "memmove": copied, "transports": rows, "exit_code": code}
    out.json("tensorway.probe/1", {"peer": peer, **fields})
    _show(out, copied, rows)


def usable(out: Output) -> list[str]:
    """The transports that can be used here and construct something, the preferred one first."""
    out.progress("Loading and probing every transport that is installed ...")
    the_host = host()
    the_host.offers("transport")
    the_host.probe_all("transport")
    slots = [slot for slot in the_host.slots("transport") if slot.record is None and slot.offer and slot.offer.factory]
    if not slots:
        raise the_host.refusal(the_host.decide("transport"))
    names = [slot.declaration.name for slot in slots]
    slots.sort(key=lambda slot: -(slot.offer.priority if slot.offer else 0))
    return [slot.declaration.name if names.count(slot.declaration.name) == 1 else slot.label for slot in slots]


def _row(name: str, copied: dict[str, float]) -> dict[str, Any]:
    """One transport against a peer of its own; that one fails does not keep the others from being measured."""
    try:
        found, verified = _measured_here(name)
    except TensorwayError as error:
        why = f"{error.asked} {error.true}"
    except Exception as error:  # whatever a peer's process or a library says
        why = f"{type(error).__name__}: {error}"
    else:
        return row_of(name, found, verified, copied)
    row: dict[str, Any] = {"name": name, "error": why, "lane": "", "slow": "", "verified": False}
    return row | dict.fromkeys(("latency_median", "latency_p95", "bandwidth", "latency_ratio", "bandwidth_ratio"))


def row_of(name: str, found: Measurement, verified: bool, copied: dict[str, float]) -> dict[str, Any]:
    """A measurement beside the memmove of the same run."""
    return {
        "name": name,
        "error": "" if verified else "the bytes that arrived are not those that were sent",
        "lane": found.lane,
        "slow": found.slow,
        "verified": verified,
        "latency_median": round(found.latency_median, 9),
        "latency_p95": round(found.latency_p95, 9),
        "bandwidth": round(found.bandwidth),
        "latency_ratio": round(found.latency_median / copied["latency_median"], 1),
        "bandwidth_ratio": round(copied["bandwidth"] / found.bandwidth, 2),
    }


def _measured_here(name: str) -> tuple[Measurement, bool]:
    """Measure with a second process, and compare what arrives with what it has."""
    peer = PeerProcess(name)
    try:
        peer.register(LARGE, seed=SEED)
        with host().create("transport", name) as transport:
            other = transport.connect(peer.describe())
            found = measure(transport, other, same_host=True)
            return found, verified(transport, other)
    finally:
        peer.close()


def verified(endpoint: Transport, peer: Peer) -> bool:
    """Whether the last block of a peer that registered `content(SEED, LARGE)` arrives as it was made."""
    mine = bytearray(BLOCK)
    here = BlockTable.over(endpoint.register(mine).regions[0], BLOCK)
    there = BlockTable.over(peer.regions[0], BLOCK)
    endpoint.read(endpoint.prepare(peer, here, there), [0], [there.count - 1]).wait()
    return digest(mine) == digest(content(SEED, LARGE)[-BLOCK:])


def _timed(endpoint: Transport, route: Route, ids: Any, deadline: float) -> float:
    started = time.perf_counter()
    endpoint.read(route, ids, ids, deadline=deadline).wait()
    return time.perf_counter() - started


def memmove() -> dict[str, float]:
    """The same sizes, copied within this process: what no transport is expected to beat."""
    source, target = bytearray(LARGE), bytearray(LARGE)
    target[:] = source  # touch the pages first
    small, large = [], []
    ours, theirs = memoryview(target), memoryview(source)
    for index in range(_WARM_UP + _SMALL_READS):
        at = index * SMALL
        started = time.perf_counter()
        ours[at : at + SMALL] = theirs[at : at + SMALL]
        small.append(time.perf_counter() - started)
    for _ in range(_LARGE_READS):
        started = time.perf_counter()
        ours[:] = theirs
        large.append(time.perf_counter() - started)
    latency, seconds = statistics.median(small[_WARM_UP:]), statistics.median(large)
    return {"latency_median": round(latency, 9), "bandwidth": round(LARGE / seconds)}


def _slow(lane: str, same_host: bool) -> str:
    """Whether the lane is one that nobody chooses where there is a better one."""
    if not lane.startswith(_SLOW_LANES):
        return ""
    if same_host:
        return f"{lane} between two processes of one machine: cross-memory attach or shared memory was not taken"
    devices = Path("/sys/class/infiniband")
    found = sorted(path.name for path in devices.iterdir()) if devices.is_dir() else []
    return f"{lane}, although this machine has RDMA devices: {', '.join(found)}" if found else ""


def _show(out: Output, memmove: dict[str, float], rows: list[dict[str, Any]]) -> None:
    """A table: everything beside the memmove of the same run."""
    out.line(f"{'':<12} {'lane':<8} {'4 KiB read: median':>18} {'p95':>9} {'64 MiB read':>12} {'x memmove':>10}")
    speed = f"{memmove['bandwidth'] / 1e9:.2f} GB/s"
    out.line(f"{'memmove':<12} {'':<8} {_micros(memmove['latency_median']):>18} {'':>9} {speed:>12} {'1':>10}")
    for row in rows:
        if row["bandwidth"] is not None:
            times = f"{_micros(row['latency_median']):>18} {_micros(row['latency_p95']):>9}"
            speed = f"{row['bandwidth'] / 1e9:.2f} GB/s"
            out.line(f"{row['name']:<12} {row['lane']:<8} {times} {speed:>12} {row['bandwidth_ratio']:>10g}")
        if row["error"]:
            out.text(f"{row['name']:<12} {out.paint('failed', 'bad')}: {row['error']}", hang=13)
        out.text(f"slow: {row['slow']}" if row["slow"] else "", indent=13, hang=6)
    out.text(
        "x memmove: how many times as long the large read takes as a memmove of as many bytes, measured here, now."
    )


def _micros(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"
