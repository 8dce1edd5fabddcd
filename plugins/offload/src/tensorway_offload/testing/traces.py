"""Traces that are made up, seeded: what a policy must bear that no public trace shows. May import `replay`.

Each generator gives requests in order of time. Blocks are chained as prompts are: equal blocks have equal prefixes,
except in `zipf` and `noise`, whose requests are of single blocks that know nothing of each other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Final

from tensorway.offload import OffloadKey, make_offload_key
from tensorway_offload.replay import Request

_Blocks = tuple[OffloadKey, ...]


def _blocks(numbers: Iterator[int], many: int) -> _Blocks:
    return tuple(make_offload_key(next(numbers).to_bytes(8, "big")) for _ in range(many))


def _in_order(rows: list[tuple[float, _Blocks]]) -> list[Request]:
    """Of sessions that overlap."""
    return [Request(at, keys) for at, keys in sorted(rows, key=lambda row: row[0])]


def agentic(rng: random.Random, size: int) -> list[Request]:
    """Sessions of many turns, each a few blocks longer than the last, and cut when they are too long."""
    numbers, began = count(), 0.0
    rows: list[tuple[float, _Blocks]] = []
    system = _blocks(numbers, 8)
    while len(rows) < size:
        began += rng.expovariate(1 / 60)
        at, keys = began, system[: rng.choice((4, 8))] + _blocks(numbers, rng.randint(10, 40))
        for _ in range(int(rng.lognormvariate(3.0, 0.8)) + 1):
            keys += _blocks(numbers, max(1, int(rng.lognormvariate(0.8, 0.9))))
            if len(keys) > 300:
                keys = keys[:20] + _blocks(numbers, 20)
            rows.append((at, keys))
            at += rng.lognormvariate(2.3, 1.0)
    return _in_order(rows)[:size]


def chats(rng: random.Random, size: int) -> list[Request]:
    """Conversations: a question, an answer that is part of the next prompt, and a last block that was cut."""
    numbers, began = count(), 0.0
    rows: list[tuple[float, _Blocks]] = []
    while len(rows) < size:
        began += rng.expovariate(1.0)
        at, keys = began, _blocks(numbers, max(1, int(rng.lognormvariate(2.0, 1.0))))
        goes_on = rng.choice((0.2, 0.8))
        while True:
            rows.append((at, keys + _blocks(numbers, 1)))
            if rng.random() > goes_on:
                break
            at += rng.lognormvariate(5.0, 1.0)
            keys += _blocks(numbers, max(1, int(rng.lognormvariate(0.7, 0.7))))
    return _in_order(rows)[:size]


def single_turns(rng: random.Random, size: int) -> list[Request]:
    """Questions that never go on, after one of forty system prompts, some of which are asked far more often."""
    numbers = count()
    systems = [_blocks(numbers, rng.randint(5, 60)) for _ in range(40)]
    weights = [1 / (rank + 1) for rank in range(40)]
    chosen = rng.choices(systems, weights, k=size)
    return [Request(float(at), system + _blocks(numbers, rng.randint(1, 8))) for at, system in enumerate(chosen)]


def scan(rng: random.Random, size: int) -> list[Request]:
    """Nothing is ever asked for twice."""
    numbers = count()
    return [Request(float(at), _blocks(numbers, rng.randint(1, 40))) for at in range(size)]


def loop(rng: random.Random, size: int) -> list[Request]:
    """The same prompts over and over, in one order."""
    numbers = count()
    prompts = [_blocks(numbers, rng.randint(5, 40)) for _ in range(max(2, size // 10))]
    return [Request(float(at), prompts[at % len(prompts)]) for at in range(size)]


def zipf(rng: random.Random, size: int) -> list[Request]:
    """Single blocks, a few of them often."""
    keys = _blocks(count(), size)
    weights = [1 / (rank + 1) ** 0.9 for rank in range(size)]
    return [Request(float(at), (key,)) for at, key in enumerate(rng.choices(keys, weights, k=4 * size))]


def noise(rng: random.Random, size: int) -> list[Request]:
    """Single blocks, each as often as any."""
    keys = _blocks(count(), size)
    return [Request(float(at), (rng.choice(keys),)) for at in range(4 * size)]


def documents(rng: random.Random, size: int) -> list[Request]:
    """Long documents, about each of which a few questions come soon after each other."""
    numbers, began = count(), 0.0
    rows: list[tuple[float, _Blocks]] = []
    while len(rows) < size:
        began += rng.expovariate(1 / 8)
        document, at = _blocks(numbers, rng.randint(50, 400)), began
        for _ in range(rng.randint(1, 12)):
            rows.append((at, document + _blocks(numbers, rng.randint(1, 3))))
            at += rng.expovariate(1 / 60)
    return _in_order(rows)[:size]


def changing(rng: random.Random, size: int) -> list[Request]:
    """A workload that becomes another one, twice; blocks of each are the same when it comes again."""
    part = max(1, size // 3)
    first, second = chats(rng, 2 * part), loop(rng, part)
    parts = (first[:part], _others(second), first[part:])
    return [Request(float(at), row.keys) for at, row in enumerate(row for rows in parts for row in rows)]


def _others(rows: list[Request]) -> list[Request]:
    """The same with blocks of another tenant."""
    return [Request(row.at, tuple(OffloadKey(key[:8] + b"another!" + key[16:]) for key in row.keys)) for row in rows]


#: By name; each is called with a random generator and about how many requests.
GENERATORS: Final[Mapping[str, Callable[[random.Random, int], list[Request]]]] = {
    made.__name__: made for made in (agentic, chats, single_turns, scan, loop, zipf, noise, documents, changing)
}
