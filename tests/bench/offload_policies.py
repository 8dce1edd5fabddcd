"""Hit ratios of eviction policies, side by side with plain recency and Belady's rule, and what a policy's calls cost.

    python tests/bench/offload_policies.py [--short] [TRACE ...]

Each TRACE is one JSON object a line with `hash_ids`, such as those published with Mooncake; without any, only traces
that are made up are replayed. Hit ratios are the same on every machine. Times are CPU time of this thread, of calls of
1,000 keys, and every ratio is of one run.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from itertools import islice
from pathlib import Path

import tensorway
from tensorway.cli.output import Output
from tensorway.offload import PolicyContext, ReqContext, make_offload_key
from tensorway_offload.command.replay import POLICIES
from tensorway_offload.command.traces import read
from tensorway_offload.replay import Clock, Request, belady, blocks, hits, ratio
from tensorway_offload.testing.traces import GENERATORS

CAPACITIES = (0.005, 0.01, 0.03, 0.1, 0.3, 0.5)
KEYS = 1000
REQ = ReqContext("bench")


def replayed(name: str, requests: list[Request], capacity: int) -> float:
    """The hit ratio of one policy."""
    clock = Clock()
    policy = tensorway.create("eviction_policy", name, None, PolicyContext(capacity, clock))
    return ratio(hits(policy, requests, capacity, clock), requests)


def compare(title: str, requests: list[Request], names: list[str], capacities: tuple[float, ...]) -> float:
    """All policies over one trace; returns how far below recency `foresight` was at worst, in points."""
    asked, unique = blocks(requests)
    rooms = [max(1, int(unique * share)) for share in capacities]
    print(f"{title}: {len(requests):,} requests, {asked:,} blocks, {unique:,} different ones")
    found = {name: [replayed(name, requests, room) for room in rooms] for name in names}
    found["Belady"] = [ratio(belady(requests, room), requests) for room in rooms]
    for name, values in found.items():
        print(f"  {name:<10} {'  '.join(f'{value:.4f}' for value in values)}")
    pairs = zip(found["foresight"], found["lru"], strict=True)
    return 100 * min(mine - theirs for mine, theirs in pairs)


def costs(name: str, capacity: int, rounds: int) -> None:
    """What calls of 1,000 keys take at full capacity, and the worst of them."""
    rng = random.Random(1)
    numbers = iter(range(1 << 40))
    keys = [make_offload_key(next(numbers).to_bytes(8, "big") + bytes(24)) for _ in range(capacity)]
    policy = tensorway.create("eviction_policy", name, None, PolicyContext(capacity, time.monotonic))
    for start in range(0, capacity, KEYS):
        policy.stored(keys[start : start + KEYS], REQ)
        policy.ended(keys[start : start + KEYS], REQ)
    taken = []
    for _ in range(rounds):
        new = [make_offload_key(next(numbers).to_bytes(8, "big") + bytes(24)) for _ in range(KEYS)]
        start = rng.randrange(capacity - KEYS)
        begun = time.thread_time()
        policy.used(keys[start : start + KEYS], REQ)
        policy.wanted(new, REQ)
        policy.evicted(list(islice(policy.victims(), KEYS)))
        policy.stored(new, REQ)
        policy.ended(new, REQ)
        taken.append(time.thread_time() - begun)
    median, worst = statistics.median(taken), max(taken)
    print(f"  {name:<10} {1000 * median:7.2f} ms, worst {1000 * worst:7.2f} ms ({worst / median:.1f} x the median)")


def main() -> None:
    """Traces, then costs."""
    short = "--short" in sys.argv
    names = POLICIES.split(",") if not short else ["lru", "foresight"]
    capacities = CAPACITIES if not short else (0.03, 0.3)
    worst: dict[str, float] = {}
    for path in map(Path, (word for word in sys.argv[1:] if not word.startswith("-"))):
        worst[path.name] = compare(path.name, read(path, Output()), names, capacities)
    for name, made in GENERATORS.items():
        requests = made(random.Random(1), 400 if short else 3000)
        worst[f"made up: {name}"] = compare(f"made up: {name}", requests, names, capacities)
    print("foresight beside lru, at worst, in points:")
    for name, points in worst.items():
        print(f"  {name:<40} {points:+.2f}")
    for capacity in (10_000,) if short else (10_000, 100_000, 1_000_000):
        print(f"used, wanted, victims, evicted, stored and ended, 1,000 keys each, at {capacity:,} blocks:")
        for name in names:
            costs(name, capacity, 20 if short else 100)


if __name__ == "__main__":
    main()
