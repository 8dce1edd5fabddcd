"""What a policy would have had of a trace: requests in order through the calls that a manager makes, keys only.

May import the core's offload room. Hits are blocks at the head of a request that are all there; what comes after the
first that is not is computed anew, whether it is there or not. Beside every policy there are two bounds: a cache that
never forgets, and Belady's rule, which knows the future.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import attrs

from tensorway.offload import EvictionPolicy, OffloadKey, ReqContext

_NEVER: Final = 1 << 62


@attrs.frozen
class Request:
    """One line of a trace."""

    #: Seconds since the first one.
    at: float
    keys: tuple[OffloadKey, ...]


@attrs.define
class Clock:
    """The trace's own time, for the policy's context."""

    now: float = 0.0

    def __call__(self) -> float:
        """Seconds since the first request."""
        return self.now


def blocks(requests: Sequence[Request]) -> tuple[int, int]:
    """How many blocks are asked for, and how many different ones they are."""
    return sum(len(request.keys) for request in requests), len({key for request in requests for key in request.keys})


def hits(
    policy: EvictionPolicy, requests: Sequence[Request], capacity: int, clock: Clock, step: int = 1 << 30
) -> Iterator[int]:
    """Of each request, how many blocks it found, with the policy's order and room for so many blocks.

    Stores come in batches of `step` blocks, as of prompts that are computed in parts.
    """
    here: set[OffloadKey] = set()
    for number, request in enumerate(requests):
        clock.now = request.at
        keys, req = request.keys, ReqContext(str(number))
        found = next((at for at, key in enumerate(keys) if key not in here), len(keys))
        policy.used([key for key in keys if key in here], req)
        own = frozenset(keys)
        new = [key for key in keys if key not in here]
        for start in range(0, len(new), step):
            part = new[start : start + step]
            policy.wanted(part, req)
            if len(here) + len(part) > capacity:
                gone = _victims(policy, own, len(here) + len(part) - capacity)
                policy.evicted(gone)
                here.difference_update(gone)
            part = part[: capacity - len(here)]
            policy.stored(part, req)
            here.update(part)
        policy.ended(keys, req)
        yield found


def _victims(policy: EvictionPolicy, own: frozenset[OffloadKey], count: int) -> list[OffloadKey]:
    gone: list[OffloadKey] = []
    for key in policy.victims():
        if key not in own:
            gone.append(key)
            if len(gone) == count:
                break
    return gone


def endless(requests: Sequence[Request]) -> Iterator[int]:
    """The same for a cache that keeps everything."""
    here: set[OffloadKey] = set()
    for request in requests:
        yield next((at for at, key in enumerate(request.keys) if key not in here), len(request.keys))
        here.update(request.keys)


def belady(requests: Sequence[Request], capacity: int) -> Iterator[int]:
    """The same for a cache that keeps the blocks that are asked for soonest, and stores nothing that is not worth it.

    It is the optimum of blocks that count each for itself; of leading blocks nobody knows one that is quick to compute.
    """
    following = _following(requests)
    next_of: dict[OffloadKey, int] = {}
    heap: list[tuple[int, int, OffloadKey]] = []
    for request, after in zip(requests, following, strict=True):
        yield next((at for at, key in enumerate(request.keys) if key not in next_of), len(request.keys))
        for at, (key, when) in enumerate(zip(request.keys, after, strict=True)):
            if when == _NEVER:
                next_of.pop(key, None)
                continue
            next_of[key] = when
            heapq.heappush(heap, (-when, -at, key))  # of those that come back together the tail goes first
        while len(next_of) > capacity:
            when, _, key = heapq.heappop(heap)
            if next_of.get(key) == -when:
                del next_of[key]


def _following(requests: Sequence[Request]) -> list[list[int]]:
    """Of each block of each request, which request asks for it next."""
    last: dict[OffloadKey, int] = {}
    found = []
    for number in range(len(requests) - 1, -1, -1):
        keys = requests[number].keys
        found.append([last.get(key, _NEVER) for key in keys])
        last.update(dict.fromkeys(keys, number))
    return found[::-1]


def ratio(
    found: Iterator[int], requests: Sequence[Request], progress: Callable[[int], None] = lambda done: None
) -> float:
    """Hits by blocks that are asked for; tells after each request how many are done."""
    total = 0
    for done, count in enumerate(found, 1):
        total += count
        progress(done)
    return total / max(1, sum(len(request.keys) for request in requests))
