"""The planner of `several`: asks its children in their order, and gives each what is its own.

May import the core and this package's children, loads, keeps, plans and tickets. One thread uses it, and nothing here
waits. What a child raises is that child's failure: its requests go on to the next one, and the engine does not hear
of it. A child that is out of use is closed on all ranks before anybody else touches the pages that it may write to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import attrs

from tensorway._logging import logger
from tensorway.errors import Closed, DescriptionInvalid
from tensorway.kv import METRICS, Blocks, Event, KVContext, Match, Planner, RequestView, Result, Retention, Step
from tensorway.metrics import Counters, Sample
from tensorway_kv.several import plans, tickets
from tensorway_kv.several.children import Child, below, check_layers, close, opened, parted, samples, together
from tensorway_kv.several.keeps import Keeps
from tensorway_kv.several.loads import Loads, named
from tensorway_kv.several.options import SeveralOptions

_log = logger("kv")
_EMPTY: Final = Step()
_UNKEPT: Final = Retention(False)
_NOTHING: Final = Match(0, "nothing")


class SeveralPlanner:
    """See `tensorway.kv.contract.LayerwisePlanner`."""

    def __init__(self, options: SeveralOptions, context: KVContext) -> None:
        self._ranks = context.ranks
        self._counts = Counters(METRICS, backend="several", engine=context.engine)
        self._children: list[Child[Planner]] = opened(options, context, Planner)  # type: ignore[type-abstract]
        self._by_name = {child.name: child for child in self._children}
        self.capabilities = together(child.side.capabilities for child in self._children)
        groups = context.geometry.groups if context.geometry is not None else ()
        self._loads, self._keeps = Loads(self._children, options, groups, self._counts), Keeps()
        #: What a child was told by a rank and has not taken, because it raised.
        self._untold: dict[str, list[tuple[int, list[Result]]]] = {}
        #: Ranks on which a child that is out of use is not closed yet, and whose end movers are to be told of.
        self._ending: dict[str, set[int]] = {}
        self._ends: list[str] = []
        self._closed = False

    # -- requests that need blocks

    def lookup(self, request: RequestView, have: int) -> Match:
        """What the first child that has anything has."""
        if self._closed:
            return _NOTHING
        return self._loads.lookup(request, have, time.monotonic())

    def reserve(self, request: RequestView, blocks: Blocks, have: int, tokens: int) -> None:
        """Let the first child that has it load it, and the next ones what that one cannot."""
        self._check()
        self._loads.reserve(request, blocks, have, tokens, time.monotonic())

    def cancel(self, request: str) -> None:
        """Give up what is loaded for it, and take back what is kept of it."""
        self._check()
        self._loads.cancel(request, time.monotonic())
        inner = named(request)
        for name in self._keeps.keepers(inner):
            self._by_name[name].does(self._by_name[name].side.cancel, inner)

    # -- requests that have ended

    def finish(self, request: RequestView, blocks: Blocks, tokens: int, *, aborted: bool = False) -> Retention:
        """Every child hears of it; who is to save it may keep it, and to the others it is one that was given up."""
        if self._closed:
            return _UNKEPT
        self._loads.ended(request.id, time.monotonic())
        parts: dict[str, tickets.Ticket] = {}
        keepers: set[str] = set()
        for child, view in self._views(request):
            unwanted = aborted or not self._saves(child, bool(keepers))
            found = child.call(_UNKEPT, child.side.finish, view, blocks, tokens, aborted=unwanted)
            if found.keep:
                keepers.add(child.name)
            if found.ticket is not None:
                parts[child.name] = found.ticket
        self._keeps.keep(named(request.id), request.id, keepers)
        return Retention(bool(keepers), tickets.merged(parts))

    def promise(self, request: RequestView, tokens: int) -> Mapping[str, Any] | None:
        """The tickets of all children that promise something."""
        self._check()
        check_layers(self.capabilities)
        parts: dict[str, tickets.Ticket] = {}
        for child, view in self._views(request):
            promise = getattr(child.side, "promise", None)
            if promise is not None and self._saves(child, bool(parts)):
                given: list[tickets.Ticket | None] = child.listed(partial(_one, promise, view, tokens))
                parts.update((child.name, ticket) for ticket in given if ticket is not None)
        return tickets.merged(parts)

    def computes(self, request: RequestView, blocks: Blocks, first: int, stop: int) -> None:
        """Children that send layers are told."""
        self._check()
        check_layers(self.capabilities)
        for child, view in self._views(request):
            computes = getattr(child.side, "computes", None)
            if computes is not None and child.options.save != "never":
                child.does(computes, view, blocks, first, stop)

    def _views(self, request: RequestView) -> list[tuple[Child[Planner], RequestView]]:
        """The request as each child is told of it; whose ticket is not its own is none."""
        view = attrs.evolve(request, id=named(request.id), ticket=None)
        return [(child, view) for child in self._children]

    @staticmethod
    def _saves(child: Child[Planner], kept: bool) -> bool:
        return child.options.save == "always" or (child.options.save == "otherwise" and not kept)

    # -- each step

    def plan_step(self) -> Step:
        """What the children have decided, and whose turn it is next."""
        self._check()
        now = time.monotonic()
        bytes_of = {}
        for child in self._children:
            self._tell(child)
            step = child.call(_EMPTY, child.side.plan_step)
            if step.plan:
                bytes_of[child.name] = step.plan
            self._heed(child, step, now)
        self._loads.advance(now)
        for child in self._children:
            if child.out:
                self._end(child)
        received, failed, begun = self._loads.take()
        plan = plans.encode(plans.Orders(plans.VERSION, bytes_of, begun, tuple(self._ends)))
        self._ends = []
        return Step(self._keeps.take(), received, failed, plan)

    def _heed(self, child: Child[Planner], step: Step, now: float) -> None:
        known = [self._keeps.released(child.name, inner) for inner in step.released]
        known += [self._loads.received(child, inner, now) for inner in step.received]
        known += [self._loads.failed(child, inner, tokens, now) for inner, tokens in step.failed.items()]
        self._refuse(known.count(False))

    def on_results(self, rank: int, results: Sequence[Result]) -> None:
        """Give each child what its own mover has said."""
        self._check()
        by_child: dict[str, list[Result]] = {}
        for result in results:
            if not result.source:
                self._heard(rank, result)
                continue
            name, own = parted(result.source)
            if name not in self._by_name:
                self._refuse(1)
                continue
            if result.what == "received" and result.cause:
                self._loads.said(name, result.request, result.cause)
            by_child.setdefault(name, []).append(attrs.evolve(result, source=own))
        for name, said in by_child.items():
            self._untold.setdefault(name, []).append((rank, said))
            self._tell(self._by_name[name])

    def _tell(self, child: Child[Planner]) -> None:
        """What movers said, in this order; a child that raises is told again, for again changes nothing."""
        untold = self._untold.get(child.name, [])
        while untold and not child.out and child.does(child.side.on_results, *untold[0]):
            del untold[0]
        if not untold or child.out:
            self._untold.pop(child.name, None)

    def _heard(self, rank: int, result: Result) -> None:
        """What a mover says for itself."""
        try:
            said = plans.decode_said(result.proof)
        except DescriptionInvalid as error:
            _log.warning("%s", error)
            self._refuse(1)
            return
        if said.what == "computed":
            self._loads.computed(said.name)
        elif said.name in self._by_name and 0 <= rank < self._ranks:
            self._ended(rank, self._by_name[said.name])
        else:
            self._refuse(1)

    def _ended(self, rank: int, child: Child[Planner]) -> None:
        """A child is closed on a rank; when it is on all, nobody touches its requests' pages any more."""
        child.take_out(f"rank {rank} has closed it", told=True)
        self._end(child)
        left = self._ending[child.name]
        if rank in left:
            left.remove(rank)
            if not left:
                self._loads.lost(child, time.monotonic())
                self._keeps.lost(child.name)

    def _end(self, child: Child[Planner]) -> None:
        """Let all ranks close a child that is out of use."""
        if child.name not in self._ending:
            self._ending[child.name] = set(range(self._ranks))
            self._ends.append(child.name)

    def _refuse(self, count: int) -> None:
        if count:
            self._counts.add("kv_results_refused_total", count)

    # -- all of it

    def busy(self) -> bool:
        """Whether any child has something to do, or a child is being closed."""
        self._check()
        theirs = [child.call(False, child.side.busy) for child in self._children]
        out = any(child.out and child.name not in self._ending for child in self._children)
        return bool(self._loads.busy or len(self._keeps) or any(self._ending.values()) or out or any(theirs))

    def reset(self) -> None:
        """Let all children forget; what is under way does not fall back to what they knew."""
        self._check()
        self._loads.reset()
        for child in self._children:
            child.does(child.side.reset)

    def events(self) -> Sequence[Event]:
        """Those of all children, with their names."""
        self._check()
        found: list[Event] = []
        for child in self._children:
            said = child.listed(child.side.events)
            found += [attrs.evolve(event, source=below(child.name, event.source)) for event in said]
        return found

    def statistics(self) -> list[Sample]:
        """Values of all children with the label `child`; of the composition what no child can count."""
        return [*self._counts.samples(), *samples(self._children)]

    def close(self, deadline: float = 5.0) -> None:
        """Close all children, in one time."""
        if not self._closed:
            self._closed = True
            close(self._children, deadline)

    def _check(self) -> None:
        if self._closed:
            raise Closed("A planner of KV blocks was used.", "It is closed.", "Open another.")


def _one(function: Callable[..., tickets.Ticket | None], *arguments: Any) -> list[tickets.Ticket | None]:
    """What a function answers, as a list of one."""
    return [function(*arguments)]
