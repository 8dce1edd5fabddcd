"""One tier, so that it can do no harm: its calls on lanes, its answers checked, a breaker, back-pressure, counted.

May import the core's offload room and this package's lanes, breaker, pressure and limits. One thread uses it, and never
waits; what a call has ended with is said from `poll`, on that thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Literal

import attrs

from tensorway._logging import logger
from tensorway.errors import Unsupported
from tensorway.metrics import Counters, Sample
from tensorway.offload import METRICS, OUTCOMES, OffloadKey, OfTenant, Outcome
from tensorway.types import ProbeResult
from tensorway_offload.breaker import STATES, Breaker
from tensorway_offload.lanes import Call, Lanes
from tensorway_offload.limits import BelowOptions, NamedTier
from tensorway_offload.pressure import Pressure

_log = logger("offload")
#: Calls at once, whatever a tier says it can do.
_MOST_THREADS: Final = 8
#: Seconds between two looks at what a tier says of itself.
_LOOK: Final = 10.0

Item = tuple[OffloadKey, memoryview]
What = Literal["lookup", "load", "store", "delete", "probe", "stats"]


@attrs.frozen
class Reply:
    """What a call has ended with."""

    #: For each block, what the tier says, if there is no cause.
    values: Sequence[Any]
    #: `late`, `open` or `failed`; empty if the tier has answered.
    cause: Literal["", "late", "open", "failed"] = ""
    #: Whether no thread touches its buffers any more. If not, another reply says when.
    free: bool = True

    def outcomes(self, count: int) -> list[Outcome]:
        """What became of each block of a call."""
        if not self.cause:
            return list(self.values)
        return ["late" if self.cause == "late" else "failed"] * count


Work = Callable[[float], object]
Then = Callable[[Reply], None]
_OPEN: Final = Reply((), "open")


class Guarded:
    """A tier behind everything that keeps others safe from it."""

    def __init__(self, named: NamedTier, options: BelowOptions, clock: Callable[[], float]) -> None:
        self.name, self.tier, self.limits = named.name, named.tier, named.limits
        self.capabilities = named.tier.capabilities
        self._clock = clock
        threads = min(self.limits.threads or max(1, int(self.capabilities.calls)), _MOST_THREADS)
        lanes = partial(Lanes, named.name, threads, self.limits.spare_threads, clock)
        # Of their own, so that slow stores hold up nobody who reads.
        self._reads, self._writes = lanes(), lanes()
        self.breaker = Breaker(options.failures, options.pause, options.longest_pause)
        self.pressure = Pressure(self.limits)
        self.counters = Counters(METRICS)
        self._said: list[Sample] = []
        self._look_at = 0.0
        self._looking = False
        self._warned = False

    @property
    def usable(self) -> bool:
        """Whether a call may begin now."""
        return self.breaker.allows()

    def look(self, keys: Sequence[OffloadKey], then: Then) -> None:
        """Ask which of these it has."""
        work = partial(self.tier.contains, keys)
        self._begin("lookup", work, partial(_flags, count=len(keys)), self.limits.lookup_seconds, len(keys), then)

    def load(self, items: Sequence[Item], then: Then, after: Callable[[Sequence[Outcome]], None] | None = None) -> None:
        """Read these blocks. `after` is called on the thread that has read them, before the rows are free."""
        work: Work = partial(self.tier.get, items)
        check = partial(_outcomes, count=len(items))
        if after is not None:
            work = partial(_and_after, work, check, after)
        self._begin("load", work, check, self.limits.load_seconds, len(items), then, _bytes(items))

    def store(self, items: Sequence[Item], then: Then) -> None:
        """Write these blocks, which `pressure` has admitted."""
        nbytes = _bytes(items)

        def over(reply: Reply) -> None:
            if reply.free:
                self.pressure.left(len(items), sum(nbytes))
            then(reply)

        work = partial(self.tier.put, items)
        check = partial(_outcomes, count=len(items))
        self._begin("store", work, check, self.limits.store_seconds, len(items), over, nbytes)

    def delete(self, which: Sequence[OffloadKey] | OfTenant, then: Then) -> None:
        """Remove these."""
        work = partial(self.tier.delete, which)
        blocks = 1 if isinstance(which, OfTenant) else len(which)
        self._begin("delete", work, _count, self.limits.store_seconds, blocks, then)

    def poll(self, now: float) -> None:
        """Take in what has ended, and ask a tier that is left alone whether it can be used again."""
        for lanes in (self._reads, self._writes):
            for call in lanes.poll(now):
                call.then(call)
        if self.breaker.due(now):
            self._probe(now)
        if now >= self._look_at and not self._looking and self.breaker.state == "closed":
            self._looking = True
            call = Call(lambda _: self.tier.stats(), now + self.limits.probe_seconds, self._looked)
            self._looking = self._reads.submit(call)
            self._look_at = now + _LOOK

    def drop(self, causes: Sequence[str]) -> None:
        """Count blocks that are not offered to it, each with its cause."""
        for cause in set(causes):
            self.counters.add("offload_dropped_total", causes.count(cause), medium=self.name, cause=cause)

    def said(self) -> list[Sample]:
        """What the tier said of itself when it was last asked, under its name here."""
        return self._said

    def statistics(self) -> list[Sample]:
        """Values of `tensorway.offload.METRICS`, with those that the tier gave last."""
        self.counters.set("offload_breaker", _NUMBERS[self.breaker.state], medium=self.name)
        self.counters.set("offload_queue_blocks", self.pressure.blocks, medium=self.name, what="store")
        return [*self.counters.samples(), *self._said]

    def stop(self) -> None:
        """Begin nothing new."""
        self._reads.close()
        self._writes.close()

    def settled(self, until: float) -> bool:
        """Wait until then for calls that are under way; whether none is."""
        return all([self._reads.join(until), self._writes.join(until)])

    def _begin(
        self,
        what: What,
        work: Work,
        check: Callable[[object], Sequence[Any] | None],
        seconds: float,
        blocks: int,
        then: Then,
        nbytes: Sequence[int] = (),
    ) -> None:
        count = partial(self._count_failed, what, blocks)
        if not self.breaker.allows():
            count("open")
            then(_OPEN)
            return
        turn = self.breaker.begin()

        def over(call: Call) -> None:
            if not call.over or (call.late and call.state == "dropped"):
                count("late")
                self._judge(what, turn, 0, seconds, "late")
                then(Reply((), "late", free=call.over))
                return
            if call.late:  # told before; only now is it free
                then(Reply((), "late"))
                return
            then(self._read(what, call, check, turn, count, nbytes))

        lanes = self._writes if what in ("store", "delete") else self._reads
        if not lanes.submit(Call(work, self._clock() + seconds, over)):
            self.breaker.withdrawn(turn)
            count("open")
            then(_OPEN)

    def _read(
        self,
        what: What,
        call: Call,
        check: Callable[[object], Sequence[Any] | None],
        turn: int,
        count: Callable[[str], None],
        nbytes: Sequence[int],
    ) -> Reply:
        """What a call that came back in time says, if that is an answer at all."""
        seconds = call.ended - call.started
        self.counters.took("offload_seconds", seconds, medium=self.name, what=what)
        values = check(call.value) if call.error is None else None
        if values is None:
            refused = isinstance(call.error, Unsupported)
            self._complain(what, call)
            count("refused" if refused else "failed")
            self._judge(what, turn, 0, seconds, "" if refused else "failed")
            return Reply((), "failed")
        if not nbytes:
            self._judge(what, turn, 0, seconds, "")
            return Reply(values)
        for cause in {value for value in values if value != "done"}:
            amount = list(values).count(cause)
            self.counters.add("offload_failures_total", amount, medium=self.name, what=what, cause=cause)
        done = [size for size, value in zip(nbytes, values, strict=True) if value == "done"]
        total = "offload_stored_total" if what == "store" else "offload_loaded_total"
        self.counters.add(total, len(done), medium=self.name)
        self.counters.add("offload_bytes_total", sum(done), medium=self.name, what=what)
        trouble = next((cause for cause in ("failed", "late") if cause in values), "") if not done else ""
        self._judge(what, turn, sum(done), seconds, trouble or ("full" if "full" in values else ""))
        return Reply(values)

    def _judge(self, what: What, turn: int, nbytes: int, seconds: float, trouble: str) -> None:
        now = self._clock()
        self.breaker.ended(turn, trouble in ("", "full"), now)
        if what == "store":
            self.pressure.wrote(nbytes, seconds, trouble, now)

    def _count_failed(self, what: What, blocks: int, cause: str) -> None:
        self.counters.add("offload_failures_total", blocks, medium=self.name, what=what, cause=cause)

    def _complain(self, what: What, call: Call) -> None:
        """Once at a warning; a tier that raises does it with every call."""
        why = f"raised {call.error!r}" if call.error is not None else "gave an answer that is none"
        _log.log(10 if self._warned else 30, "The tier %s %s when it was asked for a %s.", self.name, why, what)
        self._warned = True

    def _probe(self, now: float) -> None:
        def over(call: Call) -> None:
            if call.late and call.state == "returned":
                return  # told before
            result = call.value
            usable = not call.late and call.error is None and isinstance(result, ProbeResult) and result.usable
            if not usable:
                self._count_failed("probe", 1, "late" if call.late else "failed")
            self.breaker.probed(usable, self._clock())

        seconds = self.limits.probe_seconds
        if not self._reads.submit(Call(self.tier.probe, now + seconds, over)):
            self.breaker.probed(False, now)

    def _looked(self, call: Call) -> None:
        if not call.over:
            return
        self._looking = False
        if call.late or call.error is not None or not isinstance(call.value, (list, tuple)):
            return
        labelled = [sample for sample in call.value if isinstance(sample, Sample)]
        self._said = [s.labelled(medium=self.name) if "medium" in dict(s.labels) else s for s in labelled]


_NUMBERS: Final = {state: number for number, state in enumerate(STATES)}


def _and_after(
    work: Work,
    check: Callable[[object], Sequence[Any] | None],
    after: Callable[[Sequence[Outcome]], None],
    seconds: float,
) -> object:
    value = work(seconds)
    outcomes = check(value)
    if outcomes is not None:
        after(outcomes)
    return value


def _bytes(items: Sequence[Item]) -> list[int]:
    return [view.nbytes for _, view in items]


def _flags(value: object, count: int) -> Sequence[bool] | None:
    if not isinstance(value, (list, tuple)) or len(value) != count:
        return None
    return value if all(type(each) is bool for each in value) else None


def _outcomes(value: object, count: int) -> Sequence[Outcome] | None:
    if not isinstance(value, (list, tuple)) or len(value) != count:
        return None
    return value if all(type(each) is str and each in OUTCOMES for each in value) else None


def _count(value: object) -> Sequence[int] | None:
    return (value,) if type(value) is int and value >= 0 else None
