"""Requests whose blocks come from elsewhere: which child is asked, and which one next when that fails.

May import the core and this package's failover, children, tickets and options. A child fails a request only when its
pages are safe, so the next one may begin at once, where the good tokens end. One that holds blocks for the request by
a ticket is kept as a fall-back until the request has ended, and is then told that they are not needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final, get_args

import attrs

from tensorway.errors import TicketInvalid
from tensorway.kv import Blocks, Group, Match, Planner, RequestView
from tensorway.metrics import Counters
from tensorway_kv.failover import Attempt, Cause, Chain, Peers
from tensorway_kv.failover import Source as Link
from tensorway_kv.several import tickets
from tensorway_kv.several.children import Child, below
from tensorway_kv.several.options import SeveralOptions
from tensorway_kv.several.plans import Begun

_NOTHING: Final = Match(0, "nothing")
_LATER: Final = Match(0, "later")
#: Seconds after which a child that was told to give something up is told again.
_AGAIN: Final = 1.0
#: Seconds that a request is remembered which nobody reserved, and one of which a child was told that it is over.
_REMEMBERED: Final = 3600.0
_LEAVING: Final = 120.0
#: Longest pause of a peer that could not be reached: which life it was we do not know, and the next one is another.
_PAUSE: Final = 5.0
_CAUSES: Final = frozenset(get_args(Cause))
_NUMBERED: Final = re.compile(r"\d+/", re.ASCII)


def named(request: str, number: int = 0) -> str:
    """What a child calls a request that it was given the ticket of this number for; no two are called the same."""
    return f"{number}/{request}" if number or _NUMBERED.match(request) else request


@attrs.define(eq=False)
class Source:
    """A child that may have the blocks, as one request sees it."""

    name: str
    child: Child[Planner]
    #: The request as this child is told of it.
    view: RequestView
    #: The peer behind it, for pauses of all requests together.
    peer: str = ""
    #: Whether it was asked, so that it may hold something for the request; and whether it was given the blocks.
    asked: bool = False
    given: bool = False
    #: It raised over this request.
    broken: bool = False
    #: When it first said that it does not know yet.
    later: float | None = None

    @property
    def key(self) -> tuple[str, str]:
        """By which it is found again."""
        return self.child.name, self.view.id

    @property
    def holds(self) -> bool:
        """Whether somebody may keep blocks for the request that it was never given."""
        return self.view.ticket is not None and not self.given


@attrs.define(eq=False)
class Load:
    """One request."""

    view: RequestView
    sources: list[Source]
    since: float
    chain: Chain | None = None
    blocks: Blocks = ()
    have: int = 0
    tokens: int = 0
    #: Who has the blocks now, which tokens it loads, and why it failed, if a rank has said that.
    current: Source | None = None
    start: int = 0
    stop: int = 0
    cause: str = ""
    #: Nobody else is to be tried: it was given up, or what could be looked up is forgotten.
    over: bool = False
    cancelled: bool = False
    #: How many were given the blocks, and whether the engine computed with some layers before all were here.
    gives: int = 0
    computed: bool = False
    #: When the child was last told to give it up.
    told_at: float = -math.inf
    #: The fewest tokens that a child has left good, below those that it began with.
    lowest: int | None = None

    @property
    def good(self) -> int:
        """Tokens that are good if it ends now."""
        assert self.chain is not None
        return self.chain.good if self.lowest is None else min(self.lowest, self.chain.good)


class Loads:
    """All of them."""

    def __init__(
        self, children: Sequence[Child[Planner]], options: SeveralOptions, groups: Sequence[Group], counts: Counters
    ) -> None:
        self._children = [child for child in children if child.options.load]
        self._deadline, self._groups, self._counts = options.deadline, tuple(groups), counts
        self._align = math.lcm(*(group.block_tokens for group in self._groups if group.block_tokens))
        self._peers = Peers(longest=_PAUSE)
        self._known: dict[str, Load] = {}
        #: Who has blocks now, by child and what it calls the request.
        self._given: dict[tuple[str, str], Load] = {}
        #: Who was told that a request is over and may still say so, and until when that is waited for.
        self._leaving: dict[tuple[str, str], float] = {}
        self._begun: list[Begun] = []
        self._received: dict[str, None] = {}
        self._failed: dict[str, int] = {}

    @property
    def busy(self) -> bool:
        """Whether something is under way, or still to be said."""
        return bool(self._received or self._failed or any(one.chain is not None for one in self._known.values()))

    def take(self) -> tuple[list[str], dict[str, int], tuple[Begun, ...]]:
        """What ended and what began since the last call."""
        out = list(self._received), self._failed, tuple(self._begun)
        self._received, self._failed, self._begun = {}, {}, []
        return out

    # -- what the engine asks

    def lookup(self, request: RequestView, have: int, now: float) -> Match:
        """What the first child that has anything has; who does not know yet is waited for no longer than is said."""
        load = self._find(request, now)
        if load is None:
            return _NOTHING
        self._claim(load, have)
        for source in load.sources:
            match = self._ask(source, have)
            if match.mode == "later":
                source.later = now if source.later is None else source.later
                if now - source.later < source.child.options.patience:
                    return _LATER
            elif match.tokens:
                sources = match.sources or {"": match.tokens}
                return attrs.evolve(match, sources={below(source.name, key): n for key, n in sources.items()})
        return _NOTHING

    def reserve(self, request: RequestView, blocks: Blocks, have: int, tokens: int, now: float) -> None:
        """Load `tokens` beyond `have`; for none, say only that nothing is needed."""
        load = self._find(request, now)
        if load is None:
            return
        if min(have, tokens) < 0:
            self._forget(load)
            self._failed[request.id] = max(have, 0)
            return
        load.blocks, load.have, load.tokens = [list(map(int, ids)) for ids in blocks], have, have + tokens
        if tokens:
            self._claim(load, have)
        links = [self._link(source) for source in load.sources]
        load.chain = Chain(links, load.tokens, self._peers, now, have=have, deadline=self._deadline)
        self._go(load, now)

    def cancel(self, request: str, now: float) -> None:
        """Nobody wants it any more."""
        load = self._known.get(request)
        if load is None:
            return
        if load.chain is None:
            self._forget(load)
            return
        load.over = load.cancelled = True
        if load.current is None:
            self._end(load, now)
        else:
            self._give_up(load, load.current, now)

    def ended(self, request: str, now: float) -> None:
        """The engine has ended the request: what was only looked up for it is needed by nobody."""
        load = self._known.get(request)
        if load is not None and load.chain is None:
            del self._known[request]
            self._dismiss(load, now)

    def reset(self) -> None:
        """What is under way has no other source any more, and what was looked up is asked for anew."""
        for load in list(self._known.values()):
            if load.chain is None:
                self._forget(load)
            load.over = True

    # -- what children say

    def received(self, child: Child[Planner], inner: str, now: float) -> bool:
        """A child has loaded what it was asked for; whether it was asked."""
        load = self._take(child, inner)
        if load is None:
            return self._leaving.pop((child.name, inner), None) is not None
        chain, attempt, source = _under_way(load)
        child.well()
        self._peers.reached(source.peer or source.name, "")
        if chain.done(attempt, load.stop, now) is not None:
            self._fell_back(source, "short")
        self._go(load, now)
        return True

    def failed(self, child: Child[Planner], inner: str, tokens: int, now: float) -> bool:
        """A child could not, and its pages are safe; whether it was asked."""
        load = self._take(child, inner)
        if load is None:
            return self._leaving.pop((child.name, inner), None) is not None
        self._next(load, self._why(load), tokens, now)
        return True

    def said(self, child: str, inner: str, cause: str) -> None:
        """A rank of a child has failed, and why; a word about what nobody asked for changes nothing."""
        load = self._given.get((child, inner))
        if load is not None and not load.cause:
            load.cause = cause

    def computed(self, request: str) -> None:
        """The engine computes with layers as they come, and what a source that failed has left is none."""
        load = self._known.get(request)
        if load is not None:
            load.computed = True

    def lost(self, child: Child[Planner], now: float) -> None:
        """A child has ended on all ranks: nothing of it touches a page any more."""
        for key in [key for key in self._given if key[0] == child.name]:
            load = self._take(child, key[1])
            if load is not None:
                self._next(load, "lost", load.start, now)

    def advance(self, now: float) -> None:
        """Whatever has had its time, or whose pause is over."""
        for load in list(self._known.values()):
            if load.chain is None:
                if now - load.since > _REMEMBERED:
                    self._forget(load)
            elif load.current is None:
                self._go(load, now)
            elif load.cancelled or load.chain.overdue(now):
                self._give_up(load, load.current, now)
        for key in [key for key, until in self._leaving.items() if until <= now]:
            del self._leaving[key]

    # -- inside: one request

    def _find(self, request: RequestView, now: float) -> Load | None:
        """A request that is not reserved yet; None for one that is, also if what became of it is still to be said."""
        load = self._known.get(request.id)
        if request.id in self._received or request.id in self._failed or (load is not None and load.chain is not None):
            return None
        if load is not None and load.view.ticket == request.ticket:
            return load
        if load is not None:
            self._forget(load)
        load = self._known[request.id] = Load(request, list(self._sources(request)), now)
        return load

    def _sources(self, request: RequestView) -> Iterator[Source]:
        parts: dict[str, tuple[tickets.Ticket, ...]] = {}
        if request.ticket is not None:
            try:
                parts = tickets.split(request.ticket, [child.name for child in self._children])
            except TicketInvalid as error:
                self._counts.add("kv_tickets_refused_total", cause=error.cause)
        for child in self._children:
            for number, ticket in enumerate(parts.get(child.name) or (None,)):
                view = attrs.evolve(request, id=named(request.id, number), ticket=ticket)
                key = child.name, view.id
                if key not in self._leaving and key not in self._given:
                    yield Source(child.name, child, view)

    def _claim(self, load: Load, have: int) -> None:
        """Ask all that have a ticket: its blocks are kept for us while another is tried, and it is nobody else's."""
        for source in load.sources:
            if source.view.ticket is not None and not source.asked:
                self._ask(source, have)

    def _ask(self, source: Source, have: int) -> Match:
        """What it has; nothing from one that has raised over this request."""
        if source.broken:
            return _NOTHING
        source.asked = True
        raised = Match(-1, "nothing")
        match = source.child.call(raised, source.child.side.lookup, source.view, have)
        source.broken = match is raised
        if len(match.sources) == 1 and source.view.ticket is not None:
            source.peer = below(source.name, next(iter(match.sources)))
        return _NOTHING if match.mode == "nothing" or (match.tokens <= 0 and match.mode != "later") else match

    def _link(self, source: Source) -> Link:
        options = source.child.options
        return Link(
            "\n".join(source.key),
            "tier" if source.view.ticket is None else "peer",
            tries=options.tries,
            deadline=options.deadline,
            patience=options.patience,
            peer=source.peer or source.name,
        )

    def _go(self, load: Load, now: float) -> None:
        """Give the blocks to whom it is the turn of, as soon as its pause is over; or come to an end."""
        chain = load.chain
        assert chain is not None
        while (attempt := chain.attempt) is not None and not load.over:
            if now < attempt.begin:
                return
            source = next(one for one in load.sources if "\n".join(one.key) == attempt.source.name)
            span = self._span(load, source)
            if span is None and now < attempt.begin + attempt.source.patience:
                return
            if span and self._give(load, source, *span):
                return
            cause: Cause = "missing" if not span else "refused"
            if chain.next(attempt, cause, chain.good, now) is not None:
                self._fell_back(source, cause)
        self._end(load, now)

    def _span(self, load: Load, source: Source) -> tuple[int, int] | tuple[()] | None:
        """Which tokens it can load; none, or None as long as it does not know."""
        chain = load.chain
        assert chain is not None
        match, start = self._ask(source, chain.good), chain.good
        if not match.tokens and match.mode != "later" and start % self._align:
            # One that has whole blocks only writes the last good tokens again.
            start = max(load.have, start // self._align * self._align)
            match = self._ask(source, start) if start < chain.good else match
        if match.mode == "later" and not match.tokens:
            return None
        stop = min(start + match.tokens, load.tokens)
        return (start, stop) if stop > chain.good and (stop == load.tokens or self._divisible(load)) else ()

    def _divisible(self, load: Load) -> bool:
        """Whether the first of its tokens are of use alone: no state, and lists that begin with the first block."""
        return bool(self._groups) and all(
            group.block_tokens and len(ids) * group.block_tokens >= load.tokens
            for group, ids in zip(self._groups, load.blocks, strict=False)
        )

    def _give(self, load: Load, source: Source, start: int, stop: int) -> bool:
        """Let a child load these tokens; whether it took them."""
        chain, blocks = load.chain, load.blocks
        assert chain is not None
        if stop < load.tokens:
            blocks = [ids[: -(-stop // group.block_tokens)] for group, ids in zip(self._groups, blocks, strict=False)]
        if not source.child.does(source.child.side.reserve, source.view, blocks, start, stop - start):
            source.broken = True
            source.child.does(source.child.side.cancel, source.view.id)
            return False
        chain.rewind(start)
        load.current, load.start, load.stop, load.cause = source, start, stop, ""
        load.told_at, source.given = -math.inf, True
        load.gives += 1
        self._given[source.key] = load
        self._begun.append(Begun(load.view.id, *source.key))
        return True

    def _give_up(self, load: Load, source: Source, now: float) -> None:
        if now - load.told_at >= _AGAIN:
            load.told_at = now
            source.child.does(source.child.side.cancel, source.view.id)

    def _take(self, child: Child[Planner], inner: str) -> Load | None:
        """The request that the child has blocks of, which are ours again."""
        return self._given.pop((child.name, inner), None)

    def _why(self, load: Load) -> Cause:
        if load.cause == "cancelled" and load.told_at == -math.inf:
            load.over = True  # a mover was told to
        if load.told_at > -math.inf:
            return "deadline"
        cause: Any = load.cause if load.cause in _CAUSES else "failed" if load.cause else "refused"
        found: Cause = cause
        return found

    def _next(self, load: Load, cause: Cause, tokens: int, now: float) -> None:
        chain, attempt, source = _under_way(load)
        if tokens < load.start:
            load.lowest = max(0, tokens if load.lowest is None else min(load.lowest, tokens))
        chain.next(attempt, cause, min(tokens, load.stop), now)
        if chain.attempt is not None and not load.over:
            self._fell_back(source, cause)
        load.cause = cause
        self._go(load, now)

    def _fell_back(self, source: Source, cause: Cause) -> None:
        self._counts.add("kv_fallbacks_total", peer=source.peer or source.name, cause=cause)

    def _end(self, load: Load, now: float) -> None:
        """Say what became of it, and to those that still hold something that it is not needed."""
        chain, request = load.chain, load.view.id
        assert chain is not None
        self._known.pop(request, None)
        if chain.finished and not (load.computed and load.gives > 1):
            self._received[request] = None
        else:  # all tokens may be good now, and what the engine computed with those of the first source is not
            self._failed[request] = load.good
        if load.cancelled:
            self._abandon(load)
        else:
            self._dismiss(load, now)

    def _dismiss(self, load: Load, now: float) -> None:
        """Who holds blocks by a ticket is told that they are not needed; what a child has else of it, it keeps."""
        for source in load.sources:
            if source.holds and not source.broken:
                self._leaving[source.key] = now + _LEAVING
                source.child.does(source.child.side.reserve, source.view, (), 0, 0)

    def _abandon(self, load: Load) -> None:
        """Nobody wants the request any more: whoever was asked may forget all of it."""
        for source in load.sources:
            if source.asked and not source.given:
                source.child.does(source.child.side.cancel, source.view.id)

    def _forget(self, load: Load) -> None:
        """Nobody has blocks of it, and nobody wants it."""
        del self._known[load.view.id]
        self._abandon(load)


def _under_way(load: Load) -> tuple[Chain, Attempt, Source]:
    chain, source, load.current = load.chain, load.current, None
    assert chain is not None and chain.attempt is not None and source is not None
    return chain, chain.attempt, source
