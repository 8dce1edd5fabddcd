"""The planner of `handover`: what is kept for whom, what is fetched for whom, and when each of it has ended.

May import the core and this package. One thread uses it, and nothing here waits: it talks to movers by `Step.plan` and
`Result`, and to nobody else. It joins two halves: `keeping` is the producer's, `wanting` the consumer's.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from tensorway import settings
from tensorway.errors import LayoutInvalid
from tensorway.exports import export
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
from tensorway_kv.keeping import Keeping
from tensorway_kv.life import Life
from tensorway_kv.meeting import VERSION, EngineRecord, Ground
from tensorway_kv.options import HandoverOptions
from tensorway_kv.orders import Orders
from tensorway_kv.staging import Pool
from tensorway_kv.stored import Stored
from tensorway_kv.wanting import Wanting


class HandoverPlanner:
    """See `tensorway.kv.contract.LayerwisePlanner`."""

    capabilities = Capabilities(pull=True, push=True, layerwise=True, bidirectional=True)

    def __init__(self, options: HandoverOptions, context: KVContext) -> None:
        geometry = _geometry(context)
        secret = options.secret or settings.secret()
        if not secret:
            tickets.tenant_of("", secret)  # raises what says how to set one
        #: This life of the engine.
        self.incarnation = uuid.uuid4().hex
        counts = Counters(METRICS, backend="handover", engine=context.engine)
        self._life = Life(
            context.engine, self.incarnation, context.ranks, geometry, options, secret, counts,
            Pool([options.staging_blocks] * len(geometry.groups)),
        )  # fmt: skip
        self._keeping, self._wanting = Keeping(self._life), Wanting(self._life)
        self._reader = messages.Reader()
        self._stored = Stored(geometry)
        self._closed = False
        self._ground = Ground(context.rendezvous, options.path, options.presence, context.facts)
        key = self._ground.engine_key(context.engine)
        self._ground.tell(key, EngineRecord(VERSION, self.incarnation, context.ranks), context.deadline)
        self._ground.follow()
        export("planner", self.statistics, METRICS)

    # -- the consumer's half

    def lookup(self, request: RequestView, have: int) -> Match:
        """What the request's ticket promises beyond what is here; nothing for a ticket that is none."""
        return self._wanting.lookup(request, have)

    def reserve(self, request: RequestView, blocks: Blocks, have: int, tokens: int) -> None:
        """Fetch `tokens` beyond `have`; for none, only say that the producer's blocks are not needed."""
        self._wanting.reserve(request, blocks, have, tokens)

    # -- the producer's half

    def promise(self, request: RequestView, tokens: int) -> Mapping[str, Any] | None:
        """A ticket for blocks that are still to be computed."""
        return None if self._closed else self._keeping.promise(request, tokens)

    def computes(self, request: RequestView, blocks: Blocks, first: int, stop: int) -> None:
        """This step computes these tokens of a promised request."""
        self._keeping.computes(request.id, blocks, first, stop)

    def finish(self, request: RequestView, blocks: Blocks, tokens: int, *, aborted: bool = False) -> Retention:
        """Keep the blocks if somebody asked for them, under a lease that the ticket names."""
        retention = self._keeping.finish(request, blocks, tokens, aborted=aborted or self._closed)
        if retention.keep:
            self._stored.kept(request, tokens)
        return retention

    def force(self, request: str) -> bool:
        """Take kept blocks back, whoever reads them; whether they were kept."""
        return self._keeping.leases.force(request)

    def drain(self) -> None:
        """Keep nothing more; what is kept may still be read."""
        self._keeping.leases.drain()

    def leases(self) -> Sequence[Mapping[str, Any]]:
        """What is kept, for people."""
        return self._keeping.list()

    # -- each step

    def plan_step(self) -> Step:
        """What ended, and what movers are to do."""
        now = time.monotonic()
        released, said = self._keeping.step(now)
        for request in released:
            self._stored.let_go(request)
        received, failed, asked = self._wanting.step(now)
        plan = Orders(
            orders.VERSION, self.incarnation, tuple(said.marks), tuple(asked.wants), tuple(asked.fetches),
            tuple(asked.cancels), tuple(asked.awaits), tuple(said.pushes), tuple(said.sends), tuple(said.refusals),
            tuple(said.copies),
        )  # fmt: skip
        return Step(released, received, failed, orders.encode(plan))

    def on_results(self, rank: int, results: Sequence[Result]) -> None:
        """What a rank has fetched, and what it heard."""
        for result in results:
            if result.what == "heard":
                message = self._reader.decode(result.proof)
                if message is not None:
                    self._keeping.heard(message, rank, time.monotonic())
            elif result.what == "sent":
                self._keeping.copied(rank, result)
            elif result.what == "received":
                self._wanting.said(rank, result)
            elif result.what == "cleared":
                self._wanting.cleared(rank, result)

    def cancel(self, request: str) -> None:
        """Give up what is fetched for it, and take back what is kept or promised of it."""
        self._keeping.abort(request)
        self._keeping.leases.force(request)
        self._wanting.cancel(request)

    def busy(self) -> bool:
        """Whether anything is kept, fetched, or still to be said."""
        return self._keeping.busy or self._wanting.busy

    def reset(self) -> None:
        """Take back whatever is kept: it is of other weights."""
        for row in self.leases():
            self._keeping.abort(str(row["request"]))
            self._keeping.leases.force(str(row["request"]))

    def events(self) -> Sequence[Event]:
        """Blocks of requests that came with hashes, while they are kept."""
        return self._stored.take()

    def statistics(self) -> list[Sample]:
        """What became of tickets, leases and requests."""
        self._keeping.count()
        self._wanting.count()
        return self._life.counts.samples()

    def close(self, deadline: float = 5.0) -> None:
        """End this life of the engine. Who needs what is kept to be read first calls `drain`, and waits."""
        if self._closed:
            return
        self._closed = self._wanting.closed = True
        self.drain()
        self._ground.close(deadline)


def _geometry(context: KVContext) -> RankGeometry:
    if context.geometry is None:
        asked = f"A planner of engine {context.engine} was to be made."
        raise LayoutInvalid(asked, "It was given no geometry.", "Give the memory of any of its ranks in the context.")
    return context.geometry
