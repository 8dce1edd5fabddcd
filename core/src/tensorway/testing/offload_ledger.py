"""What a manager must have answered: a second set of books, kept beside it from its contract alone.

Room `testing`; may import `offload` and the rooms below. `Ledger` makes each call and compares. Where the contract
leaves a manager free, such as how long a lease lasts that was used, the books have two columns: what must be so, and
what may be.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from typing import Final

import attrs

from tensorway.offload import (
    LookupResult,
    OffloadingManager,
    OffloadKey,
    PrepareLoadOutput,
    PrepareStoreOutput,
    ReqContext,
    Ticket,
)

#: Seconds that a lease lasts at least, whatever the options are.
_LEASE: Final = 0.5
_PENDING: Final = {LookupResult.MISS, LookupResult.HIT_PENDING, LookupResult.RETRY}


@attrs.define
class _Job:
    """A load or store that was prepared."""

    ticket: Ticket
    #: The rows that it keeps, as life numbers of what they hold, by key.
    rows: dict[OffloadKey, int]
    stores: bool
    #: A reset came; its rows are kept until it is completed all the same.
    stale: bool = False


class Ledger:
    """The books of one manager that has no tiers below it, admits everything, and has no quotas."""

    def __init__(self, manager: OffloadingManager, capacity: int) -> None:
        self.manager, self.capacity = manager, capacity
        #: What can be looked up, by key: which life of it this is.
        self.ready: dict[OffloadKey, int] = {}
        self.jobs: list[_Job] = []
        self._begun: set[str] = set()
        self._leases: dict[str, dict[OffloadKey, float]] = {}
        #: Rows of blocks that were forgotten while a request had leased them: they may be kept until it ends.
        self._limbo: dict[str, set[int]] = {}
        #: What events have told so far.
        self._told: set[OffloadKey] = set()
        self._lives = 0

    # -- what is there

    @property
    def reserved(self) -> set[OffloadKey]:
        """What is being stored."""
        return {key for job in self.jobs if job.stores and not job.stale for key in job.rows}

    def _pinned(self) -> set[int]:
        return {life for job in self.jobs for life in job.rows.values()}

    def _leased(self) -> tuple[set[OffloadKey], set[OffloadKey]]:
        """What must be leased, and what may be."""
        now = time.monotonic()
        held = [(key, since) for keys in self._leases.values() for key, since in keys.items() if key in self.ready]
        return {key for key, since in held if now - since < _LEASE}, {key for key, _ in held}

    # -- calls

    def begin(self, req: ReqContext) -> None:
        """The request is there, unless it is already."""
        if req.request not in self._begun:
            self._begun.add(req.request)
            assert self.manager.begins(req) in ("new", "all")

    def look_up(self, keys: Sequence[OffloadKey], req: ReqContext) -> list[LookupResult]:
        """All three ways, which agree."""
        self.begin(req)
        found = self.manager.lookup_many(keys, req)
        assert len(found) == len(keys), f"{len(found)} answers for {len(keys)} keys"
        reserved = self.reserved
        for key, result in zip(keys, found, strict=True):
            if key in self.ready:
                assert result is LookupResult.HIT, f"{result} for a block that is there"
                self._leases.setdefault(req.request, {})[key] = time.monotonic()
            elif key in reserved:
                assert result in _PENDING, f"{result} for a block that is being stored"
                # Who waits for a block may be given a lease of it when it comes.
                self._leases.setdefault(req.request, {}).setdefault(key, 0.0)
            else:
                assert result is LookupResult.MISS, f"{result} for a block that is not there"
        leading = next((at for at, key in enumerate(keys) if key not in self.ready), len(keys))
        prefix = self.manager.lookup_prefix(keys, req)
        assert prefix.ready == leading, f"{prefix} of a prefix of {leading} blocks"
        assert prefix.later == 0 or keys[leading] in reserved, f"{prefix}, and nothing is to come"
        if keys:
            one = self.manager.lookup(keys[0], req)
            assert (one is LookupResult.HIT) == (found[0] is LookupResult.HIT), f"alone it is {one}"
        return found

    def prepare_load(self, keys: Sequence[OffloadKey], req: ReqContext) -> PrepareLoadOutput | None:
        """Each key once."""
        self.begin(req)
        out = self.manager.prepare_load(keys, req)
        if not all(key in self.ready for key in keys):
            assert out is None, "a block that is not there was prepared"
            return None
        assert out is not None, "all of it is there, and it was not prepared"
        assert len(out.source) == len(keys), f"{len(out.source)} places for {len(keys)} blocks"
        self._new_ticket(out.ticket)
        self.jobs.append(_Job(out.ticket, {key: self.ready[key] for key in keys}, stores=False))
        for key in keys:  # it may have been used up, so that it must not last any more
            if key in self._leases.get(req.request, ()):
                self._leases[req.request][key] = 0.0
        return out

    def prepare_store(self, keys: Sequence[OffloadKey], req: ReqContext) -> PrepareStoreOutput | None:
        """As many as are not there, or none."""
        self.begin(req)
        there = {*self.ready, *self.reserved}
        new = [key for key in dict.fromkeys(keys) if key not in there]
        pinned, (must, may) = self._pinned(), self._leased()
        # Rows that hold what can be looked up, and rows of jobs that hold something else.
        in_use = {*self.ready.values(), *pinned}
        most = self.capacity - len(in_use)
        free = most - len(set().union(*self._limbo.values()) - in_use)
        idle = {key for key, life in self.ready.items() if life not in pinned and key not in keys}
        out = self.manager.prepare_store(keys, req)
        if out is None:
            assert len(new) > free + len(idle - may), f"refused, with {free} free and {len(idle - may)} to evict"
            return None
        assert list(out.keys) == new, f"{len(out.keys)} are to be stored, of {len(new)} that are not there, or others"
        assert len(out.target) == len(new), f"{len(out.target)} places for {len(new)} blocks"
        gone = list(out.evicted)
        assert len(gone) == len(set(gone)), "a block was evicted twice"
        assert set(gone) <= set(self.ready), "what was not there was evicted"
        assert set(gone) <= idle, "what was offered or is in use was evicted"
        assert not set(gone) & must, "what is leased was evicted"
        enough = range(max(0, len(new) - most), max(0, len(new) - free) + 1)
        assert len(gone) in enough, f"{len(gone)} were evicted for {len(new)}, with {most} free"
        for key in gone:
            self._forget(key)
        self._new_ticket(out.ticket)
        self.jobs.append(_Job(out.ticket, {key: self._life() for key in new}, stores=True))
        return out

    def complete(self, job: _Job, failed: Collection[OffloadKey] = ()) -> None:
        """A job has ended."""
        call = self.manager.complete_store if job.stores else self.manager.complete_load
        call(job.ticket, failed)
        self.jobs.remove(job)
        if job.stale:
            return
        for key, life in job.rows.items():
            if job.stores and key not in failed:
                self.ready[key] = life
            elif not job.stores and key in failed and self.ready.get(key) == life:
                for request in [name for name, keys in self._leases.items() if key in keys]:
                    self._limbo.setdefault(request, set()).add(life)
                self._forget(key)

    def failing(self, job: _Job) -> list[OffloadKey]:
        """What of a job can be said to have failed: what it reads may have gone already, and come anew."""
        return [key for key, life in job.rows.items() if job.stores or self.ready.get(key) == life]

    def end(self, req: ReqContext) -> None:
        """The request is over."""
        self._begun.discard(req.request)
        self.manager.ended(req)
        self._leases.pop(req.request, None)
        self._limbo.pop(req.request, None)

    def reset(self) -> None:
        """Everything is forgotten; rows that are copied from or to are not free for it."""
        self.manager.reset()
        self.ready.clear()
        self._leases.clear()
        self._limbo.clear()
        for job in self.jobs:
            job.stale = True

    # -- comparing

    def compare_events(self) -> None:
        """What events told is what is there; each change once, in an order that can have been."""
        for event in self.manager.take_events():
            keys = set(event.keys)
            assert len(keys) == len(event.keys), f"{event} names a block twice"
            if event.what == "stored":
                assert not keys & self._told, "what was there was stored"
                self._told |= keys
            elif event.what == "removed":
                assert event.cause, f"{event} says no cause"
                assert keys <= self._told, "what was not there was removed"
                self._told -= keys
            else:
                self._told.clear()
        assert self._told == set(self.ready), "what events told is not what is there"
        assert [] == self.manager.take_events(), "what was told is told again"

    def settle(self, requests: Iterable[ReqContext]) -> None:
        """All is completed and over; then all rows can be used."""
        for job in list(self.jobs):
            self.complete(job)
        for req in requests:
            self.end(req)
        self.manager.poll()
        self.compare_events()

    def _new_ticket(self, ticket: Ticket) -> None:
        assert ticket not in [job.ticket for job in self.jobs], f"{ticket} is out already"

    def _life(self) -> int:
        self._lives += 1
        return self._lives

    def _forget(self, key: OffloadKey) -> None:
        del self.ready[key]
        for keys in self._leases.values():
            keys.pop(key, None)
