"""The consumer's half of a planner: what is fetched from other engines, or pushed by them, and when it has ended.

May import the core and this package's tickets, orders and staging. It waits for nothing. Blocks of staging memory into
which another engine may write are taken here, for all ranks alike, and are free again when all of them have said that
nobody writes there any more.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Final, Literal

import attrs

from tensorway.errors import TicketInvalid
from tensorway.kv import Blocks, Match, RequestView, Result
from tensorway_kv import tickets
from tensorway_kv.leases import LONGEST
from tensorway_kv.life import Life, ids
from tensorway_kv.orders import Await, Fetch, Ids, Want
from tensorway_kv.staging import room

#: Tickets whose request has ended; they are not opened again for it.
_SPENT: Final = 65_536
#: A consumer says so often within a lease that it still wants the blocks, that several may be lost.
_BEATS: Final = 6
#: Who was only asked about is wanted for so many leases after it was asked the last time.
_ASKED: Final = 4
_NOTHING: Final = Match(0, "nothing")


@attrs.define(eq=False)
class _Wanted:
    """A request whose blocks another engine keeps, or is going to have."""

    ticket: tickets.Ticket
    #: When it was asked about, and when movers were told that it is wanted.
    asked: float
    told: float
    reserved: bool = False
    #: Nobody asks what becomes of it: it was given up before it had blocks.
    silent: bool = False
    start: int = 0
    stop: int = 0
    #: When it was reserved, and what ranks have said, by rank: tokens and cause.
    reserved_at: float = 0.0
    said: dict[int, tuple[int, str]] = attrs.field(factory=dict)
    way: Literal["pull", "push"] = "pull"
    #: Ids of the request's blocks here, and of those in staging memory where they arrive by a pull.
    blocks: Ids = ()
    staged: Ids = ()

    @property
    def lease(self) -> float:
        """Seconds for which its producer keeps blocks."""
        return self.ticket.expires - self.ticket.issued


@attrs.define
class Asked:
    """What movers are to do."""

    wants: list[Want] = attrs.field(factory=list)
    fetches: list[Fetch] = attrs.field(factory=list)
    awaits: list[Await] = attrs.field(factory=list)
    cancels: list[str] = attrs.field(factory=list)


class Wanting:
    """Requests of one life of an engine whose blocks come from others."""

    def __init__(self, life: Life) -> None:
        self._life, self._groups = life, life.geometry.groups
        self._wanted: dict[str, _Wanted] = {}
        self._seen = tickets.Seen()
        self._spent: OrderedDict[tuple[str, str, int], None] = OrderedDict()
        self._received: list[str] = []
        self._failed: dict[str, int] = {}
        self._asked = Asked()
        #: Reserved, and not yet said to movers: no step has come since, or there was no room.
        self._waiting: dict[str, _Wanted] = {}
        self._staging = life.options.staging_blocks
        self._pool = life.pool
        #: Landing memory that was given out, by request and epoch, and the ranks that are done with it.
        self._landing: dict[tuple[str, int], tuple[Ids, set[int]]] = {}
        self.closed = False

    @property
    def busy(self) -> bool:
        """Whether anything is wanted, or still to be said."""
        return bool(self._wanted or self._received or self._failed or self._asked.cancels or self._landing)

    # -- what the engine says

    def lookup(self, request: RequestView, have: int) -> Match:
        """What the request's ticket promises beyond what is here; nothing for a ticket that is none."""
        wanted = self._find(request)
        if wanted is None or wanted.reserved:
            return _NOTHING
        tokens = self._stop(wanted.ticket, request, have) - have
        if tokens <= 0 or tokens < self._life.options.min_tokens:
            return _NOTHING
        return Match(tokens, "background", {wanted.ticket.engine: tokens})

    def reserve(self, request: RequestView, blocks: Blocks, have: int, tokens: int) -> None:
        """Have `tokens` beyond `have`; for none, only say that the producer's blocks are not needed."""
        wanted = self._find(request)
        if wanted is not None and wanted.reserved:
            return
        if wanted is None or have < 0 or tokens < 0 or have + tokens > self._stop(wanted.ticket, request, have):
            if wanted is not None and tokens == 0 <= have:
                self._unneeded(request.id, wanted)
            elif tokens > 0:
                self._life.counts.add("kv_requests_total", direction="pull", peer="", cause="refused")
                self._failed[request.id] = have
            return
        wanted.start, wanted.stop, wanted.blocks = have, have + tokens, ids(blocks)
        if tokens > 0 and (wanted.ticket.push_only or (self._life.options.prefer == "push" and self._staging)):
            wanted.way = "push"
        self._reserve(request.id, wanted)

    def cancel(self, request: str) -> None:
        """Give up what is fetched for it."""
        wanted = self._wanted.get(request)
        if wanted is None:
            return
        if not wanted.reserved:
            wanted.silent = True
            self._unneeded(request, wanted)
        else:
            if request in self._waiting:  # it needs no room any more to be told that it is given up
                wanted.way, wanted.stop = "pull", wanted.start
            self._asked.cancels.append(request)

    def _reserve(self, request: str, wanted: _Wanted) -> None:
        wanted.reserved, wanted.reserved_at = True, time.monotonic()
        self._waiting[request] = wanted

    def _unneeded(self, request: str, wanted: _Wanted) -> None:
        """Nothing of it is needed: its producer is told so."""
        wanted.way, wanted.start, wanted.stop, wanted.blocks = "pull", 0, 0, ()
        self._reserve(request, wanted)

    def _give_up(self, request: str, wanted: _Wanted, cause: str) -> None:
        """It waits for room, and will not have it."""
        peer = wanted.ticket.engine
        self._life.counts.add("kv_requests_total", direction=wanted.way, peer=peer, cause=cause)
        self._failed[request] = wanted.start
        wanted.silent = True
        self._unneeded(request, wanted)

    def _find(self, request: RequestView) -> _Wanted | None:
        """The request as it is known, or becomes known by a ticket that is good."""
        known = self._wanted.get(request.id)
        if known is not None:
            self._ask_again(request.id, known)
        if known is not None or request.ticket is None or self.closed:
            return known
        life, now = self._life, time.time()
        most = max(LONGEST, life.options.lease)
        limits = tickets.Limits(group=life.options.path, tenant=life.tenant(request), max_life=most)
        try:
            ticket = tickets.open(request.ticket, life.secret, now, limits)
            if self._key(ticket) in self._spent:
                return None
            if ticket.incarnation == life.incarnation:
                raise TicketInvalid("A ticket came.", "It is our own.", "Send it to another engine.", "foreign")
            self._seen.use(ticket, request.id, now)
        except TicketInvalid as error:
            life.counts.add("kv_tickets_refused_total", cause=error.cause)
            return None
        life.counts.add("kv_tickets_total", what="opened")
        wanted = self._wanted[request.id] = _Wanted(ticket, time.monotonic(), time.monotonic())
        self._want_again(request.id, wanted)
        return wanted

    def _ask_again(self, request: str, wanted: _Wanted) -> None:
        wanted.asked = time.monotonic()
        if not wanted.reserved and wanted.asked - wanted.told > wanted.lease:
            self._want_again(request, wanted)

    def _want_again(self, request: str, wanted: _Wanted) -> None:
        """Tell movers how long it is wanted for: they are not told again before a lease is over."""
        wanted.told = time.monotonic()
        self._asked.wants.append(self._want(request, wanted, min(LONGEST, _ASKED * wanted.lease)))

    def _stop(self, ticket: tickets.Ticket, request: RequestView, have: int) -> int:
        """Behind the last token that can be had. A state is that of all tokens, and is of no use for fewer."""
        stop = min(ticket.tokens, request.tokens)
        if self._life.states and stop != ticket.tokens:
            return 0
        lands = ticket.push_only or self._life.options.stage
        too_long = lands and max(room(self._groups, have, stop), default=0) > self._staging
        return 0 if too_long else stop

    def _want(self, request: str, wanted: _Wanted, seconds: float) -> Want:
        ticket, beat = wanted.ticket, max(0.01, wanted.lease / _BEATS)
        return Want(request, ticket.engine, ticket.incarnation, ticket.request, ticket.epoch, seconds, beat)

    @staticmethod
    def _key(ticket: tickets.Ticket) -> tuple[str, str, int]:
        return ticket.incarnation, ticket.request, ticket.epoch

    # -- each step

    def step(self, now: float) -> tuple[list[str], dict[str, int], Asked]:
        """What was received and what failed, and what movers are to do."""
        for request, one in list(self._wanted.items()):
            if not one.reserved and now - one.asked > min(LONGEST, _ASKED * one.lease):
                del self._wanted[request]
        full = False
        for request, wanted in list(self._waiting.items()):
            if wanted.way == "push" or self._staged(wanted):
                full = self._land(request, wanted, now, full)
            if wanted.way == "pull" and request in self._waiting and not self._staged(wanted):
                del self._waiting[request]
                self._asked.fetches.append(self._fetch(request, wanted, now))
        out = self._received, self._failed, self._asked
        self._received, self._failed, self._asked = [], {}, Asked()
        return out

    def _land(self, request: str, wanted: _Wanted, now: float, full: bool) -> bool:
        """Take landing memory for it, unless somebody who came before waits for some; whether anybody waits."""
        key = request, wanted.ticket.epoch
        landing = None if full else self._pool.take(room(self._groups, wanted.start, wanted.stop))
        if landing is not None:
            del self._waiting[request]
            self._landing[key] = landing, set()
            if wanted.way == "pull":
                wanted.staged = landing
                self._asked.fetches.append(self._fetch(request, wanted, now))
                return full
            self._asked.awaits.append(Await(self._fetch(request, wanted, now), landing))
        elif not wanted.ticket.push_only and not self._life.options.stage:
            wanted.way = "pull"
        elif now - wanted.reserved_at >= self._life.options.deadline:
            self._give_up(request, wanted, "deadline")
        else:
            if now - wanted.told > wanted.lease / _BEATS:  # a producer that hears nothing takes its promise back
                wanted.told = now
                self._asked.wants.append(self._want(request, wanted, wanted.lease))
            return True
        return full

    def _fetch(self, request: str, wanted: _Wanted, now: float) -> Fetch:
        queued, peer = now - wanted.reserved_at, wanted.ticket.engine
        self._life.counts.took("kv_phase_seconds", queued, direction=wanted.way, peer=peer, phase="queued")
        want = self._want(request, wanted, max(0.0, self._life.options.deadline - queued))
        theirs = () if wanted.ticket.push_only else wanted.ticket.blocks
        blocks, pages = (wanted.staged, wanted.blocks) if wanted.staged else (wanted.blocks, None)
        what = theirs, blocks, wanted.start, wanted.stop, pages, wanted.ticket.later
        return Fetch(want, wanted.ticket.tokens, *what)

    def _staged(self, wanted: _Wanted) -> bool:
        """Whether what is pulled for it is to arrive in staging memory."""
        return self._life.options.stage and wanted.start < wanted.stop

    # -- what movers say

    def said(self, rank: int, result: Result) -> None:
        """What became of a request at a rank."""
        wanted = self._wanted.get(result.request)
        if wanted is None or not wanted.reserved or rank in wanted.said or not 0 <= rank < self._life.ranks:
            self._life.counts.add("kv_results_refused_total")
            return
        wanted.said[rank] = (result.tokens, result.cause)
        if len(wanted.said) < self._life.ranks:
            return
        del self._wanted[result.request]
        self._spend(wanted.ticket)
        if wanted.silent:
            return
        causes = sorted({cause for _, cause in wanted.said.values() if cause})
        peer, cause = wanted.ticket.engine, causes[0] if causes else "none"
        self._life.counts.add("kv_requests_total", direction=wanted.way, peer=peer, cause=cause)
        if causes:
            self._failed[result.request] = min(tokens for tokens, _ in wanted.said.values())
        else:
            self._received.append(result.request)

    def cleared(self, rank: int, result: Result) -> None:
        """Nobody writes any more to what a request had of a rank's landing memory."""
        key = result.request, int(result.proof) if result.proof.isdigit() else 0
        landing, ranks = self._landing.get(key, ((), None))
        if ranks is None or rank in ranks or not 0 <= rank < self._life.ranks:
            self._life.counts.add("kv_results_refused_total")
            return
        ranks.add(rank)
        if len(ranks) == self._life.ranks:
            del self._landing[key]
            self._pool.give(landing)

    def _spend(self, ticket: tickets.Ticket) -> None:
        self._spent[self._key(ticket)] = None
        while len(self._spent) > _SPENT:
            self._spent.popitem(last=False)

    def count(self) -> None:
        """Bring counters up to date."""
        counts, pool = self._life.counts, self._pool
        held = sum(
            sum(map(len, landing))
            for (request, _), (landing, _) in self._landing.items()
            if request not in self._wanted
        )
        for state, blocks in (("free", pool.free), ("used", pool.used - held), ("held", held)):
            counts.set("kv_staging_blocks", blocks, state=state)
        for way in ("pull", "push"):
            counts.set("kv_requests_waiting", sum(one.way == way for one in self._wanted.values()), direction=way)
