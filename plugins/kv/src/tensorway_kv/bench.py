"""What a hand-over of KV blocks takes, beside the transport's own read of the same bytes.

Of the dist only an entry point refers to this module, and `tensorway bench` runs it; it may import all of the dist. Two
engines over `local`, the producer's rank in a process of its own. A hand-over is timed from `reserve` to the step that
says `received`, on an engine that is connected; the read beside it is of the same ids over the same tables, without
planning, words or steps. tests/bench/handover.py goes on from here: pieces, planning, pushes, staging memory.
"""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Iterator
from typing import Any, Final, Literal

import attrs
import numpy as np

from tensorway import memory
from tensorway.kv import KVContext, RequestView
from tensorway.memory import Region
from tensorway.testing.ranks import Rank, Ranks
from tensorway_kv.layouts import Cache, Parallel, attention, rank_geometry
from tensorway_kv.offers import construct_handover
from tensorway_kv.options import HandoverOptions
from tensorway_kv.reads import Held
from tensorway_tools.benchmark import Benchmark, Row, Run

PAGE, HEADS, WIDTH = 16, 8, 128
_BLOCK: Final = PAGE * HEADS * WIDTH * 2
OPTIONS: Final = {"transport": "local", "secret": "a secret of the benchmark", "path": "/bench/kv"}


def rows(run: Run) -> Iterator[Row]:
    """Over both lanes of `local`, in both orders of blocks."""
    with Ranks(2) as ranks:
        for shared in (False, True):
            yield from throughput(ranks, Size(16, 128) if run.short else Size(32, 512), shared, run.either(15, 5))


@attrs.frozen
class Size:
    """Of a cache."""

    layers: int
    blocks: int

    @property
    def nbytes(self) -> int:
        """Of all its blocks."""
        return self.layers * self.blocks * _BLOCK

    def geometry(self, start: int, page: int = PAGE, tp: int = 1) -> list[Any]:
        """Of all ranks, each with a plane for each layer, from an address on."""
        caches = [Cache(range(self.layers), attention(HEADS, WIDTH), page, order="HND")]
        made = []
        for rank in range(tp):
            at = iter(range(start, start + 2 * self.nbytes, self.blocks * _BLOCK * page // PAGE // tp))
            made.append(rank_geometry(caches, Parallel(tp), rank, blocks=self.blocks, base=lambda *_, at=at: next(at)))
        return made


def hold(size: Size, shared: bool) -> tuple[Any, Any]:
    """Memory of one rank, which is all there, and its geometry."""
    buffer = memory.shared(size.nbytes) if shared else bytearray(size.nbytes)
    np.frombuffer(buffer, np.uint8)[:] = 1  # what was never written to is one page of zeros for the kernel
    return buffer, size.geometry(Region.of(buffer).address)[0]


def side(
    role: Literal["planner", "mover"], engine: str, rendezvous: Any, geometry: Any, options: dict[str, Any]
) -> Any:
    """A planner, or a mover."""
    context = KVContext(engine, rendezvous, role, 1, 0, geometry, {"model": "bench"})
    return construct_handover(HandoverOptions(**{**OPTIONS, **options}), context)


def open_producer(rank: Rank, size: Size, shared: bool, options: dict[str, Any]) -> None:
    """The engine that is read from, in its process."""
    rank.notes["buffer"], geometry = hold(size, shared)
    rank.notes["sides"] = [side(role, "prefill", rank.rendezvous(), geometry, options) for role in ("planner", "mover")]


def keep(rank: Rank, request: str, ids: list[int]) -> object:
    """Fill a request's blocks, keep them, and write the words beside them; the ticket."""
    planner, mover = rank.notes["sides"]
    np.frombuffer(rank.notes["buffer"], np.uint8)[:] = hash(request) % 199 + 2
    kept = planner.finish(RequestView(request, len(ids) * PAGE, hand_over=True), [ids], len(ids) * PAGE)
    turn(planner, mover)
    return kept.ticket


def settle(rank: Rank) -> None:
    """Step until what was kept is let go of."""
    planner, mover = rank.notes["sides"]
    while planner.busy():
        turn(planner, mover)
        time.sleep(1e-4)


def close_producer(rank: Rank) -> None:
    """End it."""
    for each in reversed(rank.notes.pop("sides")):
        each.close()
    del rank.notes["buffer"]


def turn(planner: Any, mover: Any) -> Any:
    """One step of an engine of one rank."""
    step = planner.plan_step()
    mover.submit(step.plan)
    planner.on_results(0, mover.poll())
    return step


def handed_over(planner: Any, mover: Any, request: str, ticket: Any, ids: list[int], pause: float = 0.0) -> float:
    """Seconds from `reserve` to `received`; `pause` between steps, in which threads of ours get their turn."""
    tokens = len(ids) * PAGE
    view = RequestView(request, tokens, ticket)
    assert planner.lookup(view, 0).tokens == tokens
    started = time.perf_counter()
    planner.reserve(view, [ids], 0, tokens)
    while True:
        step = turn(planner, mover)
        assert not step.failed, step
        if step.received:
            return time.perf_counter() - started
        if pause:
            time.sleep(pause)


def read(mover: Any, ids: list[int]) -> float:
    """Seconds of the same bytes, by the transport alone."""
    (link,) = mover._links
    bound, held = link.bound, Held([ids])
    posts = [
        (
            bound.routes[rank][batch.route],
            *(array("q", one.astype("q").tobytes()) for one in (batch.local, batch.remote)),
        )
        for rank, batches in bound.reads.plan(held, held, 0, len(ids) * PAGE).items()
        for batch in batches
    ]
    started = time.perf_counter()
    for transfer in [mover.endpoint.read(*post) for post in posts]:
        transfer.wait()
    return time.perf_counter() - started


def throughput(ranks: Ranks, size: Size, shared: bool, pairs: int) -> Iterator[Row]:
    """Hand-overs and plain reads in turns."""
    ranks[0].call(open_producer, size, shared, {})
    rendezvous = Rank(ranks.rendezvous.address).rendezvous()
    buffer, geometry = hold(size, shared)
    planner, mover = (side(role, "decode", rendezvous, geometry, {}) for role in ("planner", "mover"))
    lane, contiguous = "shm" if shared else "cma", list(range(size.blocks))
    try:
        for order, ids in (
            ("contiguous", contiguous),
            ("in random order", random.Random(1).sample(contiguous, len(contiguous))),
        ):
            found = []
            for number in range(pairs + 1):
                request = f"{order}-{number}"
                ticket = ranks[0].call(keep, request, ids)
                took = handed_over(planner, mover, f"{request}-here", ticket, ids)
                expected = np.frombuffer(buffer, np.uint8)
                assert expected.min() == expected.max() > 1, "other bytes arrived than were sent"
                found.append((took, read(mover, ids)))
                while planner.busy():
                    turn(planner, mover)
                ranks[0].call(settle)
            ours, reference = zip(*found[1:], strict=True)  # the first connects
            name = f"local, lane {lane}: {size.layers} layers x {size.blocks} blocks, {order}"
            yield Row(name, "the transport's own read", ours, reference, nbytes=size.nbytes)
    finally:
        mover.close()
        planner.close()
        rendezvous.close()
        ranks[0].call(close_producer)


BENCH: Final = Benchmark("Hand-overs of KV blocks, beside the transport's own read of the same bytes.", rows)
