"""Engines for the suite of connectors: a planner's process and one for each rank, stepped as an engine would.

Room `testing`; may import `kv` and the rooms below. `ConnectorEngine` carries plans and results, and keeps account of
what must come once. What processes do is in `connector_ranks`.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs

from tensorway.kv import Capabilities, Event, Match, RequestView, Result, Retention
from tensorway.testing import connector_ranks as does
from tensorway.testing.connector_memory import BLOCKS, Shape, hashes
from tensorway.testing.connector_ranks import Opening, Span
from tensorway.testing.ranks import RankProcess, Ranks

#: Seconds that anything may take; a lease or a deadline of a connector's may be part of it.
PATIENCE: Final = 90.0


@attrs.frozen
class Prompt:
    """A request as both engines know it: its tokens' bytes follow from its salt."""

    salt: int
    tokens: int
    blocks: tuple[int, ...]

    def view(self, name: str, shape: Shape, ticket: Any = None, *, by_content: bool, hand_over: bool) -> RequestView:
        """What a planner is told."""
        known = hashes(self.salt, self.tokens, shape.page_tokens) if by_content else ()
        return RequestView(name, self.tokens, ticket, known, hand_over=hand_over)


@attrs.define
class ConnectorEngine:
    """One engine, and all that its planner and movers have said."""

    ranks: Ranks
    indices: list[int]
    opening: Opening
    #: Of its planner, and of its movers, once it is open.
    capabilities: Capabilities = attrs.field(factory=Capabilities)
    mover_capabilities: Capabilities = attrs.field(factory=Capabilities)
    released: list[str] = attrs.field(factory=list)
    received: list[str] = attrs.field(factory=list)
    failed: dict[str, int] = attrs.field(factory=dict)
    results: list[tuple[int, Result]] = attrs.field(factory=list)
    events: list[Event] = attrs.field(factory=list)
    #: Requests whose blocks are kept, as `finish` said, and their blocks.
    kept: dict[str, tuple[int, ...]] = attrs.field(factory=dict)
    busy: bool = False
    _said: list[tuple[int, list[Result]]] = attrs.field(factory=list)

    @property
    def name(self) -> str:
        """As others are told of it."""
        return self.opening.engine

    @property
    def shape(self) -> Shape:
        """What its ranks hold."""
        return self.opening.shape

    @property
    def planner(self) -> RankProcess:
        """The planner's process."""
        return self.ranks[self.indices[0]]

    @property
    def movers(self) -> list[RankProcess]:
        """Those of its ranks."""
        return [self.ranks[index] for index in self.indices[1:]]

    def open(self, probed: bool = False) -> ConnectorEngine:
        """Begin its life."""
        self.capabilities = self.planner.call(does.open_side, self.opening, "planner", 0, probed)
        for number, mover in enumerate(self.movers):
            mover.start(does.open_side, self.opening, "mover", number, probed)
        said = [mover.result() for mover in self.movers]
        assert all(each == said[0] for each in said), "movers of one engine can do different things"
        self.mover_capabilities = said[0]
        return self

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call a method of its planner."""
        return self.planner.call(does.ask, name, *arguments)

    def each(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Let all its movers' processes call a function."""
        return self.ranks.each(self.indices[1:], function, *arguments)

    # -- steps

    def decide(self) -> bytes:
        """Ask the planner what is next; the plan."""
        step, self.busy, events = self.planner.call(does.decide, self._said)
        self._said = []
        self.events += events
        self.released += step.released
        self.received += step.received
        for request, tokens in step.failed.items():
            assert request not in self.failed, f"{request} failed twice"
            self.failed[request] = tokens
        for request in step.released:
            assert request in self.kept, f"{request} was released, and was not kept"
        return bytes(step.plan)

    def step(self, plan: bytes | None = None) -> None:
        """One step; what is released is used for something else at once, once movers have the plan."""
        known = len(self.released)
        plan = self.decide() if plan is None else plan
        self.hear(self.each(does.turn, plan))
        for request in self.released[known:]:
            self.each(does.spoil, self.kept[request])

    def hear(self, answers: Sequence[list[Result]]) -> None:
        """Keep what movers said for the planner's next step."""
        self._said += list(enumerate(answers))
        for rank, results in enumerate(answers):
            assert all(isinstance(result, Result) for result in results), f"no results: {results}"
            self.results += [(rank, result) for result in results if result.what in ("received", "sent")]

    # -- requests

    def view(self, prompt: Prompt, name: str, ticket: Any = None, *, hand_over: bool = False) -> RequestView:
        """The request, as this engine's planner is told of it."""
        by_content = self.capabilities.by_content
        return prompt.view(name, self.shape, ticket, by_content=by_content, hand_over=hand_over)

    def compute(self, prompt: Prompt, name: str) -> Retention:
        """Compute a request that another engine is to have, and end it."""
        self.each(does.fill, prompt.blocks, 0, prompt.tokens, prompt.salt)
        view = self.view(prompt, name, hand_over=True)
        retention: Retention = self.ask("finish", view, [list(prompt.blocks)], prompt.tokens)
        assert isinstance(retention, Retention), f"finish returned {retention!r}"
        if retention.keep:
            self.kept[name] = prompt.blocks
        return retention

    def look_up(self, prompt: Prompt, name: str, ticket: Any, have: int = 0) -> Match:
        """Ask once."""
        match: Match = self.ask("lookup", self.view(prompt, name, ticket), have)
        assert isinstance(match, Match), f"lookup returned {match!r}"
        assert 0 <= match.tokens <= max(prompt.tokens - have, 0), match
        assert (match.tokens > 0) == (match.mode in ("now", "background")) or match.mode == "later", match
        assert not match.sources or sum(match.sources.values()) == match.tokens, match
        return match

    def find(self, prompt: Prompt, name: str, ticket: Any, have: int, *beside: ConnectorEngine) -> Match:
        """Ask until it is known, and found; engines go on meanwhile. By content, all of it: it may still be saved."""
        found: list[Match] = []

        def known() -> bool:
            found[:] = [self.look_up(prompt, name, ticket, have)]
            whole = not self.capabilities.by_content or found[0].tokens == prompt.tokens - have
            return whole and found[0].mode in ("now", "background")

        until(known, self, *beside)
        return found[0]

    def reserve(self, prompt: Prompt, name: str, ticket: Any, have: int, tokens: int) -> None:
        """Let them come into its blocks."""
        self.ask("reserve", self.view(prompt, name, ticket), [list(prompt.blocks)], have, tokens)

    def ended(self, name: str) -> bool:
        """Whether it was said what became of a request."""
        return name in self.received or name in self.failed

    # -- looking

    def wrong(self, spans: Sequence[Span], beside: Sequence[int] = ()) -> list[str]:
        """What is not as it should be in any rank's memory."""
        return [f"rank {rank}: {text}" for rank, text in enumerate(self.each(does.wrong, spans, beside)) if text]

    def counted(self, role: str, metric: str, **labels: str) -> float:
        """What its planner, or all its movers, have counted."""
        if role == "planner":
            return float(self.planner.call(does.counted, role, metric, labels))
        return float(sum(self.each(does.counted, role, metric, labels)))

    def account(self) -> list[str]:
        """What came more than once, or of nobody."""
        names = {"received": Counter(self.received), "released": Counter(self.released)}
        said = Counter((rank, result.request, result.what) for rank, result in self.results if result.request)
        wrong = [f"{name} was {what} {n} times" for what, found in names.items() for name, n in found.items() if n > 1]
        wrong += [f"{name} was received, and failed" for name in set(self.received) & set(self.failed)]
        wrong += [
            f"rank {rank} said {n} times that {name} is {what}"
            for (rank, name, what), n in said.items()
            if n > 1 and what == "received"
        ]
        return wrong

    def close(self) -> None:
        """End its life in order; a process that is in the middle of something ends."""
        for process in (*self.movers, self.planner):
            if process.at_rest:
                process.call(does.close_sides)


def until(condition: Callable[[], object], *engines: ConnectorEngine, seconds: float = PATIENCE) -> None:
    """Let engines go on until something is true."""
    last = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < last, "; ".join(
            f"{one.name} received {one.received}, failed {one.failed}, released {one.released} of {list(one.kept)}"
            for one in engines
        )
        for one in engines:
            one.step()


@attrs.define
class World:
    """Engines of one deployment, over processes that tests share."""

    ranks: Ranks
    connector: str
    options: Mapping[str, object]
    around: str = ""
    used: int = 0
    engines: list[ConnectorEngine] = attrs.field(factory=list)
    #: Names of engines are of this test alone.
    label: str = attrs.field(factory=lambda: uuid.uuid4().hex[:8])

    def engine(self, name: str, shape: Shape, *, probed: bool = False) -> ConnectorEngine:
        """One more engine, in processes of its own."""
        count = 1 + shape.tp
        self.ranks.grow(self.used + count)
        indices = list(range(self.used, self.used + count))
        self.used += count
        opening = Opening(self.connector, self.options, f"{name}-{self.label}", shape, self.around)
        made = ConnectorEngine(self.ranks, indices, opening)
        self.engines.append(made)
        return made.open(probed)

    def close(self) -> None:
        """End all engines."""
        for one in self.engines:
            one.close()


def prompt(salt: int, tokens: int, page_tokens: int, turn: int = 0) -> Prompt:
    """A request with blocks in an order that no other has; up to three at once share none of an engine."""
    count = -(-tokens // page_tokens)
    of_turn = [block for block in range(BLOCKS) if block % 4 == turn % 4]
    assert count <= len(of_turn), "the engine has not so many blocks"
    shifted = of_turn[salt % len(of_turn) :] + of_turn[: salt % len(of_turn)]
    return Prompt(salt, tokens, tuple(shifted[:count][::-1]))
