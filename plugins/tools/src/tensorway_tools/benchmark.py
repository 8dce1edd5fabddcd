"""What a benchmark is: the contract between `tensorway bench` and the dists that bring one. Start reading here.

Imports attrs and the standard library only, so that any dist may import it. A dist names a `Benchmark` in the
entry-point group `tensorway.bench`. It is run in processes of its own, several times; what each round took stands
beside what a reference took in the same round, because a figure of a busy machine means little and its ratio does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import attrs

#: `wall`: seconds that pass; `cpu`: seconds of processor time, where waiting for others is not what is measured.
Clock = Literal["wall", "cpu"]
_CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@attrs.frozen
class Row:
    """What was measured of one thing, beside its reference: seconds of each round, both of the same round."""

    #: What is measured, the same in every run: rows of two runs are compared by it.
    name: str
    #: The reference, in words that follow "times": "a memmove of as many bytes".
    to: str
    ours: tuple[float, ...]
    reference: tuple[float, ...]
    clock: Clock = "wall"
    #: What ours moves in one round; 0 where that means nothing.
    nbytes: int = 0


@attrs.frozen
class Run:
    """How a benchmark is to be run."""

    #: A run that shows that it works, in seconds.
    short: bool
    #: `tensorway.create`, for dists that must not import the host.
    create: Callable[..., Any]
    #: `tensorway.testing.PeerProcess`: another process with an endpoint of a transport, to be closed.
    peer: Callable[..., Any]

    def either(self, full: int, short: int) -> int:
        """A number of rounds, blocks or bytes: one for people who wait, and one for those who do not."""
        return short if self.short else full

    def measured(
        self,
        name: str,
        ours: Callable[[], object],
        reference: Callable[[], object],
        *,
        to: str,
        rounds: int,
        clock: Clock = "wall",
        nbytes: int = 0,
    ) -> Row:
        """Call both so many times, in turns; who begins changes. The first calls of both are not counted."""
        tick = _CLOCKS[clock]

        def took(call: Callable[[], object]) -> float:
            started = tick()
            call()
            return tick() - started

        pairs = []
        for number in range(rounds + 1):
            both = [took(call) for call in ((ours, reference) if number % 2 else (reference, ours))]
            pairs.append(both if number % 2 else both[::-1])
        mine, other = zip(*pairs[1:], strict=True)
        return Row(name, to, mine, other, clock, nbytes)


def _nothing() -> str:
    return ""


@attrs.frozen
class Benchmark:
    """What an entry point of the group `tensorway.bench` refers to."""

    #: One sentence: what is measured, beside what.
    summary: str
    #: Yields rows as they are measured, so that what comes after a failure costs its own rows only.
    run: Callable[[Run], Iterable[Row]]
    #: What is missing here and how to get it; empty if nothing is. Asked in the process that would run it.
    missing: Callable[[], str] = _nothing
