"""One request as one rank has it pushed: registered, written to landing memory, copied to its pages, acknowledged.

May import the core and this package's links and staging. `advance` never waits for a peer and never raises for what one
does. No other engine writes to the request's pages, so they are safe when it fails, at once. The landing memory is not,
before every rank that was asked to write there has answered, or its process is over: only then it is said to be clear.
"""

from __future__ import annotations

import time
from typing import Final

from tensorway.errors import TensorwayError
from tensorway.kv import Result
from tensorway_kv import messages
from tensorway_kv.asking import SILENCE, Over
from tensorway_kv.bound import Bound
from tensorway_kv.links import Link, Reader
from tensorway_kv.observed import Ended
from tensorway_kv.orders import Await, Want
from tensorway_kv.pulls import Phase
from tensorway_kv.reads import Held
from tensorway_kv.staging import Staging

#: The longest of the seconds between two times that it is seen whether the ranks that write are there.
_WATCH: Final = 1.0
#: The same of telling it that nobody wants what it writes.
_AGAIN: Final = 30.0
_FOREVER: Final = float("inf")
_STALE: Final = {"unknown", "epoch", "ended", "expired"}
_CAUSES: Final = {"deadline": "deadline", "failed": "failed", **dict.fromkeys(_STALE, "stale")}


def cleared(want: Want) -> Result:
    """What a planner is told when nobody writes any more to what a request had of staging memory."""
    return Result(want.request, "cleared", proof=str(want.epoch).encode())


class Landing:
    """A push that is awaited, and the memory that it has until nobody writes there."""

    def __init__(self, order: Await, link: Link[Bound], reader: Reader, staging: Staging) -> None:
        self.order, self.fetch, self.link = order, order.fetch, link
        self._reader, self._staging = reader, staging
        self._begun = time.monotonic()
        self._until = self._begun + self.fetch.want.seconds
        #: Seconds that each phase took, of those that have ended.
        self.seconds: dict[Phase, float] = {}
        #: The ranks that were asked to write, by their connection then, and those of them that have not answered.
        self._asked: set[int] | None = None
        self._owed: set[int] = set()
        self._over = Over()
        self._failure: tuple[str, str] | None = None
        self._told: Link[Bound] | None = None
        self._nbytes = 0
        #: Whether the request has ended, and whether nobody writes here any more.
        self.ended = self.clear = False
        link.hold(self.fetch.want)

    @property
    def key(self) -> tuple[str, str, int]:
        """By what a producer's rank names it: its life, the request, the lease."""
        want = self.fetch.want
        return want.incarnation, want.theirs, want.epoch

    def fits(self) -> bool:
        """Whether all that is to be asked for fits into what the transport carries."""
        limit = min(messages.MAX_BYTES, self._reader.endpoint.capabilities.max_notification)
        return len(self._registration(self.fetch.want.seconds)) <= limit

    def cancel(self) -> None:
        """Give it up."""
        self.fail("cancelled", "nobody wants it any more")

    def fail(self, cause: str, why: str) -> None:
        """It cannot be had."""
        if self._failure is None and not self.ended:
            self._failure = (cause, f"Engine {self.link.engine}, incarnation {self.link.incarnation[:12]}: {why}")

    def heard(self, message: messages.Pushed | messages.Refusal) -> bool:
        """What a rank of the producer says, which has been seen to be from it; whether that was waited for."""
        if message.rank not in self._owed:
            return False
        self._owed.discard(message.rank)
        if isinstance(message, messages.Refusal):
            cause = _CAUSES.get(message.cause, "refused")
            self.fail(cause, f"its rank {message.rank} pushes nothing, or nothing more ({message.cause})")
        return True

    def advance(self, now: float, link: Link[Bound]) -> list[Result]:
        """Do what can be done now; what became of it, and when its memory is clear, each once.

        `link`: to the same life, also if the one that it began with broke.
        """
        results = []
        if not self.ended:
            result = self._go(now)
            if result is not None:
                self.ended = True
                results.append(result)
        if self.ended and not self.clear:
            if self._owed:
                self._tell(link)
            self._owed = {rank for rank in self._owed if not self._over(self.link, rank, now)}
            if not self._owed:
                self.clear = True
                for each in {self.link, link, self._told or link}:
                    each.watch(self, (), b"", 0.0, 0.0)
                results.append(cleared(self.fetch.want))
        return results

    # -- inside

    def _go(self, now: float) -> Result | None:
        if self._failure is None:
            try:
                if self._asked is None and self.link.bound is not None and not self.link.lost:
                    self._ask(self.link.bound, now)
                problem = self.link.problem(now, self._until)
                if self._asked is not None and not self._owed and self._failure is None:
                    return self._arrived(now)
                if problem is not None:
                    self.fail(*problem)
                elif now >= self._until:
                    ranks = ", ".join(map(str, sorted(self._owed)))
                    self.fail("deadline", f"its ranks {ranks} had not pushed all within {self.fetch.want.seconds:g} s")
            except TensorwayError as error:
                self.fail("failed", error.true)
        if self._failure is None:
            return None
        cause, why = self._failure
        self._reader.acknowledge(self.link, self.fetch.want, "failed")
        return Result(self.fetch.want.request, "received", cause, why, self.fetch.start)

    def _ask(self, bound: Bound, now: float) -> None:
        """Register with every rank that has something for us."""
        self.seconds["handshake"] = now - self._begun
        self._asked = set(bound.reads.producers)
        self._owed = set(self._asked)
        me, want = self._reader, self.fetch.want
        held = messages.Held(want.theirs, want.epoch)
        beat = messages.encode(messages.Heartbeat(me.incarnation, me.rank, (held,)))
        self.link.watch(self, self._owed, beat, _WATCH, self._until - now)
        payload = self._registration(max(1e-3, self._until - now))
        for rank in self._asked:
            self.link.send(rank, payload)
        self.seconds["posted"] = time.monotonic() - now

    def _registration(self, seconds: float) -> bytes:
        me, fetch = self._reader, self.fetch
        return messages.encode(
            messages.PushRegistration(
                me.incarnation, me.engine, me.rank, fetch.want.theirs, fetch.want.epoch,
                messages.runs(self.order.landing), fetch.start, fetch.stop, min(seconds, 3600.0),
            )
        )  # fmt: skip

    def _arrived(self, now: float) -> Result:
        """All is in landing memory, and nobody writes there: copy it to where it belongs."""
        fetch, groups = self.fetch, self._reader.topology.ranks[0].groups
        self._nbytes = self._staging.copy_out(
            Held.ending(self.order.landing, fetch.stop, groups),
            Held.ending(fetch.blocks, fetch.stop, groups),
            fetch.start,
            fetch.stop,
            states=fetch.stop == fetch.tokens,
        )
        self._reader.acknowledge(self.link, fetch.want, "received")
        self.seconds["done"] = time.monotonic() - self._begun - sum(self.seconds.values())
        return Result(fetch.want.request, "received", tokens=fetch.stop)

    def seen(self, result: Result, deadline: float) -> Ended:
        """What is told of it, as of a pull; pieces are those of the rank that writes."""
        waited, took = max(0.0, deadline - self.fetch.want.seconds), time.monotonic() - self._begun
        seconds = {str(phase): each for phase, each in self.seconds.items()}
        return Ended("push", self.link.engine, result, waited, seconds, took, self._nbytes)

    def _tell(self, link: Link[Bound]) -> None:
        """Tell those who have not answered that nobody wants it; again and again, because they may not have heard."""
        me, want = self._reader, self.fetch.want
        payload = messages.encode(messages.Withdraw(me.incarnation, me.engine, me.rank, want.theirs, want.epoch))
        for each in {self.link, link} if link is not self._told else ():
            each.watch(self, self._owed, payload, _AGAIN, _FOREVER)
        if link is not self._told and link is not self.link:
            link.need(SILENCE)
        self._told = link
