"""The producer's half of a planner: promises, the words beside blocks, and what is written to whom.

May import the core and this package's leases, tickets, messages, boards and orders. It waits for nothing. A lease is
granted when a request has ended, or promised before it is computed; its consumers read the blocks, or register landing
memory, into which they are written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import attrs

from tensorway.errors import TicketInvalid
from tensorway.kv import Blocks, RequestView, Result, Retention
from tensorway_kv import messages, tickets
from tensorway_kv.board import let_go
from tensorway_kv.leases import Consumer, Generations, Lease, LeaseTable
from tensorway_kv.life import Life, ids
from tensorway_kv.orders import Copy, Ids, Mark, Push, Refuse, Send, Target
from tensorway_kv.shelf import Shelf

#: A rank of ours, a consumer's life, and a rank of it.
_Key: TypeAlias = tuple[int, str, int]


@attrs.define(eq=False)
class _Kept:
    """What is known of a lease beyond what its table knows."""

    lease: Lease
    tokens: int
    #: Whether its blocks are computed.
    filled: bool
    targets: dict[_Key, Target] = attrs.field(factory=dict)
    withdrawn: set[_Key] = attrs.field(factory=set)


@attrs.define
class Said:
    """What movers are to do."""

    marks: list[Mark] = attrs.field(factory=list)
    pushes: list[Push] = attrs.field(factory=list)
    sends: list[Send] = attrs.field(factory=list)
    refusals: list[Refuse] = attrs.field(factory=list)
    copies: list[Copy] = attrs.field(factory=list)

    def __bool__(self) -> bool:
        return bool(self.marks or self.pushes or self.sends or self.refusals or self.copies)


class Keeping:
    """Leases of one life of an engine."""

    def __init__(self, life: Life) -> None:
        self.leases, self._generations, self._life = LeaseTable(), Generations(), life
        self._kept: dict[str, _Kept] = {}
        self._said = Said()
        self._last = 0
        self._shelf = Shelf(life.pool, life.geometry.groups)
        #: Requests whose blocks are the engine's again, for they were copied.
        self._copied: list[str] = []

    @property
    def busy(self) -> bool:
        """Whether anything is kept, or is still to be said of it."""
        return bool(self._kept or self._said or self._shelf.busy or self._copied)

    # -- what the engine says

    def promise(self, request: RequestView, tokens: int) -> Mapping[str, Any] | None:
        """A ticket for blocks that are going to be computed; None if nobody can be served."""
        # What is computed where nobody can read it is not sent while it is.
        if tokens <= 0 or self._life.options.stage or self._grant(request.id, (), tokens) is None:
            return None
        nothing: Ids = ((),) * len(self._life.geometry.groups)
        ticket = self._issue(request, self._kept[request.id].lease, nothing, tokens, push_only=True)
        if ticket is None:
            self.leases.force(request.id)
        return ticket

    def computes(self, request: str, blocks: Blocks, first: int, stop: int) -> None:
        """A promised request's tokens are computed in this step: whoever has registered gets them layer by layer."""
        kept = self._kept.get(request)
        if kept is not None and not kept.filled and kept.targets and first < stop:
            self._said.sends.append(Send(request, ids(blocks), first, stop, kept.lease.names))

    def finish(self, request: RequestView, blocks: Blocks, tokens: int, *, aborted: bool) -> Retention:
        """The request has ended: keep what was promised, or is asked for now."""
        held = ids(blocks)
        if aborted or tokens <= 0 or not any(held):
            self.abort(request.id)
            return Retention(False)
        if self._life.options.stage:
            return self._put(request, held, tokens) if request.hand_over else Retention(False)
        kept = self._kept.get(request.id)
        if kept is not None and not kept.filled and kept.lease.ended is None:
            served = self._fill(kept, held, tokens)
        elif not request.hand_over:
            return Retention(False)
        else:
            kept, served = self._grant(request.id, held, tokens), False
            if kept is None:
                self._life.counts.add("kv_leases_refused_total")
                return Retention(False)
        if served:
            return Retention(True)
        issued = self._issue(request, kept.lease, held, tokens)
        if issued is None:
            # What nobody can be told of is kept for nobody; the engine hears of it by `Step.released`.
            self.leases.force(request.id)
        return Retention(True, issued)

    def _put(self, request: RequestView, held: Ids, tokens: int) -> Retention:
        """Keep what the request's blocks hold in staging memory, and the blocks until it is there."""
        staged = None if self._shelf.copying(request.id) else self._shelf.take(held, tokens)
        kept = self._grant(request.id, staged, tokens) if staged is not None else None
        if kept is None or staged is None:
            self._life.counts.add("kv_leases_refused_total")
            if staged is not None:
                self._shelf.give(staged)
            return Retention(False)
        mark = self._said.marks.pop()  # nobody may believe the blocks before they are copied
        kept.filled = False
        issued = self._issue(request, kept.lease, staged, tokens, later=True)
        copy = Copy(request.id, kept.lease.epoch, tokens, held, staged)
        if issued is None:
            self.leases.force(request.id)
        else:
            self._said.copies.append(copy)
        self._shelf.put(copy, mark, () if issued is None else range(self._life.ranks))
        return Retention(issued is not None, issued)

    def copied(self, rank: int, result: Result) -> None:
        """A rank has copied a request's blocks to staging memory, or could not."""
        epoch = int(result.proof) if result.proof.isdigit() else 0
        try:
            copied = self._shelf.said(rank, epoch, result.cause)
        except KeyError:
            self._life.counts.add("kv_results_refused_total")
            return
        if copied is None:
            return
        self._copied.append(copied.request)
        kept = self._kept.get(copied.request)
        if kept is None or kept.lease.epoch != epoch:
            return
        if copied.mark is None:
            self._refuse(kept, "aborted")
            self.leases.force(copied.request)
        else:
            kept.filled = True
            self._said.marks.append(copied.mark)
            self._send(kept)

    def abort(self, request: str) -> None:
        """What was promised will not be; whoever registered for it is told."""
        kept = self._kept.get(request)
        if kept is not None and not kept.filled:
            self._refuse(kept, "aborted")
            self.leases.force(request)

    def step(self, now: float) -> tuple[list[str], Said]:
        """Whose blocks are free from now on, and what movers are to do before anybody uses them."""
        self.leases.expire(now)
        released, self._copied = self._copied, []
        for lease in self.leases.released():
            kept = self._kept.pop(lease.request)
            if lease.ended != "acknowledged" or not kept.filled:
                self._refuse(kept, "expired")
            staged = self._shelf.end(lease.epoch)
            if not staged and not kept.filled:  # its blocks are the engine's, which computes or has given up
                continue
            if not staged:
                released.append(lease.request)
            marks = self._generations.let_go(lease.epoch)
            if marks:
                self._said.marks.append(Mark(let_go(self._last), marks.blocks))
        out, self._said = self._said, Said()
        return released, out

    def _grant(self, request: str, blocks: Ids, tokens: int) -> _Kept | None:
        life, now = self._life, time.monotonic()
        readers = dict.fromkeys(range(life.ranks), 0)
        lease = self.leases.grant(request, life.incarnation, blocks, readers, life.options.lease, now)
        if lease is None:
            return None
        kept = self._kept[request] = _Kept(lease, tokens, bool(blocks))
        self._hold(lease)
        return kept

    def _hold(self, lease: Lease) -> None:
        self._last = lease.epoch
        if any(lease.blocks):
            self._said.marks.append(Mark(lease.epoch, self._generations.hold(lease.epoch, lease.blocks).blocks))

    def _fill(self, kept: _Kept, blocks: Ids, tokens: int) -> bool:
        """The promised blocks are computed; whether anybody has registered for them."""
        lease = self.leases.fill(kept.lease.request, blocks)
        assert lease is kept.lease
        self._hold(lease)
        kept.filled, kept.tokens = True, tokens
        for key, target in list(kept.targets.items()):
            if not self._suits(kept, target.stop):
                self._refuse_one(key, target, "tokens")
                del kept.targets[key]
        self._send(kept)
        return bool(kept.targets)

    def _issue(
        self,
        request: RequestView,
        lease: Lease,
        blocks: Ids,
        tokens: int,
        *,
        push_only: bool = False,
        later: bool = False,
    ) -> Mapping[str, Any] | None:
        life, now = self._life, time.time()
        ticket = tickets.Ticket(
            engine=life.engine, incarnation=life.incarnation, group=life.options.path, request=request.id,
            epoch=lease.epoch, tokens=tokens, blocks=blocks, tp=life.ranks, issued=now,
            expires=now + life.options.lease, tenant=life.tenant(request), push_only=push_only, later=later,
        )  # fmt: skip
        try:
            issued = tickets.issue(ticket, life.secret)
        except TicketInvalid as error:
            life.counts.add("kv_tickets_refused_total", cause=error.cause)
            return None
        life.counts.add("kv_tickets_total", what="issued")
        return issued

    # -- what consumers say

    def heard(self, message: messages.Message, rank: int, now: float) -> None:
        """What a rank of a consumer says to a rank of ours."""
        match message:
            case messages.Heartbeat():
                for held in message.held:
                    self.leases.renew(held.request, held.epoch, Consumer(message.sender, message.rank), now)
            case messages.Ack() if message.producer_rank == rank:
                who = Consumer(message.sender, message.rank)
                self.leases.acknowledge(message.request, message.epoch, rank, who, now, message.readers)
            case messages.PushRegistration():
                self._registered(message, rank, now)
            case messages.Withdraw():
                self._withdrawn(message, rank, now)

    def _registered(self, message: messages.PushRegistration, rank: int, now: float) -> None:
        lease = self.leases.find(message.request, message.epoch, now)
        key = rank, message.sender, message.rank
        cause = ""
        if not isinstance(lease, Lease):
            self.leases.refused[lease] += 1
            cause = lease
        elif key in (kept := self._kept[message.request]).targets:
            # No answer: whoever waits for one has the first registration's, and would take this for it.
            self._life.counts.add("kv_messages_refused_total", cause="again")
            return
        elif key in kept.withdrawn:
            cause = "withdrawn"
        elif lease.tally(message.sender) is None:
            cause = "ended"  # one consumer too many: for this one there is no lease
        elif not self._suits(kept, message.stop):
            cause = "tokens"
        target = Target(
            message.engine, message.sender, message.rank, message.request, message.epoch, message.blocks,
            message.first, message.stop, message.seconds,
        )  # fmt: skip
        if cause:
            self._refuse_one(key, target, cause)
            return
        kept.targets[key] = target
        self._said.pushes.append(Push(rank, target))
        if kept.filled:
            self._send(kept)

    def _withdrawn(self, message: messages.Withdraw, rank: int, now: float) -> None:
        key = rank, message.sender, message.rank
        lease = self.leases.find(message.request, message.epoch, now)
        if isinstance(lease, Lease):
            kept = self._kept[message.request]
            kept.withdrawn.add(key)
            kept.targets.pop(key, None)
        whom = message.engine, message.sender, message.rank
        self._said.refusals.append(Refuse(rank, *whom, message.request, message.epoch, "withdrawn"))

    def _suits(self, kept: _Kept, stop: int) -> bool:
        """Whether tokens up to there can be had. A state is that of all tokens."""
        return stop == kept.tokens if self._life.states else stop <= kept.tokens

    def _send(self, kept: _Kept) -> None:
        lease = kept.lease
        if kept.targets and not any(send.word == lease.epoch for send in self._said.sends):
            self._said.sends.append(Send(lease.request, lease.blocks, 0, kept.tokens, lease.names, lease.epoch))

    def _refuse(self, kept: _Kept, cause: str) -> None:
        for key, target in kept.targets.items():
            self._refuse_one(key, target, cause)
        kept.targets.clear()

    def _refuse_one(self, key: _Key, target: Target, cause: str) -> None:
        whom = target.engine, target.incarnation, target.reader
        self._said.refusals.append(Refuse(key[0], *whom, target.request, target.epoch, cause))

    # -- what operators say, and see

    def list(self) -> Sequence[Mapping[str, Any]]:
        """What is kept, for people."""
        return self.leases.list(time.monotonic())

    def count(self) -> None:
        """Bring counters up to date."""
        counts = self._life.counts
        for ending, times in self.leases.endings.items():
            counts.set("kv_leases_ended_total", times, cause=ending)
        for cause, times in self.leases.refused.items():
            counts.set("kv_messages_refused_total", times, cause=f"late_{cause}")
        counts.set("kv_leases", len(self.leases))
