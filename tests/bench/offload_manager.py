"""The manager of offloaded blocks beside vLLM's own: operations, worst calls, memory of a block.

    python tests/bench/offload_manager.py [--short]

A full manager with the policy `lru`, 1,000 blocks in a call, calls of both sides in turns. `load` is prepare and
complete of blocks that are there, `store` the same of new blocks, for each of which another one goes, with events, and
`end` is what both do when the request has ended. Seconds are CPU seconds of this thread, ratios are of medians. vLLM is
`CPUOffloadingManager` of its version 0.32 if it can be imported, else a model that does per key what it does (a dict, a
rank, a heap that is cleaned when it is twice too long); the first row says which.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import os
import random
import statistics
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tensorway.offload import OffloadKey, PolicyContext, ReqContext, make_offload_key
from tensorway_offload.manager import Manager
from tensorway_offload.manager_options import ManagerOptions
from tensorway_offload.policies.lru import Lru

CALL = 1000


class Spec(list[int]):
    """Rows, as they are."""

    medium = "cpu"


def keys_of(count: int) -> list[OffloadKey]:
    """New blocks."""
    data = os.urandom(32 * count)
    return [make_offload_key(data[at : at + 32]) for at in range(0, len(data), 32)]


class Ours:
    """The manager of this dist."""

    name = "tensorway"

    def __init__(self, capacity: int) -> None:
        policy = Lru(PolicyContext(capacity, time.monotonic))
        self.manager = Manager(medium="cpu", capacity=capacity, spec=Spec, policy=policy, options=ManagerOptions())
        self._number = 0

    def begin(self) -> ReqContext:
        self._number += 1
        req = ReqContext(f"r{self._number}")
        self.manager.begins(req)
        return req

    def lookup(self, keys: Sequence[OffloadKey], req: Any) -> int:
        return self.manager.lookup_prefix(keys, req).ready

    def load(self, keys: Sequence[OffloadKey], req: Any) -> None:
        out = self.manager.prepare_load(keys, req)
        assert out is not None
        self.manager.complete_load(out.ticket)

    def store(self, keys: Sequence[OffloadKey], req: Any) -> int:
        out = self.manager.prepare_store(keys, req)
        assert out is not None
        self.manager.complete_store(out.ticket)
        return len(out.evicted)

    def end(self, req: Any) -> None:
        self.manager.ended(req)
        self.manager.take_events()


class Vllm:
    """vLLM's own manager."""

    name = "vllm 0.32"

    def __init__(self, capacity: int) -> None:
        from vllm.v1.kv_offload import base
        from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

        self._base, self._number = base, 0
        self.manager = CPUOffloadingManager(capacity, "lru", enable_events=True)

    def begin(self) -> Any:
        self._number += 1
        req = self._base.ReqContext(f"r{self._number}")
        self.manager.on_new_request(req)
        return req

    def lookup(self, keys: Sequence[OffloadKey], req: Any) -> int:
        hit = self._base.LookupResult.HIT
        return sum(1 for key in keys if self.manager.lookup(key, req) is hit)

    def load(self, keys: Sequence[OffloadKey], req: Any) -> None:
        self.manager.prepare_load(keys, req)
        self.manager.complete_load(keys, req)

    def store(self, keys: Sequence[OffloadKey], req: Any) -> int:
        out = self.manager.prepare_store(keys, req)
        self.manager.complete_store(out.keys_to_store, req)
        return len(out.evicted_keys)

    def end(self, req: Any) -> None:
        self.manager.on_request_finished(req)
        for _ in self.manager.take_events():
            pass


class Chunk:
    """What the model knows of a block."""

    __slots__ = ("holds", "row")

    def __init__(self, row: int) -> None:
        self.row, self.holds = row, -1


class Model:
    """What vLLM's manager does for each key, as the study of it describes it: no code of it, and somewhat less work."""

    name = "a model of vllm 0.32"

    def __init__(self, capacity: int) -> None:
        self.chunks: dict[OffloadKey, Chunk] = {}
        self.ranks: dict[OffloadKey, int] = {}
        self.idle: set[OffloadKey] = set()
        self.heap: list[tuple[int, OffloadKey]] = []
        self.rank, self.free = 0, list(range(capacity))

    def begin(self) -> Any:
        return {}

    def get(self, key: OffloadKey) -> Chunk | None:
        return self.chunks.get(key)

    def lookup_one(self, key: OffloadKey) -> bool:
        chunk = self.get(key)
        return chunk is not None and chunk.holds >= 0

    def lookup(self, keys: Sequence[OffloadKey], req: Any) -> int:
        return sum(1 for key in keys if self.lookup_one(key))

    def unhold(self, key: OffloadKey) -> None:
        self.idle.add(key)
        heapq.heappush(self.heap, (self.ranks[key], key))
        self.clean()

    def clean(self) -> None:
        if len(self.heap) >= max(64, 2 * len(self.idle)):
            self.heap = [(self.ranks[key], key) for key in self.idle]
            heapq.heapify(self.heap)

    def load(self, keys: Sequence[OffloadKey], req: Any) -> None:
        for key in keys:
            chunk = self.get(key)
            assert chunk is not None
            if not chunk.holds:
                self.idle.remove(key)
            chunk.holds += 1
            req.setdefault(key, True)
        for key in keys:
            chunk = self.get(key)
            assert chunk is not None
            chunk.holds -= 1
            if not chunk.holds:
                self.unhold(key)

    def evict(self) -> OffloadKey:
        while True:
            rank, key = heapq.heappop(self.heap)
            if key in self.idle and self.ranks.get(key) == rank:
                self.idle.remove(key)
                del self.ranks[key]
                self.free.append(self.chunks.pop(key).row)
                return key

    def store(self, keys: Sequence[OffloadKey], req: Any) -> int:
        new = [key for key in keys if self.get(key) is None]
        gone = [self.evict() for _ in range(len(new) - len(self.free))]
        for key in new:
            self.chunks[key] = Chunk(self.free.pop())
            self.rank += 1
            self.ranks[key] = self.rank
            req.setdefault(key, False)
        for key in new:
            chunk = self.get(key)
            assert chunk is not None
            chunk.holds = 0
            self.unhold(key)
        return len(gone)

    def end(self, req: Any) -> None:
        for key in reversed(req):
            if key in self.chunks:
                self.rank += 1
                self.ranks[key] = self.rank
                if key in self.idle:
                    heapq.heappush(self.heap, (self.rank, key))
        self.clean()


def anchor() -> type[Vllm] | type[Model]:
    """vLLM's own, if it is here."""
    with contextlib.suppress(ImportError):
        Vllm(8)
        return Vllm
    return Model


def fill(side: Any, capacity: int) -> list[OffloadKey]:
    """Store until it is full; what is there."""
    keys = keys_of(capacity)
    for at in range(0, capacity, CALL):
        req = side.begin()
        side.store(keys[at : at + CALL], req)
        side.end(req)
    return keys


def timed(call: Callable[..., object], *args: object) -> float:
    """CPU seconds of one call."""
    started = time.thread_time()
    call(*args)
    return time.thread_time() - started


class Run:
    """One full manager and what its calls took."""

    def __init__(self, make: Callable[[int], Any], capacity: int) -> None:
        self.side = make(capacity)
        self.keys = fill(self.side, capacity)
        self.took: dict[str, list[float]] = {"lookup": [], "load": [], "end": [], "store": [], "end of store": []}

    def load(self, rng: random.Random) -> None:
        """Look up and load what is there."""
        at = rng.randrange(0, len(self.keys), CALL)
        some = [
            bytes(bytearray(key)) for key in self.keys[at : at + CALL]
        ]  # as they come from an engine: other objects
        req = self.side.begin()
        self.took["lookup"].append(timed(self.side.lookup, some, req))
        req = self._other(req)
        self.took["load"].append(timed(self.side.load, some, req))
        self.took["end"].append(timed(self.side.end, req))

    def store(self) -> list[OffloadKey]:
        """Store what is new: with this order, what was stored or loaded longest ago goes."""
        new = keys_of(CALL)
        req = self.side.begin()
        self.took["store"].append(timed(self.side.store, new, req))
        self.took["end of store"].append(timed(self.side.end, req))
        return new

    def _other(self, req: Any) -> Any:
        self.side.end(req)
        return self.side.begin()


def rates(make: Callable[[int], Any], capacity: int, rounds: int) -> None:
    """Calls of both, in turns: first loads, whose blocks are all there, then stores."""
    ours, theirs = Run(Ours, capacity), Run(make, capacity)
    gc.collect()
    rng = random.Random(1)
    for _ in range(rounds):
        for run in (ours, theirs):
            run.load(rng)
    for _ in range(rounds):
        for run in (ours, theirs):
            run.store()
    for what in ours.took:
        mine, other = (statistics.median(run.took[what]) for run in (ours, theirs))
        print(
            f"{capacity:>9,} blocks, {what:<13} {CALL / mine / 1e6:7.3f} M blocks/s, {other / mine:6.2f} x "
            f"{make(8).name}'s {CALL / other / 1e6:.3f}; worst call {max(ours.took[what]) / mine:5.1f} x the median, "
            f"theirs {max(theirs.took[what]) / other:6.1f} x"
        )
    pairs = [("load and end", "load", "end"), ("store and end", "store", "end of store")]
    for name, one, two in pairs:
        mine, other = (
            statistics.median(map(sum, zip(run.took[one], run.took[two], strict=True))) for run in (ours, theirs)
        )
        print(f"{capacity:>9,} blocks, {name:<13} {CALL / mine / 1e6:7.3f} M blocks/s, {other / mine:6.2f} x")


def worst(capacity: int, calls: int) -> None:
    """The longest of thousands of calls of every kind, beside the median of its kind."""
    # So few that all are there, however many older ones have been loaded since they were stored.
    run, recent = Run(Ours, capacity), deque[list[OffloadKey]](maxlen=41)
    run.keys.clear()  # what the benchmark itself keeps is no matter for the garbage collector
    gc.collect()
    for number in range(calls):
        if number % 2 == 0:
            recent.append(run.store())
            continue
        req, some = run.side.begin(), recent[number * 31 % len(recent)]
        run.took["lookup"].append(timed(run.side.lookup, some, req))
        run.took["load"].append(timed(run.side.load, some, req))
        run.took["end"].append(timed(run.side.end, req))
    for what in run.took:
        found = sorted(run.took[what])
        middle = statistics.median(found)
        print(
            f"{capacity:>9,} blocks, {what:<13} worst of {len(found):,} calls {found[-1] * 1e3:6.2f} ms, "
            f"{found[-1] / middle:5.1f} x the median of {middle * 1e3:.2f} ms; the next {found[-2] / middle:.1f} x"
        )


def memory(make: Callable[[int], Any], capacity: int) -> None:
    """Bytes of a block without its key, when blocks have come and gone."""
    keys = keys_of(2 * capacity)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    side = make(capacity)
    for at in range(0, len(keys), CALL):
        req = side.begin()
        side.store(keys[at : at + CALL], req)
        side.end(req)
    gc.collect()
    each = (tracemalloc.get_traced_memory()[0] - before) / capacity
    tracemalloc.stop()
    print(f"{capacity:>9,} blocks, {each:6.1f} bytes of each without its key: {side.name}")


def main() -> None:
    """Print all rows."""
    short = "--short" in sys.argv
    make = anchor()
    print(f"beside {make(8).name}")
    sizes: Iterator[int] = iter((10_000, 100_000) if short else (10_000, 100_000, 1_000_000))
    for capacity in sizes:
        rates(make, capacity, 15 if short else 60)
        memory(Ours, capacity)
        memory(make, capacity)
    worst(100_000 if short else 1_000_000, 1_000 if short else 4_000)


if __name__ == "__main__":
    main()
