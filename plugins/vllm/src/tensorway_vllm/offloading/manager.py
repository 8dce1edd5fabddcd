"""vLLM's manager over ours: its calls are for one key and without tickets, ours for many and with them.

May import vllm, the core and this package. It is called in the scheduler's process, by one thread, and never waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import attrs
import vllm.v1.kv_offload.base as theirs

from tensorway._logging import logger
from tensorway.offload import (
    METRICS,
    LookupResult,
    OffloadingManager,
    OffloadKey,
    PrefixLookup,
    ReqContext,
    Ticket,
    key_group,
    key_hash,
    make_offload_key,
)
from tensorway_vllm import metrics, sources
from tensorway_vllm.counting import Counting
from tensorway_vllm.offloading.faults import Faults
from tensorway_vllm.offloading.words import Carried, Outcome

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


@attrs.define
class _Request:
    """What is kept of a request in vLLM's own context of it."""

    req: ReqContext
    #: Since when it has been waiting to hear of its blocks; None while it does not.
    since: float | None = None
    #: It has waited for too long, and was told so once.
    over: bool = False
    #: Blocks that it found below host memory.
    below: set[OffloadKey] = attrs.field(factory=set)
    #: What was found in this step, and the groups of which many blocks were asked for at once.
    step: int = -1
    found: dict[bytes, theirs.LookupResult] = attrs.field(factory=dict)
    asked: set[int] = attrs.field(factory=set)
    #: Of each of vLLM's groups its keys and ours in the order of tokens, where they are, and how many vLLM had told.
    chains: dict[int, tuple[list[theirs.OffloadKey], list[OffloadKey]]] = attrs.field(factory=dict)
    places: dict[bytes, int] = attrs.field(factory=dict)
    told: int = 0


class ManagerAdapter(theirs.OffloadingManager):
    """See `vllm.v1.kv_offload.base.OffloadingManager`."""

    def __init__(
        self,
        manager: OffloadingManager,
        workers: int,
        groups: dict[int, int],
        *,
        events: bool,
        backend: str = "cpu",
        patience: float = 30.0,
        below: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`groups`: places of vLLM's cache groups among those that are offloaded; `events`: whether vLLM takes them.

        `patience`: seconds after which a lookup that came to no end is a miss. `below`: what vLLM calls the tiers below
        host memory.
        """
        self.manager = manager
        self._workers, self._groups, self._events = workers, groups, events
        self._patience, self._below, self._clock = patience, below, clock
        self._faults = Faults(backend)
        #: A reset failed: whatever the backend still has is of other weights, and is not asked for any more.
        self._gone = False
        self._step = 0
        #: What was told to be there in each medium, for those who must be told that all of it is gone.
        self._told: dict[str, set[OffloadKey]] = {}
        self._original = {place: group for group, place in groups.items()}
        self._open: dict[int, _Open] = {}
        #: Those of before a reset, whose rows are free when all workers have ended them.
        self._forgotten: dict[int, _Open] = {}
        #: Numbers of tickets: of each key that is being stored, and of each request's loads.
        self._stores: dict[OffloadKey, int] = {}
        self._loads: dict[str, list[int]] = {}
        self._numbers = 0
        self._counting = Counting(partial(self._faults.beside, manager.statistics), METRICS)

    def _key(self, key: theirs.OffloadKey) -> OffloadKey:
        """Ours of theirs. Tenants are in vLLM's hash already, which begins with the request's salt."""
        return make_offload_key(theirs.get_offload_block_hash(key), self._groups[theirs.get_offload_group_idx(key)])

    def _back(self, keys: Iterable[OffloadKey]) -> list[theirs.OffloadKey]:
        """Theirs of ours, without those of groups that vLLM has not, which a shared tier may tell of."""
        pairs = ((key, self._original.get(key_group(key))) for key in keys)
        return [theirs.make_offload_key(key_hash(key), group) for key, group in pairs if group is not None]

    def on_new_request(self, req_context: theirs.ReqContext) -> theirs.RequestOffloadingContext:
        """A request is there."""
        everything = self._faults.asked("new", self.manager.begins, _known(req_context).req) == "all"
        policy = theirs.OffloadPolicy.REQUEST_LEVEL if everything else theirs.OffloadPolicy.CHUNK_LEVEL
        return theirs.RequestOffloadingContext(policy=policy)

    def lookup(self, key: theirs.OffloadKey, req_context: theirs.ReqContext) -> theirs.LookupResult:
        """What is known of a block; soon, or it is a miss.

        vLLM asks for each block of a request, in each step in which it waits. The backend is asked once a step for all.
        """
        known = _known(req_context)
        if known.step != self._step:
            known.step = self._step
            known.found.clear()
            known.asked.clear()
        found = known.found.get(key)
        if found is None:
            found = known.found[key] = next(self._look([self._key(key)], known))
            if found is not theirs.LookupResult.MISS:
                behind, ours = self._behind(key, req_context, known)
                known.found.update(zip(behind, self._look(ours, known), strict=False))
        return found

    def _behind(
        self, key: theirs.OffloadKey, context: theirs.ReqContext, known: _Request
    ) -> tuple[list[theirs.OffloadKey], list[OffloadKey]]:
        """What follows this key, theirs and ours, if it is the first one of its group that is found in this step.

        Else nothing: of a group with a window vLLM asks from the last one on.
        """
        positions = getattr(context, "_offload_key_positions", {})
        if len(positions) != known.told:
            known.told = len(positions)
            known.chains.clear()
            for each in positions:
                chain, ours = known.chains.setdefault(theirs.get_offload_group_idx(each), ([], []))
                known.places[each] = len(chain)
                chain.append(each)
                ours.append(self._key(each))
        group, place = theirs.get_offload_group_idx(key), known.places.get(key)
        if place is None or group in known.asked:
            return [], []
        known.asked.add(group)
        chain, ours = known.chains[group]
        return chain[place + 1 :], ours[place + 1 :]

    def _look(self, keys: list[OffloadKey], known: _Request) -> Iterator[theirs.LookupResult]:
        """Of each of these up to the first miss, in the order of tokens."""
        results: Sequence[LookupResult] = []
        if len(keys) > 1 and not self._gone:
            there = self._faults.asked(PrefixLookup(0), self.manager.lookup_prefix, keys, known.req)
            results = [LookupResult.HIT] * there.ready
            if there.later:
                coming = keys[there.ready : there.ready + there.later]
                results += self._faults.asked([], self.manager.lookup_many, coming, known.req)
        elif not self._gone:
            results = [self._faults.asked(LookupResult.MISS, self.manager.lookup, keys[0], known.req)]
        for key, found in zip(keys, results, strict=False):
            if found is LookupResult.HIT_PENDING or found is LookupResult.RETRY:
                if key not in self._stores:
                    known.below.add(key)
                if self._waited(known):
                    break
            yield _FOUND.get(found, theirs.LookupResult.MISS)
        yield theirs.LookupResult.MISS

    def _waited(self, known: _Request) -> bool:
        """Whether a request has waited for as long as it may."""
        now = self._clock()
        if known.since is None:
            known.since = now
        if now - known.since < self._patience:
            return False
        if not known.over:
            known.over = True
            self._faults.count("lookup", "late")
            _log.warning(
                "Request %s has waited for %g s to hear of its blocks, and computes them.",
                known.req.request,
                self._patience,
            )
        return True

    def get_load_source(self, key: theirs.OffloadKey, req_context: theirs.ReqContext) -> Any:
        """Where a block was when its request asked for it; asked by vLLM 0.32 and newer."""
        return self._below if self._key(key) in _known(req_context).below else sources.HOST

    def touch(self, keys: Collection[theirs.OffloadKey], req_context: theirs.ReqContext) -> None:
        """The engine had these itself."""
        self._faults.asked(None, self.manager.touch, [self._key(key) for key in keys], _known(req_context).req)

    def prepare_load(self, keys: Collection[theirs.OffloadKey], req_context: theirs.ReqContext) -> Carried:
        """Where they are. vLLM takes no no for an answer: for what is gone, a load is begun that fails."""
        ours, known = [self._key(key) for key in keys], _known(req_context)
        known.since, known.over = None, False
        prepared = None if self._gone else self._faults.asked(None, self.manager.prepare_load, ours, known.req)
        if prepared is None:
            self._faults.count("load", "missing", len(ours))
            self._numbers += 1
            return Carried(self._numbers, None)
        number = self._opened(_Open(prepared.ticket, ours, store=False))
        self._loads.setdefault(known.req.request, []).append(number)
        return Carried(number, prepared.source)

    def complete_load(self, keys: Collection[theirs.OffloadKey], req_context: theirs.ReqContext) -> None:
        """A request has one load at a time; it has ended on all workers."""
        for number in self._loads.pop(req_context.req_id, ()):
            self._complete(self._open.pop(number))

    def prepare_store(
        self, keys: Collection[theirs.OffloadKey], req_context: theirs.ReqContext
    ) -> theirs.PrepareStoreOutput | None:
        """Places for those that are not there."""
        ours, nothing = [self._key(key) for key in keys], theirs.PrepareStoreOutput([], Carried(0, None), [])
        try:
            prepared = None if self._gone else self.manager.prepare_store(ours, _known(req_context).req)
        except Exception as error:  # a backend is a plugin of anybody
            self._faults.raised("prepare_store", error)
            return nothing  # and no None, after which vLLM asks again in every step
        if prepared is None:
            return nothing if self._gone else None
        stored = list(prepared.keys)
        if stored:
            number = self._opened(_Open(prepared.ticket, stored, store=True))
            self._stores.update(dict.fromkeys(stored, number))
        else:
            number = 0
            self._faults.asked(None, self.manager.complete_store, prepared.ticket)
        return theirs.PrepareStoreOutput(
            keys_to_store=self._back(stored),
            store_spec=Carried(number, prepared.target),
            evicted_keys=self._back(prepared.evicted),
        )

    def complete_store(
        self, keys: Collection[theirs.OffloadKey], req_context: theirs.ReqContext, success: bool = True
    ) -> None:
        """They are stored on all workers, but for what these have said to have failed."""
        numbers = {self._stores.get(self._key(key), 0) for key in keys} - {0}
        for number in sorted(numbers):
            done = self._open.pop(number)
            for key in done.keys:  # those of a store of before a reset may be another's by now
                self._stores.pop(key, None)
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
        self._faults.asked(None, self.manager.ended, _known(req_context).req)

    def on_schedule_end(self, context: theirs.ScheduleEndContext) -> None:
        """Once in each step."""
        self._step += 1
        self._faults.asked(None, self.manager.poll)
        if not self._events:
            self._faults.asked([], self.manager.take_events)  # or they would be kept for nobody

    def has_pending_work(self) -> bool:
        """Whether vLLM must go on stepping without requests."""
        return self._faults.asked(False, self.manager.busy)

    def take_events(self) -> Iterable[theirs.OffloadingEvent]:
        """What changed in host memory and below. vLLM has no word for `cleared`: then all that was told is gone."""
        for event in self._faults.asked([], self.manager.take_events) if self._events else ():
            told = self._told.setdefault(event.medium, set())
            keys = list(event.keys)
            if event.what == "stored":
                told.update(keys)
            elif event.what == "removed":
                told.difference_update(keys)
            else:
                keys = sorted(told)
                told.clear()
            names = self._back(keys)
            if names:
                medium = theirs.Medium.CPU if event.medium == "cpu" else theirs.Medium.STORAGE
                yield theirs.OffloadingEvent(keys=names, medium=medium, removed=event.what != "stored")

    def get_stats(self) -> Any:
        """What was counted since the last call, for vLLM's own metrics; None if nothing was."""
        return metrics.offloading_stats(self._counting.changes())

    def reset_cache(self) -> None:
        """Forget all. vLLM completes nothing of before; the rows stay out of use until workers have told of them."""
        try:
            self.manager.reset()
        except Exception as error:  # a backend is a plugin of anybody
            self._faults.raised("reset", error)
            self._gone = True
        self._step += 1
        self._forgotten.update(self._open)
        self._open.clear()
        self._stores.clear()
        self._loads.clear()

    def shutdown(self) -> None:
        """End."""
        self._faults.asked(None, self.manager.close)

    def _opened(self, job: _Open) -> int:
        self._numbers += 1
        self._open[self._numbers] = job
        return self._numbers

    def _complete(self, job: _Open) -> None:
        if job.store:
            self._faults.asked(None, self.manager.complete_store, job.ticket, job.failed)
        else:
            self._faults.asked(None, self.manager.complete_load, job.ticket, job.failed)


def _known(context: theirs.ReqContext) -> _Request:
    """Ours for vLLM's, made once. vLLM's filter knows media; ours names: storage is all tiers, and no storage none."""
    known: _Request | None = context.get_state(_Request)
    if known is None:
        below = context.load_tier_filter.allows(theirs.Medium.STORAGE, None)
        known = _Request(ReqContext(context.req_id, tiers=None if below else frozenset()))
        context.set_state(known)
    return known
