"""The planner of `handover`: what is kept for whom, what is fetched for whom, and when each of it has ended.

May import the core and this package's leases, tickets, messages, boards and orders. One thread uses it, and nothing
here waits: it talks to movers by `Step.plan` and `Result`, and to nobody else. A producer's half is `_Kept`: leases
and the words beside their blocks. A consumer's is the requests in `_Wanted`.
"""

from __future__ import annotations

import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from tensorway import settings
from tensorway.errors import LayoutInvalid, TicketInvalid
from tensorway.kv import (
    METRICS,
    Blocks,
    Capabilities,
    Event,
    KVContext,
    Match,
    RankGeometry,
    RequestView,
    Result,
    Retention,
    Step,
)
from tensorway.metrics import Counters, Sample
from tensorway_kv import messages, orders, tickets
from tensorway_kv.board import let_go
from tensorway_kv.leases import LONGEST, Consumer, Generations, LeaseTable
from tensorway_kv.meeting import VERSION, EngineRecord, Ground
from tensorway_kv.options import HandoverOptions
from tensorway_kv.orders import Fetch, Mark, Orders, Want
from tensorway_kv.stored import Stored

#: Tickets whose request has ended; they are not opened again for it.
_SPENT: Final = 65_536
#: A consumer says so often within a lease that it still wants the blocks, that several may be lost.
_BEATS: Final = 6
_NOTHING: Final = Match(0, "nothing")


@attrs.define(eq=False)
class _Wanted:
    """A request whose blocks another engine keeps."""

    ticket: tickets.Ticket
    since: float
    reserved: bool = False
    #: Nobody asks what becomes of it: it was given up before it had blocks.
    silent: bool = False
    start: int = 0
    stop: int = 0
    #: When it was reserved, and what ranks have said, by rank: tokens and cause.
    reserved_at: float = 0.0
    said: dict[int, tuple[int, str]] = attrs.field(factory=dict)


class _Kept:
    """The producer's half: promises, and the words that are still to be written."""

    def __init__(self, ranks: int, ttl: float, incarnation: str) -> None:
        self.leases, self._generations = LeaseTable(), Generations()
        self._ranks, self._ttl, self._incarnation = ranks, ttl, incarnation
        self._marks: list[Mark] = []
        self._last = 0

    @property
    def busy(self) -> bool:
        """Whether anything is kept, or is still to be said of it."""
        return bool(len(self.leases) or self._marks)

    def keep(self, request: str, blocks: orders.Ids, now: float) -> int:
        """Promise to keep blocks; the epoch, or 0 for no."""
        readers = dict.fromkeys(range(self._ranks), 0)
        lease = self.leases.grant(request, self._incarnation, blocks, readers, self._ttl, now)
        if lease is None:
            return 0
        self._last = lease.epoch
        marks = self._generations.hold(lease.epoch, lease.blocks)
        if marks:
            self._marks.append(Mark(marks.word, marks.blocks))
        return lease.epoch

    def step(self, now: float) -> tuple[list[str], tuple[Mark, ...]]:
        """Whose blocks are free from now on, and what is to be written before anybody uses them."""
        self.leases.expire(now)
        released = []
        for lease in self.leases.released():
            released.append(lease.request)
            marks = self._generations.let_go(lease.epoch)
            if marks:
                self._marks.append(Mark(let_go(self._last), marks.blocks))
        out, self._marks = tuple(self._marks), []
        return released, out

    def heard(self, message: messages.Message, rank: int, now: float) -> None:
        """What a rank of a consumer says to a rank of ours."""
        if isinstance(message, messages.Heartbeat):
            for held in message.held:
                self.leases.renew(held.request, held.epoch, Consumer(message.sender, message.rank), now)
        elif isinstance(message, messages.Ack) and message.producer_rank == rank:
            who = Consumer(message.sender, message.rank)
            self.leases.acknowledge(message.request, message.epoch, rank, who, now, message.readers)


class HandoverPlanner:
    """See `tensorway.kv.contract.Planner`."""

    capabilities = Capabilities(pull=True)

    def __init__(self, options: HandoverOptions, context: KVContext) -> None:
        self._options, self._ranks, self._engine = options, context.ranks, context.engine
        self._geometry = _geometry(context)
        self._secret = options.secret or settings.secret()
        if not self._secret:
            tickets.tenant_of("", self._secret)  # raises what says how to set one
        #: This life of the engine.
        self.incarnation = uuid.uuid4().hex
        self._kept = _Kept(context.ranks, options.lease, self.incarnation)
        self._wanted: dict[str, _Wanted] = {}
        self._seen, self._reader = tickets.Seen(), messages.Reader()
        self._spent: OrderedDict[tuple[str, str, int], None] = OrderedDict()
        self._received: list[str] = []
        self._failed: dict[str, int] = {}
        self._wants: list[Want] = []
        self._fetches: list[tuple[str, _Wanted, orders.Ids]] = []
        self._cancels: list[str] = []
        self._counts = Counters(METRICS, backend="handover", engine=context.engine)
        self._stored = Stored(self._geometry)
        self._closed = False
        self._ground = Ground(context.rendezvous, options.path, options.presence, context.facts)
        key = self._ground.engine_key(context.engine)
        self._ground.tell(key, EngineRecord(VERSION, self.incarnation, context.ranks), context.deadline)
        self._ground.follow()

    # -- the consumer's half

    def lookup(self, request: RequestView, have: int) -> Match:
        """What the request's ticket promises beyond what is here; nothing for a ticket that is none."""
        wanted = self._find(request)
        if wanted is None or wanted.reserved:
            return _NOTHING
        tokens = self._stop(wanted.ticket, request) - have
        if tokens <= 0:
            return _NOTHING
        return Match(tokens, "background", {wanted.ticket.engine: tokens})

    def reserve(self, request: RequestView, blocks: Blocks, have: int, tokens: int) -> None:
        """Fetch `tokens` beyond `have`; for none, only say that the producer's blocks are not needed."""
        wanted = self._find(request)
        if wanted is not None and wanted.reserved:
            return
        if wanted is None or have < 0 or tokens < 0 or have + tokens > self._stop(wanted.ticket, request):
            if tokens > 0:
                self._counts.add("kv_requests_total", direction="pull", peer="", cause="refused")
                self._failed[request.id] = have
            return
        wanted.reserved, wanted.reserved_at = True, time.monotonic()
        wanted.start, wanted.stop = have, have + tokens
        self._fetches.append((request.id, wanted, _ids(blocks)))

    def _find(self, request: RequestView) -> _Wanted | None:
        """The request as it is known, or becomes known by a ticket that is good."""
        known = self._wanted.get(request.id)
        if known is not None or request.ticket is None or self._closed:
            return known
        now = time.time()
        limits = tickets.Limits(
            group=self._options.path, tenant=self._tenant(request), max_life=max(LONGEST, self._options.lease)
        )
        try:
            ticket = tickets.open(request.ticket, self._secret, now, limits)
            if self._key(ticket) in self._spent:
                return None
            if ticket.incarnation == self.incarnation:
                raise TicketInvalid("A ticket came.", "It is our own.", "Send it to another engine.", "foreign")
            self._seen.use(ticket, request.id, now)
        except TicketInvalid as error:
            self._counts.add("kv_tickets_refused_total", cause=error.cause)
            return None
        self._counts.add("kv_tickets_total", what="opened")
        wanted = self._wanted[request.id] = _Wanted(ticket, time.monotonic())
        self._wants.append(self._want(request.id, ticket, LONGEST))
        return wanted

    def _stop(self, ticket: tickets.Ticket, request: RequestView) -> int:
        """Behind the last token that can be had. A state is that of all tokens, and is of no use for fewer."""
        stop = min(ticket.tokens, request.tokens)
        whole = any(not group.block_tokens for group in self._geometry.groups)
        return 0 if whole and stop != ticket.tokens else stop

    def _want(self, request: str, ticket: tickets.Ticket, seconds: float) -> Want:
        beat = max(0.01, (ticket.expires - ticket.issued) / _BEATS)
        return Want(request, ticket.engine, ticket.incarnation, ticket.request, ticket.epoch, seconds, beat)

    def _tenant(self, request: RequestView) -> str:
        return tickets.tenant_of(request.salt, self._secret) if request.salt else ""

    @staticmethod
    def _key(ticket: tickets.Ticket) -> tuple[str, str, int]:
        return ticket.incarnation, ticket.request, ticket.epoch

    # -- the producer's half

    def finish(self, request: RequestView, blocks: Blocks, tokens: int, *, aborted: bool = False) -> Retention:
        """Keep the blocks if somebody asked for them, under a lease that the ticket names."""
        ids = _ids(blocks)
        if aborted or not request.hand_over or tokens <= 0 or not any(ids) or self._closed:
            return Retention(False)
        epoch = self._kept.keep(request.id, ids, time.monotonic())
        if not epoch:
            self._counts.add("kv_leases_refused_total")
            return Retention(False)
        now = time.time()
        ticket = tickets.Ticket(
            engine=self._engine, incarnation=self.incarnation, group=self._options.path, request=request.id,
            epoch=epoch, tokens=tokens, blocks=ids, tp=self._ranks, issued=now, expires=now + self._options.lease,
            tenant=self._tenant(request),
        )  # fmt: skip
        try:
            issued = tickets.issue(ticket, self._secret)
        except TicketInvalid as error:
            # What nobody can be told of is kept for nobody; the engine hears of it by `Step.released`.
            self._counts.add("kv_tickets_refused_total", cause=error.cause)
            self._kept.leases.force(request.id)
            return Retention(True)
        self._counts.add("kv_tickets_total", what="issued")
        self._stored.kept(request, tokens)
        return Retention(True, issued)

    def force(self, request: str) -> bool:
        """Take kept blocks back, whoever reads them; whether they were kept."""
        return self._kept.leases.force(request)

    def drain(self) -> None:
        """Keep nothing more; what is kept may still be read."""
        self._kept.leases.drain()

    def leases(self) -> Sequence[Mapping[str, Any]]:
        """What is kept, for people."""
        return self._kept.leases.list(time.monotonic())

    # -- each step

    def plan_step(self) -> Step:
        """What ended, and what movers are to do."""
        now = time.monotonic()
        released, marks = self._kept.step(now)
        for request in released:
            self._stored.let_go(request)
        for request in [name for name, one in self._wanted.items() if not one.reserved and now - one.since > LONGEST]:
            del self._wanted[request]
        fetches = tuple(self._fetch(name, wanted, ids, now) for name, wanted, ids in self._fetches)
        what = (marks, tuple(self._wants), fetches, tuple(self._cancels))
        plan = orders.encode(Orders(orders.VERSION, self.incarnation, *what))
        step = Step(released, self._received, self._failed, plan)
        self._received, self._failed = [], {}
        self._wants, self._fetches, self._cancels = [], [], []
        return step

    def _fetch(self, request: str, wanted: _Wanted, ids: orders.Ids, now: float) -> Fetch:
        queued = now - wanted.reserved_at
        self._counts.took("kv_phase_seconds", queued, direction="pull", peer=wanted.ticket.engine, phase="queued")
        left = max(0.0, self._options.deadline - queued)
        want = self._want(request, wanted.ticket, left)
        return Fetch(want, wanted.ticket.tokens, wanted.ticket.blocks, ids, wanted.start, wanted.stop)

    def on_results(self, rank: int, results: Sequence[Result]) -> None:
        """What a rank has fetched, and what it heard."""
        for result in results:
            if result.what == "heard":
                message = self._reader.decode(result.proof)
                if message is not None:
                    self._kept.heard(message, rank, time.monotonic())
            elif result.what == "received":
                self._said(rank, result)

    def _said(self, rank: int, result: Result) -> None:
        wanted = self._wanted.get(result.request)
        if wanted is None or not wanted.reserved or rank in wanted.said or not 0 <= rank < self._ranks:
            self._counts.add("kv_results_refused_total")
            return
        wanted.said[rank] = (result.tokens, result.cause)
        if len(wanted.said) < self._ranks:
            return
        del self._wanted[result.request]
        self._spend(wanted.ticket)
        causes = sorted({cause for _, cause in wanted.said.values() if cause})
        peer, cause = wanted.ticket.engine, causes[0] if causes else "none"
        self._counts.add("kv_requests_total", direction="pull", peer=peer, cause=cause)
        if wanted.silent:
            return
        if causes:
            self._failed[result.request] = min(tokens for tokens, _ in wanted.said.values())
        else:
            self._received.append(result.request)

    def _spend(self, ticket: tickets.Ticket) -> None:
        self._spent[self._key(ticket)] = None
        while len(self._spent) > _SPENT:
            self._spent.popitem(last=False)

    def cancel(self, request: str) -> None:
        """Give up what is fetched for it, and take back what is kept of it."""
        self._kept.leases.force(request)
        wanted = self._wanted.get(request)
        if wanted is None:
            return
        if wanted.reserved:
            self._cancels.append(request)
            return
        # It has no blocks yet: its producer is told that nobody needs them, and the engine need not be.
        wanted.reserved = wanted.silent = True
        wanted.reserved_at = time.monotonic()
        self._fetches.append((request, wanted, ()))

    def busy(self) -> bool:
        """Whether anything is kept, fetched, or still to be said."""
        return bool(self._kept.busy or self._wanted or self._received or self._failed or self._cancels)

    def reset(self) -> None:
        """Take back whatever is kept: it is of other weights."""
        for row in self.leases():
            self._kept.leases.force(str(row["request"]))

    def events(self) -> Sequence[Event]:
        """Blocks of requests that came with hashes, while they are kept."""
        return self._stored.take()

    def statistics(self) -> list[Sample]:
        """What became of tickets, leases and requests."""
        counts, leases = self._counts, self._kept.leases
        for ending, count in leases.endings.items():
            counts.set("kv_leases_ended_total", count, cause=ending)
        for cause, count in leases.refused.items():
            counts.set("kv_messages_refused_total", count, cause=f"late_{cause}")
        counts.set("kv_leases", len(leases))
        counts.set("kv_requests_waiting", len(self._wanted), direction="pull")
        return counts.samples()

    def close(self, deadline: float = 5.0) -> None:
        """End this life of the engine. Who needs what is kept to be read first calls `drain`, and waits."""
        if self._closed:
            return
        self._closed = True
        self.drain()
        self._ground.close(deadline)


def _ids(blocks: Blocks) -> orders.Ids:
    return tuple(tuple(map(int, group)) for group in blocks)


def _geometry(context: KVContext) -> RankGeometry:
    if context.geometry is None:
        asked = f"A planner of engine {context.engine} was to be made."
        raise LayoutInvalid(asked, "It was given no geometry.", "Give the memory of any of its ranks in the context.")
    return context.geometry
