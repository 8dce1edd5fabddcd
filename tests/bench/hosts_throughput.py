"""Bytes between two hosts: tensorway over NIXL and its hand-over beside the NIXL agent itself, in the same minute.

    python tests/bench/hosts_throughput.py [--short] [--kib=64] [--json]

Two hosts of a lab on this machine (docs/netlab.md), UCX over TCP between them. All ways move the same number of
equally long blocks, in random order on both sides. Each kind of way takes turns with the agent, one of each in a
round, and what is printed are medians of ratios within a round, because the machine is shared. The agent is driven by
the shortest loop there is: lists prepared, one request, polling; no check of anything, and no deadline. A hand-over is
timed from `reserve` to the step that says `received`, between engines that are connected, and every byte of it is
compared.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import json
import os
import random
import socket
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import attrs

from tensorway.testing.netlab import Lab, LabHost, missing
from tensorway.testing.ranks import SECRET, Place, Rank, RankProcess

KIB, MIB = 1 << 10, 1 << 20
PAGE, LAYERS = 16, 16
POLICY = "cidr:10.77.0.0/16"
NIXL: dict[str, Any] = {"ucx_tls": ("tcp",), "host": POLICY}
STREAM_PORT = 7979
#: Seconds between two steps of an engine that has nothing to compute, as the one that decodes here always.
IDLE = 1e-3
#: Those of the engine that prefills: one that idles, and one that computes.
STEPS = {"hand-over": IDLE, "hand-over, steps of 50 ms": 0.05}


@attrs.frozen
class Size:
    """Blocks of one length."""

    block: int
    count: int

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return self.block * self.count


# -- in the processes: the agent alone


def open_agent(rank: Rank, size: Size) -> tuple[bytes, int]:
    """An agent with memory; its metadata, and where the memory is."""
    import numpy

    from tensorway.memory import Region
    from tensorway_nixl import agent
    from tensorway_nixl.library import LIBRARY, keep_quiet
    from tensorway_nixl.options import NixlOptions

    keep_quiet()
    made = agent.create("nixl", LIBRARY.result(), f"alone-{os.urandom(8).hex()}", NixlOptions(**NIXL))  # type: ignore[arg-type]
    memory = numpy.full(size.nbytes, 1, numpy.uint8)
    made.register(region := Region.of(memory))
    rank.notes["agent"] = made, region
    return made.native.getLocalMD(), region.address


def connect_agent(rank: Rank, size: Size, metadata: bytes, address: int) -> None:
    """Prepare a list of blocks on both sides."""
    from tensorway.memory import Region
    from tensorway.transport import BlockTable
    from tensorway_nixl import tables

    made, region = rank.notes["agent"]
    native, bindings = made.native, made.bindings
    peer = native.loadRemoteMD(metadata)
    sides = (
        (bindings.NIXL_INIT_AGENT, region),
        (peer if isinstance(peer, str) else peer.decode(), Region(address, size.nbytes)),
    )
    rank.notes["lists"] = [
        native.prepXferDlist(
            who, bindings.nixlXferDList(bindings.DRAM_SEG, tables.expanded(BlockTable.over(memory, size.block))), []
        )
        for who, memory in sides
    ]


def by_agent(rank: Rank, word: str, here: list[int], there: list[int]) -> float:
    """Seconds of one request."""
    import numpy

    made, _ = rank.notes["agent"]
    native, bindings, (ours, theirs) = made.native, made.bindings, rank.notes["lists"]
    ids = [numpy.array(side, dtype=numpy.int32) for side in (here, there)]
    started = time.perf_counter()
    request = native.makeXferReq(getattr(bindings, word), ours, ids[0], theirs, ids[1], b"", [], False)
    state = native.postXferReq(request, b"")
    while state == bindings.NIXL_IN_PROG:
        time.sleep(100e-6)
        state = native.getXferStatus(request)
    took = time.perf_counter() - started
    native.releaseXferReq(request)
    return took


def take_over(rank: Rank, size: Size, ids: list[int]) -> float:
    """Seconds in which what arrived is digested and copied to where it is used, by the shortest loop there is."""
    import numpy
    import xxhash

    _, region = rank.notes["agent"]
    if "used" not in rank.notes:
        rank.notes["used"] = numpy.full(size.nbytes, 1, numpy.uint8)
    used = rank.notes["used"].ctypes.data
    started = time.perf_counter()
    for block in ids:
        row: Any = (ctypes.c_char * size.block).from_address(region.address + block * size.block)
        xxhash.xxh3_64_intdigest(memoryview(row).cast("B"))
    for there, block in enumerate(ids):
        ctypes.memmove(used + there * size.block, region.address + block * size.block, size.block)
    return time.perf_counter() - started


# -- in the processes: the transport


def open_endpoint(rank: Rank, size: Size) -> bytes:
    """An endpoint with memory."""
    import numpy

    import tensorway

    endpoint = tensorway.create("transport", "nixl", NIXL)
    rank.notes["endpoint"] = endpoint, endpoint.register(numpy.full(size.nbytes, 1, numpy.uint8)).regions[0]
    return bytes(endpoint.describe())


def connect_endpoint(rank: Rank, size: Size, description: bytes) -> str:
    """A route to the other's memory; the lane."""
    from tensorway.transport import BlockTable

    endpoint, region = rank.notes["endpoint"]
    peer = endpoint.connect(description)
    tables = (BlockTable.over(memory, size.block) for memory in (region, peer.regions[0]))
    rank.notes["route"] = endpoint.prepare(peer, *tables)
    return str(peer.lane)


def by_transport(rank: Rank, operation: str, here: list[int], there: list[int]) -> float:
    """Seconds of one transfer."""
    endpoint, _ = rank.notes["endpoint"]
    ids = array("q", here), array("q", there)
    started = time.perf_counter()
    getattr(endpoint, operation)(rank.notes["route"], *ids).wait()
    return time.perf_counter() - started


# -- in the processes: the hand-over


def open_rendezvous(rank: Rank) -> str:
    """Where the engines meet."""
    import tensorway

    rank.notes["service"] = tensorway.create("rendezvous", "direct", {"host": POLICY, "secret": SECRET})
    return str(rank.notes["service"].address)


def open_engine(rank: Rank, engine: str, size: Size, options: dict[str, Any]) -> None:
    """A planner and a mover over as many layers of blocks as make the size."""
    import numpy

    from tensorway.kv import KVContext
    from tensorway.memory import Region
    from tensorway_kv.layouts import Cache, Parallel, attention, rank_geometry
    from tensorway_kv.offers import construct_handover
    from tensorway_kv.options import HandoverOptions

    blocks = size.count // LAYERS
    rank.notes["pages"] = pages = numpy.full(size.nbytes, 1, numpy.uint8)
    bases = iter(range(Region.of(pages).address, Region.of(pages).address + size.nbytes, size.block * blocks))
    # K and V of 8 heads, 16 tokens in a block, 2 bytes each.
    caches = [Cache(range(LAYERS), attention(8, size.block // (PAGE * 8 * 2) // 2 * 2), PAGE, order="HND")]
    geometry = rank_geometry(caches, Parallel(1), 0, blocks=blocks, base=lambda *_: next(bases))
    given = {"transport": "nixl", "transport_options": NIXL, "secret": SECRET, **options}
    rank.notes["sides"] = [
        construct_handover(
            HandoverOptions(**given), KVContext(engine, rank.rendezvous(), role, 1, 0, geometry, {"model": "bench"})
        )
        for role in ("planner", "mover")
    ]


def turn(rank: Rank) -> Any:
    """One step of an engine of one rank."""
    planner, mover = rank.notes["sides"]
    step = planner.plan_step()
    mover.submit(step.plan)
    planner.on_results(0, mover.poll())
    return step


def keep(rank: Rank, request: str, ids: list[int], byte: int) -> object:
    """Fill a request's blocks and keep them; the ticket."""
    from tensorway.kv import RequestView

    rank.notes["pages"][:] = byte
    tokens = len(ids) * PAGE
    kept = rank.notes["sides"][0].finish(RequestView(request, tokens, hand_over=True), [ids], tokens)
    turn(rank)
    return kept.ticket


def settle(rank: Rank, pause: float) -> None:
    """Step until nothing is kept any more."""
    while rank.notes["sides"][0].busy():
        turn(rank)
        time.sleep(pause)


def fetch(rank: Rank, request: str, ticket: object, ids: list[int], byte: int) -> float:
    """Seconds from `reserve` to `received`."""
    from tensorway.kv import RequestView

    planner, _ = rank.notes["sides"]
    tokens, pages = len(ids) * PAGE, rank.notes["pages"]
    view = RequestView(request, tokens, ticket)
    assert planner.lookup(view, 0).tokens == tokens
    started = time.perf_counter()
    planner.reserve(view, [ids], 0, tokens)
    while not (step := turn(rank)).received:
        assert not step.failed, step
        time.sleep(IDLE)
    took = time.perf_counter() - started
    assert pages.min() == pages.max() == byte, "other bytes arrived than were sent"
    settle(rank, IDLE)
    return took


# -- in the processes: the rebalance


def model(size: Size, verify: bool) -> Any:
    """Experts of two blocks each in four layers: all but one of them together are the blocks that all ways move."""
    from tensorway_eplb.testing.engine import Model

    experts = size.count // 8 + 1
    options = {"transport": "nixl", "transport_options": NIXL}
    return Model(
        layers=4, experts=experts, slots=experts, tensors=(("w13", size.block), ("w2", size.block)), options=options,
        patience=20.0, copies=False, verify=verify,
    )  # fmt: skip


# -- in the processes: one stream


def listen(rank: Rank, nbytes: int) -> None:
    """Take one connection."""
    with socket.create_server(("", STREAM_PORT)) as server:
        rank.notes["stream"], rank.notes["sink"] = server.accept()[0], bytearray(nbytes)


def dial(rank: Rank, address: str, nbytes: int) -> None:
    """Make it."""
    until = time.monotonic() + 20
    while True:
        try:
            rank.notes["stream"] = socket.create_connection((address, STREAM_PORT))
            break
        except OSError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.05)
    rank.notes["source"] = bytearray(nbytes)


def take(rank: Rank) -> None:
    """Receive all, and say so."""
    stream, left = rank.notes["stream"], memoryview(rank.notes["sink"])
    while left:
        left = left[stream.recv_into(left) :]
    stream.sendall(b".")


def send(rank: Rank) -> float:
    """Seconds until the other has all of it."""
    stream = rank.notes["stream"]
    started = time.perf_counter()
    stream.sendall(rank.notes["source"])
    stream.recv(1)
    return time.perf_counter() - started


# -- here


class Pair:
    """Processes on both hosts: what is moved comes from the first and arrives at the second."""

    def __init__(self, hosts: list[LabHost], size: Size, stack: ExitStack) -> None:
        self.size, self._stack, self._hosts = size, stack, hosts
        count = size.count
        self.ids = [random.Random(seed).sample(range(count), count) for seed in (1, 2)]
        self._number = 0

    def processes(self, rendezvous: str = "") -> list[RankProcess]:
        """One on each."""
        found = f"PYTHONPATH={os.pathsep.join([sys.path[0], *filter(None, [os.environ.get('PYTHONPATH')])])}"
        ways = [functools.partial(host.command, "env", found) for host in self._hosts]
        return [self._stack.enter_context(closing(RankProcess(rendezvous, way))) for way in ways]

    def agent(self) -> dict[str, Callable[[], float]]:
        """Reads by the second, and writes by the first."""
        one, two = self.processes()
        told = [process.call(open_agent, self.size) for process in (one, two)]
        one.call(connect_agent, self.size, *told[1])
        two.call(connect_agent, self.size, *told[0])
        return {
            "agent read": lambda: two.call(by_agent, "NIXL_READ", *self.ids),
            "agent write": lambda: one.call(by_agent, "NIXL_WRITE", *self.ids[::-1]),
            "agent write, digested and copied": lambda: (
                one.call(by_agent, "NIXL_WRITE", *self.ids[::-1]) + two.call(take_over, self.size, self.ids[1])
            ),
        }

    def transport(self) -> dict[str, Callable[[], float]]:
        """The same by tensorway."""
        one, two = self.processes()
        told = [process.call(open_endpoint, self.size) for process in (one, two)]
        lanes = {one.call(connect_endpoint, self.size, told[1]), two.call(connect_endpoint, self.size, told[0])}
        assert lanes == {"tcp"}, lanes
        return {
            "transport read": lambda: two.call(by_transport, "read", *self.ids),
            "transport write": lambda: one.call(by_transport, "write", *self.ids[::-1]),
        }

    def handover(self) -> dict[str, Callable[[], float]]:
        """What an engine on the second needs of one on the first."""
        (service, _) = self.processes()
        address = service.call(open_rendezvous)
        one, two = self.processes(address)
        one.call(open_engine, "prefill", self.size, {})
        two.call(open_engine, "decode", self.size, {})
        (three,) = self.processes(address)[1:]
        three.call(open_engine, "reading", self.size, {"prefer": "pull"})
        ways = {name: self._way(one, two, pause) for name, pause in STEPS.items()}
        return {**ways, "hand-over that reads": self._way(one, three, IDLE)}

    def _way(self, one: RankProcess, two: RankProcess, pause: float) -> Callable[[], float]:
        blocks = self.size.count // LAYERS
        ids = [random.Random(seed).sample(range(blocks), blocks) for seed in (3, 4)]

        def moved() -> float:
            self._number += 1
            request, byte = f"r{self._number}", 2 + self._number % 200
            ticket = one.call(keep, request, ids[0], byte)
            one.start(settle, pause)
            took = two.call(fetch, f"{request}-here", ticket, ids[1], byte)
            one.result()
            return float(took)

        return moved

    def rebalance(self) -> dict[str, Callable[[], float]]:
        """The second has one expert again and again, and gets the others from the first, in random order."""
        return {"rebalance": self._rebalance(True), "rebalance that verifies nothing": self._rebalance(False)}

    def _rebalance(self, verify: bool) -> Callable[[], float]:
        import numpy

        from tensorway_eplb.placement import Placement
        from tensorway_eplb.testing import engine

        (service, _) = self.processes()
        ranks, shape = self.processes(service.call(open_rendezvous)), model(self.size, verify)
        experts = range(shape.experts)
        few, all_ = (
            [[*experts, *second]] * 4 for second in ([0] * len(experts), random.Random(5).sample(experts, len(experts)))
        )
        for me, rank in enumerate(ranks):
            place = Place("/bench/experts", ("p0", "p1"), me)
            rank.start(engine.join, place, shape, Placement(numpy.array(few), len(experts), 2))
        for rank in ranks:
            rank.result()

        def to(rows: list[list[int]]) -> float:
            for rank in ranks:
                rank.start(engine.rebalance, numpy.array(rows), 60.0)
            reports = [rank.result() for rank in ranks]
            assert all((one.error, one.wrong) == ("", ()) for one in reports), reports
            return max(one.seconds for one in reports)

        def moved() -> float:
            took = to(all_)
            to(few)
            return took

        return moved

    def stream(self) -> dict[str, Callable[[], float]]:
        """One TCP connection, for scale."""
        one, two = self.processes()
        two.start(listen, self.size.nbytes)
        one.call(dial, self._hosts[1].ip, self.size.nbytes)
        two.result()

        def moved() -> float:
            two.start(take)
            took = one.call(send)
            two.result()
            return float(took)

        return {"one stream": moved}


#: What is divided by what, within a round.
RATIOS = {
    "transport read / agent read": ("transport read", ("agent read",)),
    "transport write / agent write": ("transport write", ("agent write",)),
    "hand-over / the agent's best": ("hand-over", ("agent read", "agent write")),
    "hand-over, steps of 50 ms / the agent's best": ("hand-over, steps of 50 ms", ("agent read", "agent write")),
    "hand-over that reads / agent read": ("hand-over that reads", ("agent read",)),
    "rebalance / the agent's best": ("rebalance", ("agent read", "agent write")),
    "rebalance that verifies nothing / the agent's": ("rebalance that verifies nothing", ("agent read", "agent write")),
    "rebalance / the agent's, digested and copied": ("rebalance", ("agent write, digested and copied",)),
    "agent read / agent write": ("agent read", ("agent write",)),
}


def measured(size: Size, rounds: int) -> list[dict[str, list[float]]]:
    """Seconds of every way, round by round, with the agent's beside each kind; the first round does not count.

    Kinds have no processes of others beside them: also one that idles takes turns of two cores.
    """
    kinds = (Pair.transport, Pair.handover, Pair.rebalance, Pair.stream)
    return [_beside_the_agent(kind, size, rounds) for kind in kinds]


def _beside_the_agent(
    kind: Callable[[Pair], dict[str, Callable[[], float]]], size: Size, rounds: int
) -> dict[str, list[float]]:
    with Lab(2) as lab, ExitStack() as stack:
        pair = Pair(lab.hosts, size, stack)
        ways = {**pair.agent(), **kind(pair)}
        took: dict[str, list[float]] = {name: [] for name in ways}
        order = list(ways)
        for number in range(rounds + 1):
            random.Random(number).shuffle(order)
            for name in order:
                took[name].append(ways[name]())
        return {name: each[1:] for name, each in took.items()}


def ratios(kinds: list[dict[str, list[float]]]) -> Iterator[tuple[str, list[float]]]:
    """Throughput of one as a part of the other's, in order of size."""
    for name, (ours, theirs) in RATIOS.items():
        took = next(took for took in kinds if ours in took)
        best = [min(times) for times in zip(*(took[one] for one in theirs), strict=True)]
        yield name, sorted(other / mine for mine, other in zip(took[ours], best, strict=True))


def main() -> None:
    """Print a table for each length of blocks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer bytes and rounds")
    parser.add_argument("--kib", type=int, action="append", help="length of blocks; 64, 256 and 1024 by default")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each length")
    given = parser.parse_args()
    if not any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13")):
        print("NIXL is not installed here: nothing to compare. pip install nixl-cu12")
        return
    if why := missing():
        print(f"There can be no hosts here: {why}")
        return
    total, rounds = (32 * MIB, 3) if given.short else (256 * MIB, 21)
    for kib in given.kib or ((64,) if given.short else (64, 256, 1024)):
        size = Size(block := kib * KIB, total // (kib * KIB))
        kinds = measured(size, rounds)
        # The agent's rates are those beside the last kind, one stream.
        rates = {name: size.nbytes / statistics.median(each) / 1e9 for took in kinds for name, each in took.items()}
        found = {name: (statistics.median(each), each[0], each[-1]) for name, each in ratios(kinds)}
        load = os.getloadavg()[0]
        if given.json:
            print(json.dumps({"block": block, "nbytes": size.nbytes, "load": load, "GB/s": rates, "ratios": found}))
            continue
        print(f"{size.count} blocks of {block // KIB} KiB in random order, {rounds} rounds, load {load:.1f}")
        for name, rate in rates.items():
            print(f"  {name:<45} {rate:5.2f} GB/s")
        for name, (middle, low, high) in found.items():
            print(f"  {name:<45} {middle:5.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    import hosts_throughput  # by a name that the processes on the hosts find, too

    hosts_throughput.main()
