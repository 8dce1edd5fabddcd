"""What a hand-over of KV blocks costs beside its bytes: pieces that are posted, planning, pushes, staging memory.

    python tests/bench/handover.py [--short]

What a hand-over takes beside the transport's own read is `tensorway bench run handover`; this goes on from its code.
Pieces are counted from the plan's tables, as the transport is given them. All ways take turns, and what is printed are
medians of ratios within a turn: the machine is shared, and seconds of one turn say little about those of another.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from array import array
from typing import Any

import numpy as np

from tensorway.testing.ranks import Rank, Ranks
from tensorway_kv.bench import (
    PAGE,
    Size,
    close_producer,
    handed_over,
    hold,
    keep,
    open_producer,
    settle,
    side,
    turn,
)
from tensorway_kv.reads import Batch, Held, Reads
from tensorway_kv.topology import EngineTransferInfo, TransferTopology

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
            for at, (table, ids) in enumerate(zip(tables, (batch.local, batch.remote), strict=True)):
                sides[at] += len(table.vector(array("q", ids.astype("q").tobytes()))) // 2
    return max(sides)


# -- bytes


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


def main() -> None:
    """Print all rows."""
    short = "--short" in sys.argv
    # The producer's process loads this file by its name.
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], *filter(None, [os.environ.get("PYTHONPATH")])])
    posting(Size(32, 2048), 5 if short else 25)
    with Ranks(2) as ranks:
        pushes(ranks, Size(16, 128) if short else Size(32, 256), 5 if short else 15)
        staging(ranks, Size(16, 128) if short else Size(32, 256), 5 if short else 15)


if __name__ == "__main__":
    import handover  # by a name that the producer's process finds, too

    handover.main()
