"""`tensorway demo`: the main job on this machine with what is installed, step by step.

Of the dist nothing else imports this module; it may import the core's host, kit and command line. It discovers, probes,
selects, and moves blocks between two processes. What a movement shows is its dist's, see `tensorway.cli.demonstration`.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any, Final, TypeVar

from tensorway import hookspecs
from tensorway.cli import brought, exits
from tensorway.cli.backends import show_winner
from tensorway.cli.demonstration import HandedOver, Offloaded
from tensorway.cli.output import Output
from tensorway.errors import BackendNotFound, BackendUnavailable, PluginDefect, Unsupported
from tensorway.plugins import host, report

_BLOCK: Final = 64 << 10
_COUNT: Final = 256
_ROUNDS: Final = 20


_TEXT: Final = "Do the main job with what is installed, step by step."
_ShownT = TypeVar("_ShownT", HandedOver, Offloaded)


def command(arguments: list[str], out: Output) -> int:
    """What the entry point refers to: words after `demo` in, exit code out."""
    argparse.ArgumentParser(prog="tensorway demo", description=_TEXT).parse_args(arguments)
    return run(out)


def run(out: Output) -> int:
    """Discover, probe, select, move; print each step while it happens."""
    started = time.monotonic()
    out.progress("1/6 discover: reading the metadata of what is installed, importing nothing")
    the_host = host()
    slots = the_host.slots()
    dists = sorted({slot.declaration.dist for slot in slots})
    out.text(f"{len(slots)} backends from {len(dists)} dists: {', '.join(dists)}", indent=4)
    out.progress("2/6 probe: asking each backend whether it works here")
    for kind in hookspecs.HOOKS:
        the_host.probe_all(kind)
        for slot in the_host.slots(kind):
            result = slot.probe_result
            mark = "+" if result and result.usable else "-"
            reason = slot.record.reason if slot.record else (result.reason if result else "")
            out.text(f"{mark} {kind} {slot.declaration.name}: {reason}", indent=4, hang=2)
    out.progress("3/6 select: what `auto` chooses for each kind")
    rows = report.choices(the_host)
    for row in rows:
        show_winner(out, row)
    chosen = {row["request"]["kind"]: row["winner"]["name"] for row in rows if row["winner"]}
    moved = _move(out, chosen["transport"]) if "transport" in chosen else None
    handed_over = _hand_over(out, chosen["transport"]) if "transport" in chosen else None
    offloaded = _offload(out) if "offloading" in chosen else None
    seconds = round(time.monotonic() - started, 2)
    fields = {"backends": len(slots), "choices": rows, "chosen": chosen, "moved": moved, "handed_over": handed_over}
    out.json("tensorway.demo/1", {**fields, "offloaded": offloaded, "seconds": seconds})
    out.text(f"Done in {seconds} s. Reasons: tensorway why KIND. Remedies: tensorway doctor.")
    right = (moved is None or moved["verified"]) and (handed_over is None or handed_over["same_tokens"])
    return exits.OK if right and (offloaded is None or offloaded["same_bytes"]) else exits.BROKEN


def _move(out: Output, name: str) -> dict[str, Any]:
    """Read blocks of another process in random order, and compare every byte."""
    from tensorway.testing.peer import PeerProcess, content, digest
    from tensorway.transport import BlockTable

    nbytes = _BLOCK * _COUNT
    out.progress(f"4/6 move: {_COUNT} blocks of 64 KiB from another process, over {name}")
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


def _hand_over(out: Output, transport: str) -> dict[str, Any] | None:
    """Prefill in one engine and decode in another, if a dist is here that shows it."""
    title = f"prefill in one engine, decode in another, over {transport}"
    seen = _shown(out, "5/6 hand over", title, "handover", "kv", HandedOver, transport)
    if seen is None:
        return None
    recompute, copy = seen.seconds / seen.recomputing, seen.seconds / _memmove(seen.nbytes)
    out.text(
        f"{seen.tokens} tokens of a prompt in {seen.blocks} blocks, {seen.nbytes / (1 << 20):.2f} MiB: the tokens that "
        f"follow are {'the same' if seen.same else 'NOT THE SAME'} as without a hand-over, which took {recompute:.2f} "
        f"x the time of computing the prompt, and {copy:.0f} x that of a memmove",
        indent=4,
    )
    return {
        "connector": seen.connector,
        "transport": transport,
        "prompt_tokens": seen.tokens,
        "blocks": seen.blocks,
        "bytes": seen.nbytes,
        "same_tokens": seen.same,
        "recompute_ratio": round(recompute, 3),
        "memmove_ratio": round(copy, 1),
    }


def _offload(out: Output) -> dict[str, Any] | None:
    """Keep blocks outside an engine, if a dist is here that shows it."""
    title = "blocks of an engine in host memory and files, and back"
    seen = _shown(out, "6/6 offload", title, "offload", "cpu", Offloaded)
    if seen is None:
        return None
    store, load = (seconds / _memmove(seen.nbytes) for seconds in (seen.storing, seen.loading))
    text = f"every byte {'is right' if seen.same else 'IS NOT RIGHT'}; storing took {store:.1f} x the time of a memmove"
    out.text(
        f"{seen.blocks} blocks, {seen.nbytes / (1 << 20):.0f} MiB: {text}, and loading {load:.1f} x",
        indent=4,
    )
    return {
        "backend": seen.backend,
        "tiers": list(seen.tiers),
        "blocks": seen.blocks,
        "bytes": seen.nbytes,
        "same_bytes": seen.same,
        "store_ratio": round(store, 1),
        "load_ratio": round(load, 1),
    }


def _shown(
    out: Output, step: str, title: str, name: str, extra: str, result: type[_ShownT], *given: object
) -> _ShownT | None:
    """What a dist shows of a movement; None, and a line that says why, if nothing does or it cannot here."""
    asked = f"The step {step.partition(' ')[2]!r} was to be shown."
    try:
        row = brought.declared(host().demos, name, asked, extra=extra)
    except (BackendNotFound, BackendUnavailable) as error:
        out.progress(f"{step}: nothing here does it. {error.to_do}")
        return None
    out.progress(f"{step}: {title}")
    try:
        seen = brought.called(row, asked, out, out, *given)
    except Unsupported as error:
        out.text(f"{error.asked} {error.true}", indent=4)
        return None
    if not isinstance(seen, result):
        true = f"{row.dist} {row.version} brings it, and it returned no {result.__name__}."
        raise PluginDefect(asked, true, "Report this to the plugin's author.")
    return seen


def _memmove(nbytes: int) -> float:
    """Seconds that copying as many bytes takes within this process, measured now."""
    source, target = bytearray(nbytes), bytearray(nbytes)
    target[:] = source  # touch the pages first
    started = time.perf_counter()
    for _ in range(_ROUNDS):
        target[:] = source
    return (time.perf_counter() - started) / _ROUNDS
