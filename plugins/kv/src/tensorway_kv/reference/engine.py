"""The reference engine's scheduler: admits requests, computes steps, and calls a connector as the contract says.

May import the core and this package's model, cache, ranks and requests. One thread uses it, and it never waits but for
its ranks. In each step: requests get blocks (`lookup`, `reserve`), tokens are chosen to be computed, the planner says
what it has decided (`plan_step`), every rank begins its plan before any rank writes a page, the layers are computed,
and what movers say goes to the planner (`on_results`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from tensorway.errors import DeadlineExceeded, OptionsInvalid
from tensorway.kv import Event, Planner, RequestView
from tensorway.metrics import Sample
from tensorway_kv.reference.cache import BlockPool, names_of
from tensorway_kv.reference.model import MAX_TOKENS, Model, ModelShape
from tensorway_kv.reference.rank import IDLE, EngineOptions, LocalRanks, Ranks, Row, Work, Worker, parts_of
from tensorway_kv.reference.requests import Outcome, Request, Running

#: Events that are kept for who asks.
_EVENTS: Final = 4096


def alone(shape: ModelShape, options: EngineOptions | None = None) -> Engine:
    """An engine in this process that hands nothing over."""
    options = options or EngineOptions()
    workers = [Worker(*parts_of(shape, options, rank), None, options) for rank in range(options.tp)]
    return Engine(shape, options, LocalRanks(workers))


class Engine:
    """Requests in, outcomes out, a step at a time."""

    def __init__(self, shape: ModelShape, options: EngineOptions, ranks: Ranks, planner: Planner | None = None) -> None:
        self._options, self.ranks, self._planner = options, ranks, planner
        self._model, self.pool = Model(shape), BlockPool(options.blocks)
        layerwise = options.layerwise and planner is not None and planner.capabilities.layerwise
        self._layerwise: Any = planner if layerwise else None
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        #: Blocks of requests that have ended, until the planner says that nobody reads them any more.
        self._kept: dict[str, list[int]] = {}
        self._known: set[str] = set()
        self._outcomes: dict[str, Outcome] = {}
        self.events: deque[Event] = deque(maxlen=_EVENTS)

    # -- for who asks

    def submit(self, request: Request) -> Mapping[str, Any] | None:
        """Take a request; if its blocks are promised to another engine from now on, the ticket."""
        self._check(request)
        self._known.add(request.id)
        names = names_of(request.tokens, self._options.page_tokens, request.salt)
        view = RequestView(
            request.id, len(request.tokens), request.ticket, tuple(names), request.salt, request.hand_over
        )
        running = Running(request, view, list(request.tokens), names)
        if request.hand_over and self._layerwise is not None:
            running.promised = self._layerwise.promise(view, len(request.tokens))
        self._waiting.append(running)
        return running.promised

    def take(self, request: str) -> Outcome | None:
        """What became of it, once."""
        return self._outcomes.pop(request, None)

    def cancel(self, request: str) -> None:
        """Nobody wants it any more, nor what is kept of it."""
        if self._planner is not None:
            self._planner.cancel(request)
        for one in [one for one in (*self._waiting, *self._running) if one.id == request]:
            if one.phase in ("handed", "unsure"):
                one.phase = "ending"  # its blocks are written to until the planner says so
            else:
                self._end(one, aborted=True)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do, or to be said."""
        return bool(
            self._waiting or self._running or self._kept or (self._planner is not None and self._planner.busy())
        )

    def run(self, seconds: float) -> None:
        """Go on until nothing is to be done."""
        until = time.monotonic() + seconds
        while self.busy:
            if time.monotonic() > until:
                states = ", ".join(f"{one.id} {one.phase}" for one in (*self._waiting, *self._running))
                true = f"After {seconds:g} s there are {states or 'no requests'}, and {len(self._kept)} are kept."
                raise DeadlineExceeded("An engine was to end what it has to do.", true, "Give it more time.")
            if not self.step():
                time.sleep(IDLE)

    def reset(self) -> None:
        """Forget all content: the weights are others now."""
        self.pool.forget()
        if self._planner is not None:
            self._planner.reset()

    def statistics(self) -> list[Sample]:
        """What planner and movers have counted."""
        own = list(self._planner.statistics()) if self._planner is not None else []
        return own + self.ranks.statistics()

    def _check(self, request: Request) -> None:
        asked, least = f"Request {request.id!r} was to be computed.", len(request.tokens) + request.count
        most = min(self._options.blocks * self._options.page_tokens, MAX_TOKENS)
        known = self._model.shape.vocabulary
        if request.id in self._known:
            raise OptionsInvalid(asked, "There was one of that name.", "Give each request a name of its own.")
        if not request.tokens or request.count < 1 or least > most:
            true = f"It has {len(request.tokens)} tokens and wants {request.count}; the cache has {most}."
            raise OptionsInvalid(asked, true, "Ask for at least one token, of at least one, and no more than that.")
        if not all(0 <= token < known for token in request.tokens):
            raise OptionsInvalid(asked, f"Some of its tokens are not below {known}.", "Give tokens of this model.")

    # -- one step

    def step(self) -> bool:
        """Everything once; whether anything was computed."""
        self._admit()
        rows = self._rows()
        work = Work(rows=tuple(Row(tuple(one.blocks), first, stop) for one, first, stop in rows))
        if self._layerwise is not None:
            for one, first, stop in rows:
                if one.promised is not None:
                    self._layerwise.computes(one.view, [one.blocks], first, stop)
        plan = self._plan()
        self.ranks.begin(Work(plan, work.rows, any(one.phase == "unsure" for one, _, _ in rows)))
        hidden = self._computed(rows)
        self._heard(self.ranks.end())
        self._advance(rows, hidden)
        return bool(rows)

    def _plan(self) -> bytes:
        """What the planner has decided; what it says of requests is true of what was computed before."""
        if self._planner is None:
            return b""
        step = self._planner.plan_step()
        for request in step.released:
            self.pool.give(self._kept.pop(request, ()))
        for request in step.received:
            self._arrived(request, None)
        for request, good in step.failed.items():
            self._arrived(request, good)
        self.events.extend(self._planner.events())
        return step.plan

    def _heard(self, said: Sequence[Sequence[Any]]) -> None:
        for rank, results in enumerate(said):
            if results and self._planner is not None:
                self._planner.on_results(rank, results)

    def _computed(self, rows: Sequence[tuple[Running, int, int]]) -> Any:
        if not rows:
            return None
        hidden = np.concatenate([self._model.embedded(one.tokens[first:stop]) for one, first, stop in rows])
        for layer in range(self._model.shape.layers):
            heads = self.ranks.attend(layer, hidden.astype(np.float32))
            hidden = self._model.mixed(layer, hidden, np.concatenate(heads, axis=1).astype(np.float64))
        return hidden

    # -- blocks

    def _admit(self) -> None:
        """Give blocks to who waits, in order; who is not told yet what can be had lets others go first."""
        for one in list(self._waiting):
            hits = self.pool.find(one.names[: (len(one.tokens) - 1) // self._options.page_tokens])
            have = len(hits) * self._options.page_tokens
            tokens, mode = self._looked_up(one, have)
            if mode == "later":
                continue
            self.pool.hold(hits)
            fresh = self.pool.take(self._needed(len(one.tokens) + one.request.count * bool(one.promised)) - len(hits))
            if fresh is None:
                self.pool.give(hits)
                return
            self._waiting.remove(one)
            self._running.append(one)
            one.blocks, one.named, one.computed = hits + fresh, len(hits), have
            one.phase = "computing"
            if not one.reserved:
                self._reserve(one, have, tokens)

    def _looked_up(self, one: Running, have: int) -> tuple[int, str]:
        """How many tokens can be had beyond those that are here; of a request that was asked for once, none."""
        if self._planner is None or one.reserved:
            return 0, "nothing"
        match = self._planner.lookup(one.view, have)
        if match.mode == "later" and time.monotonic() - one.began > self._options.patience:
            return 0, "nothing"
        return match.tokens, match.mode

    def _reserve(self, one: Running, have: int, tokens: int) -> None:
        one.reserved, one.cached = True, have
        if self._planner is None:
            return
        # Also for nothing: who keeps blocks for the request need not any more.
        self._planner.reserve(one.view, [one.blocks], have, tokens)
        if tokens:
            one.mark("reserved")
            one.expected = have + tokens
            one.phase = "unsure" if self._layerwise is not None else "handed"
            if one.phase == "unsure":
                one.go_on_from(one.expected)

    def _needed(self, tokens: int) -> int:
        return -(-tokens // self._options.page_tokens)

    def _arrived(self, request: str, good: int | None) -> None:
        """Its blocks are there; or have failed, and so many tokens are good. Who lacked nothing hears of it, too."""
        one = next((one for one in self._running if one.id == request and one.expected), None)
        if one is None:
            return
        one.mark("heard")
        expected, one.expected = one.expected, 0
        if one.phase == "ending":
            self._end(one, aborted=True)
            return
        if good is None:
            one.handed += expected - one.cached
            if one.phase == "handed":
                one.go_on_from(expected)
        else:
            one.handed += max(0, good - one.cached)
            one.failed += expected - good
            one.guess = None
            one.go_on_from(good)
        one.phase = "computing"
        self._name(one, one.computed)
        if one.guess is not None:
            self._choose(one, one.guess)

    def _name(self, one: Running, tokens: int) -> None:
        """Blocks that are full are known by their content from now on."""
        full = min(tokens // self._options.page_tokens, len(one.names))
        for index in range(one.named, full):
            self.pool.name(one.blocks[index], one.names[index])
        one.named = max(one.named, full)

    # -- what is computed

    def _rows(self) -> list[tuple[Running, int, int]]:
        """Who computes which tokens in this step: in the order in which they came."""
        rows: list[tuple[Running, int, int]] = []
        budget = self._options.chunk
        for one in list(self._running):
            ready = one.phase == "computing" or (one.phase == "unsure" and "computing" not in one.marks)
            stop = min(len(one.tokens), one.computed + budget)
            if ready and stop > one.computed and self._has_room(one, stop, [row[0] for row in rows]):
                one.mark("computing")
                rows.append((one, one.computed, stop))
                budget -= stop - one.computed
        return rows

    def _has_room(self, one: Running, stop: int, chosen: list[Running]) -> bool:
        """Whether it has blocks for so many tokens; others that came later may lose theirs for it."""
        while one in self._running:
            lacking = self._needed(stop) - len(one.blocks)
            if lacking <= 0:
                return True
            fresh = self.pool.take(lacking)
            if fresh is not None:
                one.blocks += fresh
                continue
            victims = [
                other
                for other in self._running
                if other.phase == "computing" and other.promised is None and other not in chosen
            ]
            if not victims:
                return False
            self._preempt(victims[-1])
        return False

    def _preempt(self, one: Running) -> None:
        """Take its blocks; it comes back as a longer prompt."""
        self._running.remove(one)
        self._waiting.appendleft(one)
        self.pool.give(one.blocks)
        one.names = names_of(one.tokens, self._options.page_tokens, one.request.salt)
        one.blocks, one.computed, one.named, one.phase = [], 0, 0, "waiting"
        one.preempted += 1

    def _advance(self, rows: Sequence[tuple[Running, int, int]], hidden: Any) -> None:
        at = 0
        for one, first, stop in rows:
            at += stop - first
            one.computed, one.computed_here = stop, one.computed_here + stop - first
            follows = self._model.chosen(hidden[at - 1]) if stop == len(one.tokens) else None
            if one.phase == "unsure":
                one.guess = follows
                continue
            self._name(one, stop)
            if follows is not None:
                self._choose(one, follows)

    def _choose(self, one: Running, token: int) -> None:
        one.tokens.append(token)
        one.guess = None
        one.mark("chosen")
        if len(one.chosen) == one.request.count:
            self._end(one)

    def _end(self, one: Running, *, aborted: bool = False) -> None:
        """It is over; its blocks are free, or kept for another engine."""
        (self._running if one in self._running else self._waiting).remove(one)
        if not aborted:  # also what was chosen here may come again, as part of a longer prompt
            one.names = names_of(one.tokens[: one.computed], self._options.page_tokens, one.request.salt)
            self._name(one, one.computed)
        used = one.blocks[: self._needed(one.computed)]
        self.pool.give(one.blocks[len(used) :])
        ticket, keep = None, False
        if self._planner is not None:
            retention = self._planner.finish(one.view, [used], one.computed, aborted=aborted)
            ticket, keep = retention.ticket, retention.keep
        if keep:
            self._kept[one.id] = used
        else:
            self.pool.give(used)
        self._outcomes[one.id] = one.outcome(ticket or one.promised, aborted=aborted)
