"""What handing over asks of a connector: a planner where requests are scheduled, a mover beside each rank's memory.

Room `kv`; may import the rooms below. No engine and no array library is in any signature: requests are texts, tokens
are numbers, block ids are sequences per cache group, what goes from planner to mover is bytes of the connector's own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

import attrs

from tensorway.geometry import RankGeometry
from tensorway.memory import Copier
from tensorway.metrics import Sample
from tensorway.rendezvous import Rendezvous

#: Block ids of one request: for each cache group, in the order of its tokens.
Blocks = Sequence[Sequence[int]]


@attrs.frozen
class KVContext:
    """What a connector is made with, on either side."""

    #: This engine, as others are told of it; the same on all its ranks and after a restart.
    engine: str
    rendezvous: Rendezvous
    #: `planner` or `mover`: what the factory is to return.
    role: Literal["planner", "mover"]
    #: How many ranks have a mover, and for a mover which one it is.
    ranks: int = 1
    rank: int = 0
    #: The memory of this rank; for a planner that of any rank, for its groups.
    geometry: RankGeometry | None = None
    #: What both engines must agree on (`tensorway.rendezvous.Facts`): model, revision, dtype.
    facts: Mapping[str, str] = attrs.field(factory=dict)
    #: Seconds that opening may take.
    deadline: float = 60.0
    #: For a mover whose pages the transport cannot reach; memory of the host needs none.
    copier: Copier | None = None


@attrs.frozen
class Capabilities:
    """What a connector can do; an engine asks nothing else of it."""

    pull: bool = True
    push: bool = False
    #: Whether layers can be sent or awaited one by one while the model computes.
    layerwise: bool = False
    #: Whether blocks that were handed over can be read back by who computed them first.
    bidirectional: bool = False
    #: Whether it looks blocks up by their content, so that requests should come with hashes.
    by_content: bool = False
    #: Kinds of memory that KV pages may be in without staging.
    media: frozenset[str] = frozenset({"cpu"})


@attrs.frozen
class RequestView:
    """What a planner is told of a request."""

    id: str
    #: Tokens whose KV the request needs before it can go on: its prompt.
    tokens: int
    #: What came with it through the router, as it came: a client may have written it.
    ticket: Mapping[str, Any] | None = None
    #: For connectors that look blocks up by content: a hash for each full block, and what separates tenants.
    hashes: tuple[bytes, ...] = ()
    salt: str = ""
    #: Whether another engine is to have its blocks when it has ended: who routes it says so.
    hand_over: bool = False


@attrs.frozen
class Match:
    """How much of a request can be had from elsewhere, beyond what the engine has."""

    tokens: int
    #: `later`: not known yet, ask again; never for longer than the connector's deadline.
    mode: Literal["nothing", "now", "background", "later"]
    #: Where the tokens would come from, for metrics; the numbers add up to `tokens`.
    sources: Mapping[str, int] = attrs.field(factory=dict)


@attrs.frozen
class Retention:
    """What becomes of a finished request's blocks."""

    #: Keep them until `Step.released` names the request.
    keep: bool
    #: What the consumer needs, for the answer to the client; None if nothing is handed over.
    ticket: Mapping[str, Any] | None = None


@attrs.frozen
class Result:
    """What a mover says: what became of a request's transfer, once for each that was submitted, or what it heard."""

    #: Empty for what was heard of several.
    request: str
    #: `received`: its blocks are here; `sent`: its blocks were written to where they were to go; `heard`: another
    #: engine's rank said something, which means nothing before the planner gives it a meaning; `cleared`: nobody writes
    #: any more to memory that was set aside for it.
    what: Literal["received", "sent", "heard", "cleared"]
    #: Empty if it succeeded; else one of the metrics' causes.
    cause: str = ""
    #: For people.
    why: str = ""
    #: Tokens from the first on that are good, also if the rest failed.
    tokens: int = 0
    #: Who confirms what is `sent`, and how, so that the planner counts each consumer once; and what was `heard`, which
    #: the mover has seen to be from who it says, and no longer than messages are.
    proof: bytes = b""
    #: Which part of a composition says it; empty for what is none.
    source: str = ""


@attrs.frozen
class Event:
    """What changed in which blocks can be had: for routers that know where blocks are."""

    what: Literal["stored", "removed", "cleared"]
    #: By content; nothing for `cleared`, which is of all.
    hashes: tuple[bytes, ...] = ()
    group: int = 0
    #: Where: `engine` for blocks that another engine may fetch from this one, `files` for those of a store.
    medium: str = "engine"
    #: Tokens of each block.
    block_tokens: int = 0
    salt: str = ""
    #: Which part of a composition says it; empty for what is none.
    source: str = ""


@attrs.frozen
class Step:
    """What the planner has decided since the last step."""

    #: Requests whose kept blocks may be used anew, once every mover has been submitted this step's plan: readers that
    #: are late find there that they are.
    released: Collection[str] = ()
    #: Requests whose blocks have arrived.
    received: Collection[str] = ()
    #: Requests that failed, with tokens that are good nevertheless: compute from there, or give the request up.
    failed: Mapping[str, int] = attrs.field(factory=dict)
    #: For `Mover.submit` of every rank.
    plan: bytes = b""


class Planner(Protocol):
    """The side that schedules. One thread uses it; nothing waits here."""

    capabilities: Capabilities

    def lookup(self, request: RequestView, have: int) -> Match:
        """How many tokens beyond the first `have` can be had. May be asked again and again; changes nothing."""
        ...

    def reserve(self, request: RequestView, blocks: Blocks, have: int, tokens: int) -> None:
        """The request's blocks are allocated: `tokens` beyond `have` are to come into them. Again changes nothing.

        With no tokens it says that the engine has all it needs: who keeps blocks for the request need not any more. It
        is received like any other then; one whose ticket is worth nothing is not heard of again. A list that is shorter
        than its tokens need is of their last blocks, as that of a sliding window is.
        """
        ...

    def finish(self, request: RequestView, blocks: Blocks, tokens: int, *, aborted: bool = False) -> Retention:
        """The request has ended, and its blocks hold `tokens`: keep them for a consumer, or let them go."""
        ...

    def plan_step(self) -> Step:
        """Everything that was decided since the last call: once in each step of the engine, also of an idle one."""
        ...

    def on_results(self, rank: int, results: Sequence[Result]) -> None:
        """What a rank's mover has said."""
        ...

    def cancel(self, request: str) -> None:
        """Nobody wants the request any more; its blocks come back by `Step.failed` or `Step.released`."""
        ...

    def busy(self) -> bool:
        """Whether the engine must go on calling `plan_step` although it has no request."""
        ...

    def reset(self) -> None:
        """Forget what can be looked up: the weights are others now."""
        ...

    def events(self) -> Sequence[Event]:
        """What was stored and removed since the last call, in this order."""
        ...

    def statistics(self) -> Sequence[Sample]:
        """Values of `tensorway.kv.METRICS`."""
        ...

    def close(self, deadline: float = 5.0) -> None:
        """Tell consumers goodbye, and end; the second call does nothing."""
        ...


class LayerwisePlanner(Planner, Protocol):
    """A planner whose movers send layers of a request while it is computed."""

    def promise(self, request: RequestView, tokens: int) -> Mapping[str, Any] | None:
        """The request is going to be computed here, so many tokens of it: a ticket with which its consumer can ask
        for them at once. None if nobody can be served; `finish` says the rest."""
        ...

    def computes(self, request: RequestView, blocks: Blocks, first: int, stop: int) -> None:
        """This step computes the tokens from `first` to before `stop` of a promised request, into these blocks."""
        ...


class Mover(Protocol):
    """The side beside a rank's memory. One thread uses it, and only `flush` and `close` wait."""

    capabilities: Capabilities

    def submit(self, plan: bytes) -> None:
        """Begin what a step says, before the step's computation overwrites anything."""
        ...

    def poll(self) -> list[Result]:
        """What has ended since the last call; never raises for what a peer or a transfer does."""
        ...

    def flush(self, deadline: float) -> None:
        """Wait until nothing touches pages of requests that failed or were given up; raises `DeadlineExceeded`."""
        ...

    def cancel(self, request: str) -> None:
        """Give up what is under way for it; the result says so when its pages are safe."""
        ...

    def statistics(self) -> Sequence[Sample]:
        """Values of `tensorway.kv.METRICS`."""
        ...

    def close(self, deadline: float = 5.0) -> None:
        """End; pages are safe afterwards. The second call does nothing."""
        ...


class LayerwiseMover(Mover, Protocol):
    """A mover that streams layer by layer."""

    def before_layer(self, layer: int, deadline: float) -> None:
        """Wait until the layer's pages have arrived of all requests that were submitted, or they have failed.

        What is computed from them is worth nothing before the planner has said `received`: only then is it known that
        the blocks were whole.
        """
        ...

    def after_layer(self, layer: int) -> None:
        """The layer's pages of the requests that this step computes are written: send them on."""
        ...
