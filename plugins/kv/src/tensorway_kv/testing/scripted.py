"""Connectors that do what a test says: small, but whole, over a memory in which every token says what it is.

May import the core and this dist. `World` is the memory of one engine, and what all its children did; what must never
be is written down in `breaches`, for who composes connectors lives on when one of them raises. A child is `scripted`
with its name; what it does is drawn from its `Script`, by the world's chance.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import attrs
import msgspec

from tensorway.kv import Blocks, Capabilities, Event, KVContext, Match, RequestView, Result, Retention, Step
from tensorway.metrics import Sample
from tensorway.types import Offer, ProbeResult

BLOCK: Final = 4
_JUNK: Final = ("", -1)
_ENCODE: Final = msgspec.msgpack.Encoder().encode
_Fetches = list[tuple[str, str, list[int], int, int, str, int, int]]
_DECODER: Final = msgspec.msgpack.Decoder(tuple[_Fetches, list[str]])


@attrs.define
class Script:
    """What a child does; numbers are chances from 0 to 1, but for `steps`."""

    #: Tokens that it has of each request without a ticket.
    tokens: int = 0
    #: It has whole blocks only.
    aligned: bool = False
    #: It does not know yet; for ever, if that is 1.
    later: float = 0.0
    #: A fetch fails, and with which causes; or never ends until it is cancelled.
    fails: float = 0.0
    causes: tuple[str, ...] = ("lost",)
    hangs: float = 0.0
    #: How many polls a fetch takes at most.
    steps: int = 1
    #: It raises, by method: those of the mover begin with `mover.`.
    raises: dict[str, float] = attrs.field(factory=dict)
    #: It keeps what has ended, and lets go in a step.
    keeps: float = 0.0
    #: Whether it can move layers one by one.
    layerwise: bool = True
    releases: float = 0.5


@attrs.frozen
class ScriptedOptions:
    """Options of the connector `scripted`."""

    child: str
    path: str = ""


@attrs.define
class World:
    """The pages of all ranks, and the children that write to them."""

    seed: int
    ranks: int = 1
    scripts: dict[str, Script] = attrs.field(factory=dict)
    breaches: list[str] = attrs.field(factory=list)
    #: Calls by child and method, and options that children were made with.
    calls: Counter[tuple[str, str]] = attrs.field(factory=Counter)
    made: list[tuple[str, str, ScriptedOptions]] = attrs.field(factory=list)
    #: Requests that children were told they need keep nothing for, and those that they were asked to save.
    told: list[tuple[str, str]] = attrs.field(factory=list)
    finished: list[tuple[str, str, bool]] = attrs.field(factory=list)
    fetched: list[tuple[str, str, int, int]] = attrs.field(factory=list)
    #: Who keeps what.
    kept: set[tuple[str, str]] = attrs.field(factory=set)
    #: Blocks of requests that are reserved and have not ended.
    opened: set[int] = attrs.field(factory=set)
    closed: set[tuple[str, str, int]] = attrs.field(factory=set)
    _pages: dict[tuple[int, int], list[tuple[str, int]]] = attrs.field(factory=dict)
    _writers: dict[tuple[int, int], str] = attrs.field(factory=dict)
    _lock: threading.Lock = attrs.field(factory=threading.Lock)
    rng: random.Random = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def offer(self) -> Offer:
        """The connector `scripted`, whose children live here."""
        return Offer(
            name="scripted",
            kind="kv_connector",
            summary="Does what a test says.",
            probe=lambda: ProbeResult.passed("it is only a test"),
            probe_in="host",
            factory=self._construct,
            options=ScriptedOptions,
        )

    def _construct(self, options: ScriptedOptions, context: KVContext) -> ScriptedPlanner | ScriptedMover:
        self.made.append((options.child, context.role, options))
        self.may(options.child, "open")
        if context.role == "planner":
            return ScriptedPlanner(self, options.child)
        return ScriptedMover(self, options.child, context.rank)

    def script(self, child: str) -> Script:
        """What a child does."""
        return self.scripts.setdefault(child, Script())

    def may(self, child: str, method: str) -> None:
        """A call; it raises if that is its turn."""
        self.calls[child, method] += 1
        if self.rng.random() < self.script(child).raises.get(method, 0.0):
            raise RuntimeError(f"{child} was told to raise in {method}")

    def breach(self, what: str) -> None:
        """Something that must never be."""
        self.breaches.append(what)

    # -- pages

    def take(self, child: str, rank: int, blocks: Sequence[int]) -> None:
        """A child is going to write to these."""
        with self._lock:
            for block in blocks:
                writer = self._writers.setdefault((rank, block), child)
                if writer != child:
                    self.breach(f"{child} writes to block {block} while {writer} does")
                if block not in self.opened:
                    self.breach(f"{child} writes to block {block}, which nobody is loaded into")

    def give(self, child: str, rank: int, blocks: Sequence[int] | None = None) -> None:
        """It writes to these no more, or to none."""
        with self._lock:
            for key in [key for key, writer in self._writers.items() if writer == child and key[0] == rank]:
                if blocks is None or key[1] in blocks:
                    del self._writers[key]

    def write(self, rank: int, blocks: Sequence[int], token: int, name: str) -> None:
        """A token of a request; of nothing, if that has no name."""
        page = self._pages.setdefault((rank, blocks[token // BLOCK]), [_JUNK] * BLOCK)
        page[token % BLOCK] = (name, token) if name else _JUNK

    def good(self, blocks: Sequence[int], token: int, name: str) -> bool:
        """Whether a token of a request is there on all ranks."""
        pages = (self._pages.get((rank, blocks[token // BLOCK]), [_JUNK] * BLOCK) for rank in range(self.ranks))
        return all(page[token % BLOCK] == (name, token) for page in pages)

    def written_to(self, blocks: Sequence[int]) -> bool:
        """Whether anybody writes to one of these."""
        with self._lock:
            return any(block in blocks for _, block in self._writers)


@attrs.define(eq=False)
class _Fetch:
    view: RequestView
    blocks: list[int]
    start: int
    stop: int
    said: dict[int, tuple[int, str]] = attrs.field(factory=dict)


class ScriptedPlanner:
    """See `tensorway.kv.contract.LayerwisePlanner`. The salt of a request is its name in memory."""

    def __init__(self, world: World, child: str) -> None:
        self._world, self._child = world, child
        self.capabilities = Capabilities(layerwise=world.script(child).layerwise)
        self._asked: set[str] = set()
        self._under_way: dict[str, _Fetch] = {}
        self._fetches: list[_Fetch] = []
        self._cancels: list[str] = []
        self._kept: list[str] = []
        self._received: list[str] = []
        self._failed: dict[str, int] = {}

    @property
    def _script(self) -> Script:
        return self._world.script(self._child)

    def _has(self, request: RequestView) -> int:
        ticket = request.ticket
        if ticket is not None and ticket.get("child") != self._child:
            self._world.breach(f"{self._child} was given the ticket of {ticket.get('child')}")
        return min(request.tokens, self._script.tokens if ticket is None else int(ticket["tokens"]))

    def lookup(self, request: RequestView, have: int) -> Match:
        """What it has."""
        self._asked.add(request.id)
        self._world.may(self._child, "lookup")
        tokens = self._has(request) - have
        if request.id in self._under_way or tokens <= 0 or (self._script.aligned and have % BLOCK):
            return Match(0, "nothing")
        if self._world.rng.random() < self._script.later:
            return Match(0, "later")
        return Match(tokens, "background", {f"peer-{self._child}": tokens})

    def reserve(self, request: RequestView, blocks: Blocks, have: int, tokens: int) -> None:
        """Load it."""
        world = self._world
        self._asked.add(request.id)
        world.may(self._child, "reserve")
        if not tokens:
            world.told.append((self._child, request.id))
            self._received.append(request.id)
            return
        if have + tokens > self._has(request) or request.id in self._under_way:
            world.breach(f"{self._child} was asked for tokens {have} to {have + tokens} of {request}")
        fetch = _Fetch(request, list(blocks[0]), have, have + tokens)
        # What one that raises has written, nobody can know.
        known = not self._script.aligned and not any(script.raises for script in world.scripts.values())
        if known and world.good(fetch.blocks, have, request.salt):
            world.breach(f"{self._child} was asked for token {have} of {request.id}, which is there")
        world.fetched.append((self._child, request.id, have, tokens))
        self._under_way[request.id] = fetch
        self._fetches.append(fetch)

    def finish(self, request: RequestView, blocks: Blocks, tokens: int, *, aborted: bool = False) -> Retention:
        """Keep it, perhaps."""
        world = self._world
        world.may(self._child, "finish")
        world.finished.append((self._child, request.id, aborted))
        if aborted or world.rng.random() >= self._script.keeps:
            return Retention(False)
        self._kept.append(request.id)
        world.kept.add((self._child, request.id))
        return Retention(True, {"child": self._child, "tokens": tokens})

    def promise(self, request: RequestView, tokens: int) -> dict[str, Any] | None:
        """A ticket beforehand."""
        self._world.may(self._child, "promise")
        return {"child": self._child, "tokens": tokens} if self._script.keeps else None

    def computes(self, request: RequestView, blocks: Blocks, first: int, stop: int) -> None:
        """Only counted."""
        self._world.may(self._child, "computes")

    def plan_step(self) -> Step:
        """What has ended, and what movers are to do."""
        world, script = self._world, self._script
        world.may(self._child, "plan_step")
        released = [request for request in self._kept if world.rng.random() < script.releases]
        for request in released:
            self._kept.remove(request)
            world.kept.remove((self._child, request))
        fetches = [self._ordered(fetch) for fetch in self._fetches]
        plan = _ENCODE((fetches, self._cancels)) if fetches or self._cancels else b""
        step = Step(released, self._received, self._failed, plan)
        self._fetches, self._cancels, self._received, self._failed = [], [], [], {}
        return step

    def _ordered(self, fetch: _Fetch) -> tuple[str, str, list[int], int, int, str, int, int]:
        rng, script = self._world.rng, self._script
        cause = "hangs" if rng.random() < script.hangs else ""
        cause = rng.choice(script.causes) if not cause and rng.random() < script.fails else cause
        good = rng.randint(fetch.start, fetch.stop - 1) if cause else fetch.stop
        steps = rng.randint(1, script.steps)
        return fetch.view.id, fetch.view.salt, fetch.blocks, fetch.start, fetch.stop, cause, good, steps

    def on_results(self, rank: int, results: Sequence[Result]) -> None:
        """What a rank has loaded."""
        world = self._world
        world.may(self._child, "on_results")
        for result in results:
            fetch = self._under_way.get(result.request)
            if fetch is None or result.source or result.proof != self._child.encode():
                world.breach(f"{self._child} was told what it did not do: {result}")
                continue
            fetch.said.setdefault(rank, (result.tokens, result.cause))
            if len(fetch.said) == world.ranks:
                del self._under_way[result.request]
                if any(cause for _, cause in fetch.said.values()):
                    self._failed[result.request] = min(tokens for tokens, _ in fetch.said.values())
                else:
                    self._received.append(result.request)

    def cancel(self, request: str) -> None:
        """Give it up."""
        self._world.may(self._child, "cancel")
        if request not in self._asked and request not in self._kept:
            self._world.breach(f"{self._child} was told to give up {request}, of which it has not heard")
        if request in self._under_way:
            self._cancels.append(request)

    def busy(self) -> bool:
        """Whether anything is left."""
        self._world.may(self._child, "busy")
        return bool(self._under_way or self._kept or self._received or self._failed)

    def reset(self) -> None:
        """Only counted."""
        self._world.may(self._child, "reset")

    def events(self) -> Sequence[Event]:
        """One."""
        self._world.may(self._child, "events")
        return (Event("cleared"),)

    def statistics(self) -> Sequence[Sample]:
        """One."""
        self._world.may(self._child, "statistics")
        return (Sample("kv_leases", (("backend", "scripted"),), float(len(self._kept))),)

    def close(self, deadline: float = 5.0) -> None:
        """End."""
        self._world.closed.add((self._child, "planner", 0))
        self._world.may(self._child, "close")


@attrs.define(eq=False)
class _Writing:
    name: str
    blocks: list[int]
    start: int
    stop: int
    cause: str
    good: int
    steps: int


class ScriptedMover:
    """See `tensorway.kv.contract.LayerwiseMover`."""

    def __init__(self, world: World, child: str, rank: int) -> None:
        self._world, self._child, self._rank = world, child, rank
        self.capabilities = Capabilities(layerwise=world.script(child).layerwise)
        self._writing: dict[str, _Writing] = {}
        self.waited: list[float] = []

    def _may(self, method: str) -> None:
        if (self._child, "mover", self._rank) in self._world.closed:
            self._world.breach(f"{method} of {self._child} was called after it was closed")
        self._world.may(self._child, f"mover.{method}")

    def submit(self, plan: bytes) -> None:
        """Begin; and raise, if it does, in the middle."""
        fetches, cancels = _DECODER.decode(plan) if plan else ([], [])
        for request, name, blocks, start, stop, cause, good, steps in fetches:
            touched = blocks[start // BLOCK : -(-stop // BLOCK)]
            self._world.take(self._child, self._rank, touched)
            self._writing[request] = _Writing(name, blocks, start, stop, cause, good, steps)
        self._may("submit")
        for request in cancels:
            self.cancel(request)

    def poll(self) -> list[Result]:
        """What has ended; tokens behind the good ones are anything."""
        self._may("poll")
        results = []
        for request, one in list(self._writing.items()):
            one.steps -= 1
            if one.cause == "hangs" or one.steps > 0:
                continue
            for token in range(one.start, one.stop):
                self._world.write(self._rank, one.blocks, token, one.name if token < one.good else "")
            self._world.give(self._child, self._rank, one.blocks)
            del self._writing[request]
            results.append(Result(request, "received", one.cause, "a test", one.good, self._child.encode()))
        return results

    def flush(self, deadline: float) -> None:
        """Only noted."""
        self.waited.append(deadline)
        self._may("flush")

    def cancel(self, request: str) -> None:
        """It ends with the next poll."""
        self._world.calls[self._child, "mover.cancel"] += 1
        one = self._writing.get(request)
        if one is not None:
            one.cause, one.steps = "cancelled", 1
            one.good = min(one.good, one.stop - 1)

    def before_layer(self, layer: int, deadline: float) -> None:
        """Only noted."""
        self.waited.append(deadline)
        self._may("before_layer")

    def after_layer(self, layer: int) -> None:
        """Only counted."""
        self._may("after_layer")

    def statistics(self) -> Sequence[Sample]:
        """None."""
        return ()

    def close(self, deadline: float = 5.0) -> None:
        """Let go of all pages."""
        self._world.closed.add((self._child, "mover", self._rank))
        self._world.give(self._child, self._rank)
        self._world.may(self._child, "mover.close")
