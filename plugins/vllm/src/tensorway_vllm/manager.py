"""vLLM's manager over ours: its calls are for one key and without tickets, ours for many and with them.

May import vllm, the core and this package. It is called in the scheduler's process, by one thread, and never waits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Final

import attrs
import vllm.v1.kv_offload.base as theirs

from tensorway._logging import logger
from tensorway.offload import (
    METRICS,
    LookupResult,
    OffloadingManager,
    OffloadKey,
    ReqContext,
    Ticket,
    key_group,
    key_hash,
    make_offload_key,
)
from tensorway_vllm import metrics, sources
from tensorway_vllm.counting import Counting
from tensorway_vllm.words import Carried, Outcome

_log = logger("vllm")
_FOUND: Final = {
    LookupResult.HIT: theirs.LookupResult.HIT,
    LookupResult.MISS: theirs.LookupResult.MISS,
    LookupResult.HIT_PENDING: theirs.LookupResult.HIT_PENDING,
    LookupResult.RETRY: theirs.LookupResult.RETRY,
}


@attrs.define
class _Open:
    """A load or store that vLLM has not completed."""

    ticket: Ticket
    keys: list[OffloadKey]
    store: bool
    failed: set[OffloadKey] = attrs.field(factory=set)
    #: Workers that have ended it, for those that vLLM has forgotten in a reset.
    ended: int = 0


@attrs.frozen
class _Request:
    """What is kept of a request in vLLM's own context of it."""

    req: ReqContext


class ManagerAdapter(theirs.OffloadingManager):
    """See `vllm.v1.kv_offload.base.OffloadingManager`."""

    def __init__(self, manager: OffloadingManager, workers: int, groups: dict[int, int], events: bool) -> None:
        """`groups`: places of vLLM's cache groups among those that are offloaded; `events`: whether vLLM takes them."""
        self.manager = manager
        self._workers, self._groups, self._events = workers, groups, events
        self._original = {place: group for group, place in groups.items()}
        self._open: dict[int, _Open] = {}
        #: Those of before a reset, whose rows are free when all workers have ended them.
        self._forgotten: dict[int, _Open] = {}
        #: Numbers of tickets: of each key that is being stored, and of each request's loads.
        self._stores: dict[OffloadKey, int] = {}
        self._loads: dict[str, list[int]] = {}
        self._numbers = 0
        self._counting = Counting(manager.statistics, METRICS)

    def _key(self, key: theirs.OffloadKey) -> OffloadKey:
        """Ours of theirs. Tenants are in vLLM's hash already, which begins with the request's salt."""
        return make_offload_key(theirs.get_offload_block_hash(key), self._groups[theirs.get_offload_group_idx(key)])

    def _back(self, key: OffloadKey) -> theirs.OffloadKey:
        return theirs.make_offload_key(key_hash(key), self._original[key_group(key)])

    def on_new_request(self, req_context: theirs.ReqContext) -> theirs.RequestOffloadingContext:
        """A request is there."""
        everything = self.manager.begins(_req(req_context)) == "all"
        policy = theirs.OffloadPolicy.REQUEST_LEVEL if everything else theirs.OffloadPolicy.CHUNK_LEVEL
        return theirs.RequestOffloadingContext(policy=policy)

    def lookup(self, key: theirs.OffloadKey, req_context: theirs.ReqContext) -> theirs.LookupResult:
        """What is known of a block."""
        return _FOUND[self.manager.lookup(self._key(key), _req(req_context))]

    def get_load_source(self, key: theirs.OffloadKey, req_context: theirs.ReqContext) -> Any:
        """All is loaded from host memory; asked by vLLM 0.32 and newer."""
        return sources.HOST

    def touch(self, keys: Collection[theirs.OffloadKey], req_context: theirs.ReqContext) -> None:
        """The engine had these itself."""
        self.manager.touch([self._key(key) for key in keys], _req(req_context))

    def prepare_load(self, keys: Collection[theirs.OffloadKey], req_context: theirs.ReqContext) -> Carried:
        """Where they are. vLLM takes no no for an answer: for what is gone, a load is begun that fails."""
        ours, req = [self._key(key) for key in keys], _req(req_context)
        prepared = self.manager.prepare_load(ours, req)
        if prepared is None:
            _log.warning("Blocks of request %s went between lookup and load; their load will fail.", req.request)
            self._numbers += 1
            return Carried(self._numbers, None)
        number = self._opened(_Open(prepared.ticket, ours, store=False))
        self._loads.setdefault(req.request, []).append(number)
        return Carried(number, prepared.source)

    def complete_load(self, keys: Collection[theirs.OffloadKey], req_context: theirs.ReqContext) -> None:
        """A request has one load at a time; it has ended on all workers."""
        for number in self._loads.pop(req_context.req_id, ()):
            self._complete(self._open.pop(number))

    def prepare_store(
        self, keys: Collection[theirs.OffloadKey], req_context: theirs.ReqContext
    ) -> theirs.PrepareStoreOutput | None:
        """Places for those that are not there."""
        prepared = self.manager.prepare_store([self._key(key) for key in keys], _req(req_context))
        if prepared is None:
            return None
        stored = list(prepared.keys)
        if stored:
            number = self._opened(_Open(prepared.ticket, stored, store=True))
            self._stores.update(dict.fromkeys(stored, number))
        else:
            number = 0
            self.manager.complete_store(prepared.ticket)
        return theirs.PrepareStoreOutput(
            keys_to_store=[self._back(key) for key in stored],
            store_spec=Carried(number, prepared.target),
            evicted_keys=[self._back(key) for key in prepared.evicted],
        )

    def complete_store(
        self, keys: Collection[theirs.OffloadKey], req_context: theirs.ReqContext, success: bool = True
    ) -> None:
        """They are stored on all workers, but for what these have said to have failed."""
        numbers = {self._stores.get(self._key(key), 0) for key in keys} - {0}
        for number in sorted(numbers):
            done = self._open.pop(number)
            if not success:
                done.failed.update(done.keys)
            self._complete(done)

    def told(self, outcome: Outcome) -> None:
        """What workers say, before vLLM completes the jobs. Tickets of before a reset are completed here."""
        for number, places in outcome.failed.items():
            job = self._open.get(number) or self._forgotten.get(number)
            if job is not None:
                job.failed.update(job.keys[place] for place in places if place < len(job.keys))
        for number, count in outcome.ended.items():
            forgotten = self._forgotten.get(number)
            if forgotten is not None:
                forgotten.ended += count
                if forgotten.ended >= self._workers:
                    self._complete(self._forgotten.pop(number))
            elif number in self._open:
                self._open[number].ended += count

    def on_request_finished(self, req_context: theirs.ReqContext) -> None:
        """It asks for nothing any more."""
        self.manager.ended(_req(req_context))

    def on_schedule_end(self, context: theirs.ScheduleEndContext) -> None:
        """Once in each step."""
        self.manager.poll()

    def has_pending_work(self) -> bool:
        """Whether vLLM must go on stepping without requests."""
        return self.manager.busy()

    def take_events(self) -> Iterable[theirs.OffloadingEvent]:
        """What changed in host memory."""
        for event in self.manager.take_events() if self._events else ():
            if event.what != "cleared":
                medium = theirs.Medium.CPU if event.medium == "cpu" else theirs.Medium.STORAGE
                keys = [self._back(key) for key in event.keys]
                yield theirs.OffloadingEvent(keys=keys, medium=medium, removed=event.what == "removed")

    def get_stats(self) -> Any:
        """What was counted since the last call, for vLLM's own metrics; None if nothing was."""
        return metrics.offloading_stats(self._counting.changes())

    def reset_cache(self) -> None:
        """Forget all. vLLM completes nothing of before; the rows stay out of use until workers have told of them."""
        self.manager.reset()
        self._forgotten.update(self._open)
        self._open.clear()
        self._stores.clear()
        self._loads.clear()

    def shutdown(self) -> None:
        """End."""
        self.manager.close()

    def _opened(self, job: _Open) -> int:
        self._numbers += 1
        self._open[self._numbers] = job
        return self._numbers

    def _complete(self, job: _Open) -> None:
        if job.store:
            for key in job.keys:
                self._stores.pop(key, None)
            self.manager.complete_store(job.ticket, job.failed)
        else:
            self.manager.complete_load(job.ticket, job.failed)


def _req(context: theirs.ReqContext) -> ReqContext:
    """Ours for vLLM's, made once. vLLM's filter knows media; ours names: storage is all tiers, and no storage none."""
    known: _Request | None = context.get_state(_Request)
    if known is None:
        below = context.load_tier_filter.allows(theirs.Medium.STORAGE, None)
        known = _Request(ReqContext(context.req_id, tiers=None if below else frozenset()))
        context.set_state(known)
    return known.req
