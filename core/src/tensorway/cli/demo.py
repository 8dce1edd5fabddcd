"""`tensorway demo`: the main job on this machine with what is installed, step by step.

Room `cli`. Today it discovers, probes, selects, and moves blocks between two processes; a movement joins it when its
room is built.
"""

from __future__ import annotations

import random
import time
from typing import Any, Final

from tensorway import hookspecs
from tensorway.cli import exits
from tensorway.cli.backends import show_winner
from tensorway.cli.output import Output
from tensorway.plugins import host, report

_BLOCK: Final = 64 << 10
_COUNT: Final = 256
_ROUNDS: Final = 20


def run(out: Output) -> int:
    """Discover, probe, select, move; print each step while it happens."""
    started = time.monotonic()
    out.progress("1/4 discover: reading the metadata of what is installed, importing nothing")
    the_host = host()
    slots = the_host.slots()
    dists = sorted({slot.declaration.dist for slot in slots})
    out.text(f"{len(slots)} backends from {len(dists)} dists: {', '.join(dists)}", indent=4)
    out.progress("2/4 probe: asking each backend whether it works here")
    for kind in hookspecs.HOOKS:
        the_host.probe_all(kind)
        for slot in the_host.slots(kind):
            result = slot.probe_result
            mark = "+" if result and result.usable else "-"
            reason = slot.record.reason if slot.record else (result.reason if result else "")
            out.text(f"{mark} {kind} {slot.declaration.name}: {reason}", indent=4, hang=2)
    out.progress("3/4 select: what `auto` chooses for each kind")
    rows = report.choices(the_host)
    for row in rows:
        show_winner(out, row)
    chosen = {row["request"]["kind"]: row["winner"]["name"] for row in rows if row["winner"]}
    moved = _move(out, chosen["transport"]) if "transport" in chosen else None
    seconds = round(time.monotonic() - started, 2)
    fields = {"backends": len(slots), "choices": rows, "chosen": chosen, "moved": moved, "seconds": seconds}
    out.json("tensorway.demo/1", fields)
    out.text(f"Done in {seconds} s. Reasons: tensorway why KIND. Remedies: tensorway doctor.")
    return exits.OK if moved is None or moved["verified"] else exits.BROKEN


def _move(out: Output, name: str) -> dict[str, Any]:
    """Read blocks of another process in random order, and compare every byte."""
    from tensorway.testing.peer import PeerProcess, content, digest
    from tensorway.transport import BlockTable

    nbytes = _BLOCK * _COUNT
    out.progress(f"4/4 move: {_COUNT} blocks of 64 KiB from another process, over {name}")
    peer = PeerProcess(name)
    try:
        peer.register(nbytes, seed=1)
        mine = bytearray(nbytes)
        with host().create("transport", name) as transport:
            other = transport.connect(peer.describe())
            here, there = BlockTable.over(transport.register(mine).regions[0], _BLOCK), other.regions[0]
            route = transport.prepare(other, here, BlockTable.over(there, _BLOCK))
            ids = random.Random(1).sample(range(_COUNT), _COUNT)
            started = time.perf_counter()
            for _ in range(_ROUNDS):
                transport.read(route, ids, ids).wait()
            seconds = (time.perf_counter() - started) / _ROUNDS
            verified = digest(content(1, nbytes)) == digest(mine)
            ratio = seconds / _memmove(nbytes)
            text = f"every byte {'is right' if verified else 'IS NOT RIGHT'}; lane {other.lane}, {ratio:.2f} x the time"
            out.text(f"{nbytes >> 20} MiB in random order: {text} of a memmove", indent=4)
            return {
                "transport": name,
                "lane": other.lane,
                "bytes": nbytes,
                "verified": verified,
                "ratio": round(ratio, 2),
            }
    finally:
        peer.close()


def _memmove(nbytes: int) -> float:
    """Seconds that copying as many bytes takes within this process, measured now."""
    source, target = bytearray(nbytes), bytearray(nbytes)
    target[:] = source  # touch the pages first
    started = time.perf_counter()
    for _ in range(_ROUNDS):
        target[:] = source
    return (time.perf_counter() - started) / _ROUNDS
