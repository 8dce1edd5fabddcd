"""One rebalance of one rank: fetch, verify, agree, commit, layer by layer, with an end by the deadline.

May import the core and its own dist. A layer commits whole or not at all, and alike on all survivors; `agreement` says
when. Nobody waits for a dead member longer than its patience, and nobody waits longer than the deadline.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Final, Protocol

import attrs
import msgspec

from tensorway._logging import logger
from tensorway.decoding import UNREADABLE
from tensorway.eplb import Failed, Fetch, Filled, PeerFailed, Send, Session, Staging
from tensorway.eplb.contract import Control, Event
from tensorway.errors import DeadlineExceeded, PeerLost, PlacementInvalid, StagingFull
from tensorway_eplb.agreement import Agreement, Decision, Report, Status
from tensorway_eplb.arrivals import Arrivals, CopySource, Counts, Supply
from tensorway_eplb.placement import EMPTY, Map, Placement
from tensorway_eplb.plan import LayerPlan, TransferPlan
from tensorway_eplb.rows import Digests, Rows
from tensorway_eplb.stalls import Stalls

_log = logger("eplb")
#: The longest that one look waits for a fetch, before the others are heard again.
_LOOK: Final = 1e-3
#: How long one report may wait for a member that does not take it; it is sent again anyway.
_TELLING: Final = 0.05
#: After the deadline: for the last reports of those that are alive.
_GRACE: Final = 0.4
#: A fetch gets this, and its bytes at this rate, and never more than what the cycle has left.
_BASE_SECONDS: Final = 5.0
_SLOWEST: Final = 10e6
#: Signs of life within a member's patience.
_BEATS: Final = 4
_DECODE_REPORT: Final = msgspec.msgpack.Decoder(Report).decode


class Pending(Protocol):
    """A commit that an engine does later, on a thread of its own."""

    @property
    def done(self) -> bool:
        """Whether rows and map are the new ones."""
        ...

    def withdraw(self) -> bool:
        """Take it back; False if it is done, or being done."""
        ...


class Engine(Protocol):
    """What an engine does for a rebalance."""

    def commit(self, layer: int, experts: Map, write: Callable[[], None]) -> Pending | None:
        """Take over a layer: call `write`, which makes this rank's rows the new ones, and use the map from then on.

        `experts` says which logical expert each slot of the group holds now. Rows and map must change together for
        whatever computes with them. An engine that can do so only later returns what says when it has.
        """
        ...


class Cause(Enum):
    """Why a layer kept its old weights, as counters tell it; `Outcome.aborted` says it in words."""

    NOT_BEGUN = "not_begun"  # a rank was lost before all had begun
    ROWS = "rows"  # a row could not be had here, or not as it was loaded
    DEADLINE = "deadline"  # rows were not here in time
    ENGINE = "engine"  # agreed, but the engine did not take it over in time
    CANCELLED = "cancelled"
    LOST = "lost"  # with the lost members, an expert would be lost
    EXCLUDED = "excluded"  # the others went on without this rank
    ELSEWHERE = "elsewhere"  # another member gave it up; its counters say why


@attrs.frozen
class Outcome:
    """What became of a cycle here. Survivors of one group have the same layers committed."""

    committed: tuple[int, ...]
    #: Layer, and why it kept its old weights.
    aborted: Mapping[int, str]
    #: Rank, and why it is lost.
    lost: Mapping[int, str]
    counts: Counts
    #: Seconds waiting for all to begin, moving and agreeing, committing, and for all to end; and those of the stalls.
    seconds: Mapping[str, float]
    #: Who went on without this rank; None if nobody did.
    excluded_by: int | None = None
    #: Of each layer that was aborted.
    causes: Mapping[int, Cause] = attrs.field(factory=dict)
    #: How often nothing happened for long while rows were to come.
    stalls: int = 0
    #: Rank, and what became of it, of members that are gone and had their part in this cycle before.
    left: Mapping[int, str] = attrs.field(factory=dict)


@attrs.frozen(eq=False)
class Terms:
    """What a cycle works with, besides its plan."""

    session: Session
    control: Control
    staging: Staging
    rows: Rows
    engine: Engine
    epoch: int
    cycle: int
    me: int
    digests: Digests | None = None
    source: CopySource | None = None
    #: A member that is silent for so long is lost.
    patience: float = 2.0
    #: Set it, and no layer is begun any more; those that were are decided.
    stop: threading.Event = attrs.field(factory=threading.Event)


class Cycle:
    """Made for one plan, run once."""

    def __init__(self, plan: TransferPlan, terms: Terms, deadline: float) -> None:
        self.plan, self.terms = plan, terms
        self._mine = plan.rank(terms.me)
        if self._mine.staging_rows > terms.staging.rows:
            raise StagingFull(
                f"A rebalance of {len(plan.layers)} layers was asked for.",
                f"One layer brings {self._mine.staging_rows} rows, and staging has {terms.staging.rows}.",
                "Give staging more rows, or go in waves: tensorway_eplb.waves.",
            )
        self._began = time.monotonic()
        self._until = self._began + deadline
        self._patience = min(terms.patience, deadline / 3)
        self._agreement = Agreement(plan.old.ranks, terms.me, plan.layers, self._survivable)
        self._left = list(self._mine.layers)
        self._open: dict[int, Arrivals] = {}
        self._heard = dict.fromkeys(set(range(plan.old.ranks)) - {terms.me}, self._began)
        self._started: set[int] = set()
        self._ended: set[int] = set()
        self._lost: dict[int, str] = {}
        self._left_after: dict[int, str] = {}
        self._committed: list[int] = []
        self._aborted: dict[int, str] = {}
        self._causes: dict[int, Cause] = {}
        self._stalls = Stalls()
        self._told = (0.0, bytes(len(plan.layers)), frozenset[int]())
        self._committing = 0.0
        self._pending: dict[int, Pending] = {}
        self._decided: dict[int, Decision] = {}
        self._next = 0
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="tensorway-eplb-load")
        self._supply = Supply(
            terms.session, terms.staging, terms.rows, plan.old, terms.digests, terms.source, self._loader, terms.cycle,
            lambda: self._agreement.view, self._seconds, self._row_bytes, Counts(),
        )  # fmt: skip
        self._row_nbytes = {layer: terms.rows.nbytes(layer) for layer in plan.layers}

    def run(self) -> Outcome:
        """Returns when every layer is decided here, and the others know; by the deadline and a little."""
        seconds: dict[str, float] = {}
        try:
            self._begin()
            seconds["begin"] = time.monotonic() - self._began
            while (self._pending or self._next < len(self.plan.layers)) and self._agreement.excluded_by is None:
                self._step()
            if self._agreement.excluded_by is not None:
                self._agreement.abandon("the others went on without this rank")
                self._settle()
                while self._pending:
                    self._take_over()
                    time.sleep(_LOOK)
            seconds["move"] = time.monotonic() - self._began - seconds["begin"] - self._committing
            self._end()
        finally:
            for arrivals in list(self._open.values()):
                self._release(arrivals)
            self._loader.shutdown(wait=False, cancel_futures=True)
        seconds["commit"] = self._committing
        seconds["end"] = time.monotonic() - self._began - sum(seconds.values())
        seconds["stalled"] = self._stalls.seconds
        return Outcome(
            tuple(sorted(self._committed)), dict(sorted(self._aborted.items())), dict(sorted(self._lost.items())),
            self._supply.counts, seconds, self._agreement.excluded_by, dict(sorted(self._causes.items())),
            self._stalls.count, self._left_after,
        )  # fmt: skip

    # -- phases

    def _begin(self) -> None:
        """Wait until every member has begun with the same plan: before that its rows may not be what the plan says."""
        layers = self._mine.layers
        fetches = [
            Fetch(layer.layer, rows.peer, rows.slots, rows.experts, self.terms.cycle)
            for layer in layers
            for rows in layer.fetches
        ]
        sends = [send for layer in layers for send in self._sends(layer)]
        self.terms.session.begin(self.terms.cycle, fetches, sends)
        while waiting := self._agreement.alive - self._started - {self.terms.me}:
            self._tell()
            self._hear(self.terms.session.poll(_LOOK))
            if self._agreement.excluded_by is not None:
                return
            if time.monotonic() >= self._until:
                for rank in waiting:
                    self._lose(rank, "it did not begin in time")
        if self._agreement.view:  # nothing has moved yet: better to plan anew, without who is lost
            self._give_up(self.plan.layers, Cause.NOT_BEGUN, "not every rank began")
        self._heard = dict.fromkeys(self._heard, time.monotonic())

    def _step(self) -> None:
        listened = time.monotonic()
        self._hear(self.terms.session.poll(0.0 if self._post() else _LOOK))
        for arrivals in list(self._open.values()):
            arrivals.look()
            if arrivals.failed:
                self._give_up([arrivals.layer], Cause.ROWS, arrivals.failed)
            elif not arrivals.missing:
                self._agreement.ready(arrivals.layer)
        if self.terms.stop.is_set():
            self._give_up(self.plan.layers, Cause.CANCELLED, "the rebalance was cancelled")
        self._tell()  # while rows are written here, the others can go on
        self._settle()
        self._take_over()
        self._miss(listened)
        self._stalls.look(self._progress(), self._waits_for)
        self._tell()

    def _give_up(self, layers: Iterable[int], cause: Cause, why: str) -> None:
        for layer in layers:
            if self._agreement.status(layer) is Status.WORKING:  # what is ready, the group decides
                self._causes[layer] = cause
                self._agreement.give_up(layer, why)

    def _post(self) -> bool:
        """Begin the next layer in the plan's order, if communicator and staging allow one more.

        Only one: where a fetch is a copy, it is done when it is posted, and the others should hear of it at once.
        """
        limit = self.terms.session.capabilities.max_layers_in_flight
        while self._left and len(self._open) < limit:
            layer = self._left[0]
            if self._agreement.status(layer.layer) >= Status.COMMITTED:  # another member gave it up before we began
                self._left.pop(0)
                continue
            try:
                arrivals = Arrivals(layer, self._supply)
            except StagingFull:
                return False  # a layer that is decided gives rows back
            self._left.pop(0)
            self._open[layer.layer] = arrivals
            for send in self._sends(layer):
                if send.peer not in self._agreement.view:
                    self.terms.session.serve(send, self._until - time.monotonic())
            arrivals.start()
            return True
        return False

    def _settle(self) -> None:
        """Do what was decided."""
        self._decided.update((decision.layer, decision) for decision in self._agreement.decisions())
        # In the plan's order, so that engines that take layers over later find the same sequence on every rank.
        while self._next < len(self.plan.layers) and self.plan.layers[self._next] in self._decided:
            decision = self._decided[self.plan.layers[self._next]]
            self._next += 1
            arrivals = self._open.get(decision.layer)
            if decision.commit and arrivals is not None:
                started = time.monotonic()
                pending = self.terms.engine.commit(decision.layer, self.plan.new.map[decision.layer], arrivals.write)
                self._committing += time.monotonic() - started
                if pending is not None:
                    self._pending[decision.layer] = pending
                    continue
                self._committed.append(decision.layer)
            else:
                self._aborted[decision.layer] = decision.why
                self._causes.setdefault(decision.layer, self._cause_elsewhere(decision.layer))
            if arrivals is not None:
                self._release(arrivals)

    def _take_over(self) -> None:
        """Layers that the engine has taken over meanwhile; and none that it has not, once the time is up."""
        late = time.monotonic() >= self._until + _GRACE
        for layer, pending in list(self._pending.items()):
            if not pending.done:
                if not late or not pending.withdraw():
                    continue
                self._aborted[layer], self._causes[layer] = "the engine did not take it over in time", Cause.ENGINE
            else:
                self._committed.append(layer)
            del self._pending[layer]
            self._release(self._open[layer])

    def _miss(self, listened: float) -> None:
        """Members that were silent until this one listened last, and what to do when the time is up."""
        now = time.monotonic()
        for rank, heard in self._heard.items():
            if rank in self._agreement.alive - self._ended and listened - heard > self._patience:
                self._lose(rank, f"it was silent for {self._patience:.1f} s")
        if now < self._until:
            return
        self._give_up(self.plan.layers, Cause.DEADLINE, "it was not there by the deadline")
        if now >= self._until + _GRACE:
            for rank in self._agreement.waiting_for():
                self._lose(rank, "it did not agree in time")

    def _progress(self) -> tuple[int, int, int]:
        counts = self._supply.counts
        return counts.fetched_rows + counts.loaded_rows, self._next, len(self._committed)

    def _waits_for(self) -> str:
        if self._pending:
            return f"the engine has not taken over {len(self._pending)} layers"
        missing = sum(len(arrivals.missing) for arrivals in self._open.values())
        others = sorted(self._agreement.waiting_for())
        return f"{missing} rows are under way here, and these ranks are waited for: {others}"

    def _end(self) -> None:
        """Stay until the others have decided as well: they may need to hear what this member knows."""
        until = min(max(self._until, time.monotonic()) + _GRACE, time.monotonic() + self._patience)
        while self._agreement.alive - self._ended - {self.terms.me} and time.monotonic() < until:
            if self._agreement.excluded_by is not None:
                return
            self._tell()
            self._hear(self.terms.session.poll(_LOOK))
        self._tell()

    # -- others

    def _hear(self, events: list[Event]) -> None:
        # Reports first: a member that had its part and leaves has said so before it was gone.
        for rank, payload in self.terms.control.receive():
            self._hear_report(rank, payload)
        for event in events:
            if isinstance(event, PeerFailed):
                if event.peer in self._ended:
                    self._left_after[event.peer] = event.why
                else:
                    self._lose(event.peer, event.why)
                continue
            if isinstance(event, Failed | Filled) and (arrivals := self._open.get(event.fetch.layer)) is not None:
                if isinstance(event, Filled):
                    arrivals.filled(event.fetch)
                else:
                    arrivals.fetch_failed(event.fetch, event.why, event.released)
            settle_event(event, self.terms.staging)

    def _hear_report(self, rank: int, payload: bytes) -> None:
        report = decode(payload)
        if report is None or report.epoch != self.terms.epoch or report.cycle < self.terms.cycle:
            return
        self._heard[rank] = time.monotonic()
        if rank not in self._started:
            self._started.add(rank)
            self._send(rank, self._report())  # what we said first, it may have heard as news of a cycle to come
        if report.cycle > self.terms.cycle:  # it has ended this cycle, and begun the next one
            self._ended.add(rank)
            return
        if report.plan != self.plan.digest:
            raise PlacementInvalid(
                f"A rebalance was begun with the plan {self.plan.digest[:12]}.",
                f"Rank {rank} follows the plan {report.plan[:12]}: it started from, or aims at, another placement.",
                "Give every rank the same loads, policy and options; regroup to start from one placement.",
            )
        self._agreement.hear(rank, report.view, report.statuses)
        if all(status >= Status.COMMITTED for status in report.statuses):
            self._ended.add(rank)
        for lost in sorted(self._agreement.view - self._lost.keys()):
            self._lose(lost, f"rank {rank} says so")

    def _tell(self) -> None:
        """Report to everybody, if there is something new or it is time for a sign of life."""
        when, statuses, view = self._told
        now, mine = time.monotonic(), bytes(self._agreement.statuses)
        ready = any(before == Status.WORKING != after for before, after in zip(statuses, mine, strict=True))
        ended = self._agreement.finished and mine != statuses
        if not (ready or ended or view != self._agreement.view or now - when > self._patience / _BEATS):
            return
        grown = self._agreement.view - view  # who is lost is told so, once
        self._told = (now, mine, self._agreement.view)
        payload = self._report()
        for rank in sorted((self._agreement.alive | grown) - {self.terms.me}):
            self._send(rank, payload)

    def _report(self) -> bytes:
        lost, statuses = tuple(sorted(self._agreement.view)), bytes(self._agreement.statuses)
        return msgspec.msgpack.encode(Report(self.terms.epoch, self.terms.cycle, self.plan.digest, lost, statuses))

    def _send(self, rank: int, payload: bytes) -> None:
        try:
            self.terms.control.send(rank, payload, _TELLING)
        except DeadlineExceeded as error:
            _log.debug("Rank %d did not take a report: %s", rank, error.true)
        except PeerLost as error:
            self._lose(rank, error.true)

    def _lose(self, rank: int, why: str) -> None:
        if rank == self.terms.me or rank in self._lost:
            return
        self._lost[rank] = why
        _log.warning("Rank %d is lost to this rebalance: %s", rank, why)
        self._agreement.lose(rank)
        for arrivals in self._open.values():
            if under_way := arrivals.lose(rank):
                self.terms.session.cancel(under_way, f"rank {rank} is lost: {why}")

    # -- small

    def _cause_elsewhere(self, layer: int) -> Cause:
        """Of a layer that was not given up here."""
        if self._agreement.excluded_by is not None:
            return Cause.EXCLUDED
        return Cause.ELSEWHERE if self._survivable(layer, self._agreement.view) else Cause.LOST

    def _release(self, arrivals: Arrivals) -> None:
        del self._open[arrivals.layer]
        if under_way := arrivals.release():
            self.terms.session.cancel(under_way, "the layer is decided")

    def _sends(self, layer: LayerPlan) -> list[Send]:
        return [Send(layer.layer, rows.peer, rows.slots, self.terms.cycle) for rows in layer.sends]

    def _seconds(self, nbytes: int) -> float:
        return max(1e-3, min(self._until - time.monotonic(), _BASE_SECONDS + nbytes / _SLOWEST))

    def _row_bytes(self, layer: int) -> int:
        return self._row_nbytes[layer]

    def _survivable(self, layer: int, lost: frozenset[int]) -> bool:
        """Whether no expert that the survivors hold now would be gone with the new layer."""
        before, after = (_held(placement, layer, lost) for placement in (self.plan.old, self.plan.new))
        return before <= after


def settle_event(event: Event, staging: Staging) -> None:
    """Rows that a fabric has let go of are free again, whatever cycle they were of."""
    if not isinstance(event, PeerFailed) and hasattr(event, "fetch") and getattr(event, "released", True):
        staging.drained(event.fetch.rows)


def decode(payload: bytes) -> Report | None:
    """A report, or None for what is none."""
    try:
        return _DECODE_REPORT(payload)
    except UNREADABLE:
        return None


def _held(placement: Placement, layer: int, lost: frozenset[int]) -> set[int]:
    rows = placement.by_rank[layer]
    return {int(expert) for rank, row in enumerate(rows) if rank not in lost for expert in row if expert != EMPTY}
