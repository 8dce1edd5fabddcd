"""What a hand-over of KV blocks costs: pieces that are posted, planning, and bytes beside the transport's own read.

    python tests/bench/handover.py [--short]

Two engines over `local`, the producer's rank in a process of its own. Pieces are counted from the plan's tables, as the
transport is given them. A hand-over is timed from `reserve` to the step that says `received`, on an engine that is
connected; the read beside it is of the same ids over the same tables, without planning, words or steps. Both read in
turns, and what is printed are medians of ratios within a turn: the machine is shared, and seconds of one turn say
little about those of another.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from array import array
from typing import Any

import attrs
import numpy as np

from tensorway import memory
from tensorway.kv import KVContext, RequestView
from tensorway.memory import Region
from tensorway.testing.ranks import Rank, Ranks
from tensorway_kv.layouts import Cache, Parallel, attention, rank_geometry
from tensorway_kv.offers import construct_handover
from tensorway_kv.options import HandoverOptions
from tensorway_kv.reads import Batch, Held, Reads
from tensorway_kv.topology import EngineTransferInfo, TransferTopology

PAGE, HEADS, WIDTH = 16, 8, 128
BLOCK = PAGE * HEADS * WIDTH * 2
OPTIONS = {"transport": "local", "secret": "a secret of the benchmark", "path": "/bench/kv"}


@attrs.frozen
class Size:
    """Of a cache."""

    layers: int
    blocks: int

    @property
    def nbytes(self) -> int:
        """Of all its blocks."""
        return self.layers * self.blocks * BLOCK

    def geometry(self, start: int, page: int = PAGE, tp: int = 1) -> list[Any]:
        """Of all ranks, each with a plane for each layer, from an address on."""
        caches = [Cache(range(self.layers), attention(HEADS, WIDTH), page, order="HND")]
        made = []
        for rank in range(tp):
            at = iter(range(start, start + 2 * self.nbytes, self.blocks * BLOCK * page // PAGE // tp))
            made.append(rank_geometry(caches, Parallel(tp), rank, blocks=self.blocks, base=lambda *_, at=at: next(at)))
        return made


# -- what is posted


def posting(size: Size, rounds: int) -> None:
    """Pieces and planning time of one request that has all blocks, between engines that differ in ever more."""
    ours = size.geometry(1 << 20)
    orders = {
        "contiguous": np.arange(size.blocks),
        "in random order": np.random.default_rng(1).permutation(size.blocks),
    }
    tokens = size.blocks * PAGE
    for what, theirs in {
        "equal engines": ours,
        "tensor-parallel size 2 to 1": size.geometry(1 << 20, tp=2),
        "blocks of 32 tokens to 16": size.geometry(1 << 20, 32),
    }.items():
        topology = TransferTopology(ours, 0)
        topology.register_remote_engine(EngineTransferInfo("prefill", "1", tuple(theirs)))
        reads = Reads(topology, "prefill")
        for order, ids in orders.items():
            mine = its = Held([ids])
            if theirs[0].groups[0].block_tokens != PAGE:
                its = Held([ids[: size.blocks // 2] if order == "contiguous" else ids[ids < size.blocks // 2]])
            plan, seconds = planned(reads, mine, its, tokens, rounds)
            count = pieces(reads, plan)
            print(
                f"{size.layers} layers x {size.blocks} blocks, {what}, {order}: {count:>9,} pieces, "
                f"{count / (size.layers * size.blocks):8.4f} of one for each block and layer; "
                f"planned in {seconds * 1e3:7.2f} ms"
            )


def planned(reads: Reads, mine: Held, its: Held, tokens: int, rounds: int) -> tuple[dict[int, list[Batch]], float]:
    """A plan, and the median of seconds that it took."""
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        plan = reads.plan(mine, its, 0, tokens)
        found.append(time.perf_counter() - started)
    return plan, statistics.median(found)


def pieces(reads: Reads, plan: dict[int, list[Batch]]) -> int:
    """What a transport is given, on the side that has more."""
    sides = [0, 0]
    for rank, batches in plan.items():
        for batch in batches:
            tables = reads.routes(rank)[batch.route]
            for side, (table, ids) in enumerate(zip(tables, (batch.local, batch.remote), strict=True)):
                sides[side] += len(table.vector(array("q", ids.astype("q").tobytes()))) // 2
    return max(sides)


# -- bytes


def hold(size: Size, shared: bool) -> tuple[Any, Any]:
    """Memory of one rank, which is all there, and its geometry."""
    buffer = memory.shared(size.nbytes) if shared else bytearray(size.nbytes)
    np.frombuffer(buffer, np.uint8)[:] = 1  # what was never written to is one page of zeros for the kernel
    return buffer, size.geometry(Region.of(buffer).address)[0]


def side(role: str, engine: str, rendezvous: Any, geometry: Any, options: dict[str, Any]) -> Any:
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


def throughput(ranks: Ranks, size: Size, shared: bool, pairs: int) -> None:
    """Hand-overs and plain reads in turns."""
    ranks[0].call(open_producer, size, shared, {})
    rendezvous = Rank(ranks.rendezvous.address).rendezvous()
    buffer, geometry = hold(size, shared)
    planner, mover = (side(role, "decode", rendezvous, geometry, {}) for role in ("planner", "mover"))
    lane = "shm" if shared else "cma"
    try:
        contiguous = list(range(size.blocks))
        for order, ids in (
            ("contiguous", contiguous),
            ("in random order", random.Random(1).sample(contiguous, len(contiguous))),
        ):
            ratios, rates = [], []
            for number in range(pairs + 1):
                request = f"{order}-{number}"
                ticket = ranks[0].call(keep, request, ids)
                took = handed_over(planner, mover, f"{request}-here", ticket, ids)
                expected = np.frombuffer(buffer, np.uint8)
                assert expected.min() == expected.max() > 1, "other bytes arrived than were sent"
                beside = read(mover, ids)
                while planner.busy():
                    turn(planner, mover)
                ranks[0].call(settle)
                if number:  # the first connects
                    ratios.append(beside / took)
                    rates.append(size.nbytes / took / 1e9)
            ratios.sort()
            print(
                f"local {lane}, {size.nbytes >> 20} MiB in {size.layers} layers x {size.blocks} blocks, {order}: "
                f"{statistics.median(ratios):.2f} of the transport's own read ({ratios[0]:.2f} to {ratios[-1]:.2f}, "
                f"{pairs} pairs), {statistics.median(rates):.1f} GB/s"
            )
    finally:
        mover.close()
        planner.close()
        rendezvous.close()
        ranks[0].call(close_producer)


def staging(ranks: Ranks, size: Size, pairs: int) -> None:
    """Hand-overs by way of staging memory on both sides, and without, in turns."""
    ways = {"direct": {"path": "/bench/direct"}, "staged": {"path": "/bench/staged"}}
    ways["staged"] |= {"stage": True, "staging_blocks": size.blocks}
    rendezvous = Rank(ranks.rendezvous.address).rendezvous()
    sides: dict[str, tuple[Any, Any, Any]] = {}
    ids = random.Random(1).sample(range(size.blocks), size.blocks)
    took: dict[str, list[float]] = {way: [] for way in ways}
    try:
        for process, (way, options) in enumerate(ways.items()):
            ranks[process].call(open_producer, size, True, options)
            buffer, geometry = hold(size, True)
            sides[way] = (
                buffer,
                *(side(role, "decode", rendezvous, geometry, options) for role in ("planner", "mover")),
            )
        for number in range(pairs + 1):
            for process, (way, (buffer, planner, mover)) in enumerate(sides.items()):
                request = f"{way}-{number}"
                ticket = ranks[process].call(keep, request, ids)
                ranks[process].call(steps, 3)  # until a staged copy is known to be whole
                took[way].append(handed_over(planner, mover, f"{request}-here", ticket, ids))
                expected = np.frombuffer(buffer, np.uint8)
                assert expected.min() == expected.max() > 1, "other bytes arrived than were sent"
                while planner.busy():
                    turn(planner, mover)
                ranks[process].call(settle)
    finally:
        for process, (_, planner, mover) in enumerate(sides.values()):
            mover.close()
            planner.close()
            ranks[process].call(close_producer)
        rendezvous.close()
    ratios = sorted([direct / staged for direct, staged in zip(*took.values(), strict=True)][1:])
    print(
        f"local shm, {size.nbytes >> 20} MiB in {size.layers} layers x {size.blocks} blocks, through staging memory: "
        f"{statistics.median(ratios):.2f} of a direct hand-over ({ratios[0]:.2f} to {ratios[-1]:.2f}, {pairs} pairs)"
    )


def pushes(ranks: Ranks, size: Size, pairs: int) -> None:
    """Hand-overs by push; beside each, the transport's own write of the same bytes, and a copy of them."""
    rendezvous = Rank(ranks.rendezvous.address).rendezvous()
    ranks[0].call(open_producer, size, True, {})
    buffer, geometry = hold(size, True)
    options = {"prefer": "push", "staging_blocks": size.blocks}
    planner, mover = (side(role, "decode", rendezvous, geometry, options) for role in ("planner", "mover"))
    here, spare, ratios = np.frombuffer(buffer, np.uint8), np.ones(size.nbytes, np.uint8), []
    try:
        ids = random.Random(1).sample(range(size.blocks), size.blocks)
        for number in range(pairs + 1):
            request = f"push-{number}"
            ticket = ranks[0].call(keep, request, ids)
            ranks[0].start(settle)  # it goes on beside us until it has pushed, and is told that it has
            took = handed_over(planner, mover, f"{request}-here", ticket, ids, 1e-4)
            assert here.min() == here.max() > 1, "other bytes arrived than were sent"
            while planner.busy():
                turn(planner, mover)
            ranks[0].result()
            beside = ranks[0].call(write, ids)
            started = time.perf_counter()
            np.copyto(spare, here)
            if number:  # the first connects
                ratios.append((beside + time.perf_counter() - started) / took)
    finally:
        mover.close()
        planner.close()
        rendezvous.close()
        ranks[0].call(close_producer)
    ratios.sort()
    print(
        f"local shm, {size.nbytes >> 20} MiB in {size.layers} layers x {size.blocks} blocks, pushed in random order: "
        f"{statistics.median(ratios):.2f} of the transport's own write and a copy ({ratios[0]:.2f} to "
        f"{ratios[-1]:.2f}, {pairs} pairs)"
    )


def write(rank: Rank, ids: list[int]) -> float:
    """Seconds in which the transport alone writes a request to staging memory."""
    (link,) = rank.notes["sides"][1]._serving.links
    held, tokens = Held([ids]), len(ids) * PAGE
    started = time.perf_counter()
    until = time.monotonic() + 60
    for transfer in link.bound.ways[0].write(held, Held([list(range(len(ids)))]), 0, tokens, until, states=True):
        transfer.wait()
    return time.perf_counter() - started


def steps(rank: Rank, count: int) -> None:
    """So many steps of the producer."""
    for _ in range(count):
        turn(*rank.notes["sides"])


def handed_over(planner: Any, mover: Any, request: str, ticket: object, ids: list[int], pause: float = 0.0) -> float:
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


def main() -> None:
    """Print all rows."""
    short = "--short" in sys.argv
    # The producer's process loads this file by its name.
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], *filter(None, [os.environ.get("PYTHONPATH")])])
    posting(Size(32, 2048), 5 if short else 25)
    with Ranks(2) as ranks:
        for shared in (False, True):
            throughput(ranks, Size(16, 128) if short else Size(32, 512), shared, 5 if short else 15)
        pushes(ranks, Size(16, 128) if short else Size(32, 256), 5 if short else 15)
        staging(ranks, Size(16, 128) if short else Size(32, 256), 5 if short else 15)


if __name__ == "__main__":
    import handover  # by a name that the producer's process finds, too

    handover.main()
