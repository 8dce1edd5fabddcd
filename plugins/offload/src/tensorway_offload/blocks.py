"""What becomes of blocks: looked up, loaded, stored, promoted, cascaded, forgotten. The manager without its lock.

May import the core and this dist. What holds rows is a lease, a loan or a job, and a row that anything holds is never
given to another block.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from tensorway.metrics import Counters
from tensorway.offload import EvictionPolicy, LookupResult, OffloadKey, Outcome, PrefixLookup, ReqContext, Ticket
from tensorway_offload.admission import Sightings
from tensorway_offload.index import Index
from tensorway_offload.jobs import Job, Jobs
from tensorway_offload.lending import Lending
from tensorway_offload.lookups import Lookups
from tensorway_offload.lower import Done, Lower
from tensorway_offload.manager_options import ManagerOptions
from tensorway_offload.orders import order_of
from tensorway_offload.requests import GIVEN_UP, Request, Requests, unique
from tensorway_offload.room import Room
from tensorway_offload.shares import Shares
from tensorway_offload.told import Told

#: What an outcome of a promotion or a job is as a cause of `tensorway.offload.CAUSES`.
_LATE = "late"


class Blocks:
    """One thread at a time uses it."""

    def __init__(
        self,
        medium: str,
        capacity: int,
        policy: EvictionPolicy,
        options: ManagerOptions,
        lower: Lower | None,
        counters: Counters,
    ) -> None:
        self._medium, self._options = medium, options
        self._lower, self._counters = lower, counters
        self._index = Index(capacity)
        self._shares = Shares(capacity, options.tenant_share)
        self._order = order_of(policy, self._index)
        self._room = Room(self._index, self._order, self._shares)
        self._requests = Requests(self._index, options.lease_seconds, options.request_seconds)
        self._lookups = Lookups(self._index, self._requests, lower, self._promote, options.pending_seconds)
        self._sightings = Sightings(options.store_threshold, options.sightings)
        self._jobs, self._below = Jobs(), Jobs()
        self._epoch = self._number = 0
        self._now = 0.0
        self.lending = Lending(self._index, int(capacity * options.lend_share), options.lend_seconds)
        self.told = Told(medium, options.events)

    # -- requests

    def request(self, req: ReqContext, now: float) -> Request:
        """What is known of a request, which may be new."""
        self._now = now
        return self._requests.of(req, now)

    def wants_all(self, request: Request) -> bool:
        """Whether lower tiers want what it found, too."""
        return self._lower is not None and self._lower.wants_all(request.req)

    def ended(self, req: ReqContext) -> None:
        """Its leases end; the policy hears of it when its last store has ended."""
        request = self._requests.end(req)
        if request is not None:
            if self._lower is not None:
                self._lower.ended(req)
            self._tell_ended(request)

    def _tell_ended(self, request: Request) -> None:
        if request.over and not request.storing:
            keys = request.all_asked()
            if keys:
                self._order.ended(keys, request.req)

    # -- lookups

    def look(self, keys: Sequence[OffloadKey], req: ReqContext, now: float) -> list[LookupResult]:
        """What is known of each."""
        request = self.request(req, now)
        self._mention(request, keys)
        results = self._lookups.look(keys, request, now, prefix=False)
        for result in set(results):
            self._counters.add("offload_lookups_total", results.count(result), result=result.value)
        return results

    def look_prefix(self, keys: Sequence[OffloadKey], req: ReqContext, now: float) -> PrefixLookup:
        """How many from the first on."""
        request = self.request(req, now)
        self._mention(request, keys)
        ready, later = self._lookups.ready(keys, request, now), 0
        if ready is None:
            results = self._lookups.look(keys, request, now, prefix=True)
            ready = next((i for i, result in enumerate(results) if result is not LookupResult.HIT), len(results))
            later = len(results) - ready
        for result, count in (("hit", ready), ("pending", later), ("miss", len(keys) - ready - later)):
            if count:
                self._counters.add("offload_lookups_total", count, result=result)
        return PrefixLookup(ready, later)

    def touch(self, keys: Sequence[OffloadKey], req: ReqContext, now: float) -> None:
        """The engine had these itself."""
        request, keys = self.request(req, now), unique(keys)
        self._mention(request, keys)
        self._use(request, *self._ready(keys))

    def _mention(self, request: Request, keys: Sequence[OffloadKey]) -> None:
        if self._sightings.counts:
            self._sightings.saw(request.mention(keys))
        else:
            request.hear(keys)

    def _use(self, request: Request, keys: Sequence[OffloadKey], rows: Sequence[int]) -> None:
        fresh = request.use(keys)
        if fresh:
            if len(fresh) < len(keys):
                row_of = dict(zip(keys, rows, strict=True))
                rows = [row_of[key] for key in fresh]
            self._order.used(fresh, rows, request.req)
            self._room.used(fresh)

    def _ready(self, keys: Sequence[OffloadKey]) -> tuple[list[OffloadKey], list[int]]:
        pairs = zip(keys, self._index.find(keys), strict=True)
        found = [(key, row) for key, row in pairs if row is not None and self._index.is_ready(row)]
        return [key for key, _ in found], [row for _, row in found]

    # -- loads

    def begin_load(self, keys: Sequence[OffloadKey], req: ReqContext, now: float) -> tuple[Ticket, list[int]] | None:
        """Hold these; the row of each that was given."""
        request = self.request(req, now)
        once = unique(keys)
        rows = self._index.find(once)
        if self._index.leading(rows) < len(rows):
            return None
        held: list[int] = rows  # type: ignore[assignment]  # all are ready
        self._requests.consume(request, once, held)
        self._use(request, once, held)
        ticket = self._begin("load", once, held, request)
        if len(once) == len(keys):
            return ticket, held
        row_of = dict(zip(once, held, strict=True))
        return ticket, [row_of[key] for key in keys]

    def end_load(self, ticket: Ticket, failed: Collection[OffloadKey]) -> None:
        """Let go of them; what failed is forgotten, unless it has been stored anew in another row."""
        named = frozenset(failed)
        job = self._end(ticket, "load")
        if job is None:
            return
        bad = _among(job, named)
        if bad and job.epoch == self._epoch:
            places = dict(zip(job.keys, job.rows, strict=True))
            lost = [key for key, row in zip(bad, self._index.find(bad), strict=True) if row == places[key]]
            self._index.forget(lost)
            self._requests.unlease({key: places[key] for key in lost})
            self._shares.removed(lost)
            self._order.removed(lost, [places[key] for key in lost])
            self._room.used(lost)  # or, stored anew, they would go as if they were as old as these were
            self._removed(lost, "failed")
            job.request.until.update(dict.fromkeys(bad, GIVEN_UP))
            self._counters.add("offload_failures_total", len(bad), medium=self._medium, what="load", cause="failed")
        self._index.release(job.rows)
        if len(job.keys) > len(bad):
            self._counters.add("offload_loaded_total", len(job.keys) - len(bad), medium=self._medium)

    # -- stores

    def begin_store(
        self, keys: Sequence[OffloadKey], req: ReqContext, now: float
    ) -> tuple[Ticket, Sequence[OffloadKey], list[int], Sequence[OffloadKey]] | None:
        """Reserve rows for those that are not here: the ticket, them, their rows, and what had to go."""
        request, keys = self.request(req, now), unique(keys)
        self._mention(request, keys)
        found = self._index.find(keys)
        missing: Sequence[OffloadKey] = keys
        here: tuple[list[OffloadKey], list[int]] = ([], [])
        if found.count(None) < len(keys):
            missing = [key for key, row in zip(keys, found, strict=True) if row is None]
            here = self._ready(keys)
        new, kept = self._sightings.admitted(missing), frozenset(here[1])
        if len(self._shares.fitting(new)) < len(new) or not self._room.can_have(len(new), kept):
            self._refused(len(new))
            return None
        self._use(request, *here)
        evicted = self._evict_for(new, request, kept)
        if evicted is None:
            self._refused(len(new))
            return None
        rows = self._reserve(new)
        request.storing += 1
        ticket = self._begin("store", new, rows, request)
        if here[0] and self.wants_all(request):
            self._cascade(*here, request)
        return ticket, new, rows, evicted

    def end_store(self, ticket: Ticket, failed: Collection[OffloadKey], now: float) -> None:
        """What succeeded is here, and what failed never was."""
        self._now, named = now, frozenset(failed)
        job = self._end(ticket, "store")
        if job is None:
            return
        if job.late or job.epoch != self._epoch:
            self._index.release(job.rows)
        else:
            bad = _among(job, named)
            good, rows = self._settle(job, bad, for_good=False)
            self._counters.add("offload_stored_total", len(good), medium=self._medium)
            if bad:
                self._counters.add(
                    "offload_failures_total", len(bad), medium=self._medium, what="store", cause="failed"
                )
            if good and self._lower is not None:
                self._cascade(good, rows, job.request)
            self._index.release(job.rows)
        if not job.late:
            self._stored_all(job.request)

    def _refused(self, count: int) -> None:
        self._counters.add("offload_failures_total", count, medium=self._medium, what="store", cause="full")

    def _evict_for(
        self, new: Sequence[OffloadKey], request: Request, kept: frozenset[int] = frozenset()
    ) -> list[OffloadKey] | None:
        if not new:
            return []
        evicted = self._room.make(new, request.req, kept)
        if evicted:
            self._removed(evicted, "evicted")
        return evicted

    def _reserve(self, keys: Sequence[OffloadKey]) -> list[int]:
        self._shares.added(keys)
        return self._index.reserve(keys)

    def _settle(
        self, job: Job, bad: Sequence[OffloadKey], *, for_good: bool
    ) -> tuple[Sequence[OffloadKey], Sequence[int]]:
        """Of a job that wrote rows: forget what failed, publish the rest, and tell who waits; what is here now."""
        good, rows = job.keys, job.rows
        if bad:
            self._discard(bad, for_good=for_good)
            lost = frozenset(bad)
            pairs = [(key, row) for key, row in zip(good, rows, strict=True) if key not in lost]
            good, rows = [key for key, _ in pairs], [row for _, row in pairs]
        if good:
            self._index.publish(rows)
            job.request.took(good)
            self._order.stored(good, rows, job.request.req)
            self.told.add("stored", good)
            self._lookups.arrived(good, rows, self._now)
        return good, rows

    def _discard(self, keys: Sequence[OffloadKey], *, for_good: bool) -> None:
        """These were being written, and do not come: nobody has ever heard of them."""
        self._index.forget(keys)
        self._shares.removed(keys)
        self._lookups.failed(keys, for_good=for_good)

    def _stored_all(self, request: Request) -> None:
        request.storing -= 1
        self._tell_ended(request)

    # -- lower tiers

    def _promote(self, keys: Sequence[OffloadKey], request: Request) -> Sequence[OffloadKey]:
        """Begin to read as many of these as the request may have rows for."""
        assert self._lower is not None
        index = self._index
        budget = max(1, int(index.capacity * self._options.promote_share))
        most = min(budget - request.leased - request.promoting, index.free + index.idle)
        some = self._shares.fitting(keys[: max(0, most)])
        if not some or self._evict_for(some, request) is None:
            return ()
        rows = self._reserve(some)
        request.promoting += len(rows)
        number = self._lower.promote(list(zip(some, rows, strict=True)), request.req)
        self._below.begin(number, self._job("promoted", some, rows, request))
        return some

    def _cascade(self, keys: Sequence[OffloadKey], rows: Sequence[int], request: Request) -> None:
        """Begin to write these to lower tiers; they stay until that has ended."""
        assert self._lower is not None
        number = self._lower.cascade(list(zip(keys, rows, strict=True)), request.req)
        if number is not None:
            self._index.hold(rows)
            self._below.begin(number, self._job("cascaded", keys, rows, request))

    def _done(self, done: Done) -> None:
        job = self._below.get(done.job)
        if job is None:
            return
        self._below.end(done.job)
        if job.what == "promoted":
            job.request.promoting -= len(job.rows)
            if not job.late and job.epoch == self._epoch:
                bad = [key for key in job.keys if done.outcomes.get(key, "failed") != "done"]
                good, _ = self._settle(job, bad, for_good=True)
                self._counters.add("offload_stored_total", len(good), medium=self._medium)
                self._count_failed([done.outcomes.get(key, "failed") for key in bad])
        self._index.release(job.rows)

    def _count_failed(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in set(outcomes):
            self._counters.add(
                "offload_failures_total", outcomes.count(outcome), medium=self._medium, what="promote", cause=outcome
            )

    # -- time, and the end

    def poll(self, now: float) -> None:
        """Take in what tiers have done, and give up what is overdue."""
        self._now = now
        if self._lower is not None:
            for done in self._lower.poll():
                self._done(done)
        self.expire(now)
        for req in self._requests.silent(now):
            self.ended(req)

    def expire(self, now: float) -> None:
        """Give up what is overdue."""
        self._now = now
        expired = self._requests.expired(now)
        if expired:
            self._counters.add("offload_leases_expired_total", expired)
        self.lending.expired(now)
        for job in (*self._jobs.overdue(now), *self._below.overdue(now)):
            self._give_up(job)

    def _give_up(self, job: Job) -> None:
        """Nobody waits for it any more, and its rows stay held until it ends."""
        what = {"promoted": "promote", "cascaded": "cascade"}.get(job.what, job.what)
        self._counters.add("offload_failures_total", len(job.keys), medium=self._medium, what=what, cause=_LATE)
        if job.what in ("store", "promoted") and job.epoch == self._epoch:
            self._discard(job.keys, for_good=job.what == "promoted")
        if job.what == "store":
            self._stored_all(job.request)

    def reset(self) -> None:
        """Forget everything; rows that are held stay out of use until they are let go."""
        self._epoch += 1
        self._requests.reset()
        self._lookups.reset()
        self._index.clear()
        self._shares.reset()
        self._room.reset()
        self._sightings.reset()
        self._order.reset()
        self.told.add("cleared")
        if self._lower is not None:
            self._lower.reset()

    def count(self, gauges: Counters) -> None:
        """What is here now."""
        index, medium = self._index, self._medium
        ready = index.present - index.reserved
        states = {"ready": index.idle, "used": ready - index.idle, "writing": index.reserved, "quarantined": index.gone}
        for state, blocks in states.items():
            gauges.set("offload_blocks", blocks, medium=medium, state=state)
        gauges.set("offload_capacity_blocks", index.capacity, medium=medium)
        for name, blocks in self._shares.rows.items():
            gauges.add("offload_tenant_blocks", blocks, medium=medium, tenant=name.hex() if any(name) else "none")

    # -- jobs

    def _begin(
        self, what: Literal["load", "store"], keys: Sequence[OffloadKey], rows: Sequence[int], request: Request
    ) -> Ticket:
        self._number += 1
        self._jobs.begin(self._number, self._job(what, keys, rows, request))
        return Ticket(self._epoch, self._number)

    def _job(
        self,
        what: Literal["load", "store", "promoted", "cascaded"],
        keys: Sequence[OffloadKey],
        rows: Sequence[int],
        request: Request,
    ) -> Job:
        return Job(what, keys, rows, request, self._epoch, self._now + self._options.ticket_seconds)

    def _end(self, ticket: Ticket, what: Literal["load", "store"]) -> Job | None:
        job = self._jobs.get(ticket.number)
        if job is None or job.what != what or job.epoch != ticket.epoch:
            return None
        self._jobs.end(ticket.number)
        return job

    def _removed(self, keys: Sequence[OffloadKey], cause: str) -> None:
        if keys:
            self.told.add("removed", keys, cause)
            self._counters.add("offload_removed_total", len(keys), medium=self._medium, cause=cause)


def _among(job: Job, failed: frozenset[OffloadKey]) -> list[OffloadKey]:
    """Which keys of a job have failed; what else was named does not matter."""
    return [key for key in job.keys if key in failed] if failed else []
