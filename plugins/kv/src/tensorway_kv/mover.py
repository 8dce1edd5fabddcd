"""The mover of `handover`: beside one rank's memory, it writes words, fetches and sends blocks, and says what it hears.

May import the core and this package. It decides nothing: what is kept and until when the planner says, and what other
engines' ranks tell it goes to the planner as it came, after it was seen that they are who they say.
"""

from __future__ import annotations

import time
from collections import deque

import tensorway
from tensorway.errors import Closed, DeadlineExceeded, LayoutInvalid, Unsupported
from tensorway.exports import export
from tensorway.kv import METRICS, Capabilities, KVContext, RankGeometry, Result
from tensorway.metrics import Counters, Sample
from tensorway.rendezvous import Directory
from tensorway.transport import Transport
from tensorway.transport.transfer import pauses
from tensorway_kv import messages, orders
from tensorway_kv.answering import Answering
from tensorway_kv.asking import Asking
from tensorway_kv.board import Board, Scratch
from tensorway_kv.bound import Bound
from tensorway_kv.ears import Ears
from tensorway_kv.landings import Landing, cleared
from tensorway_kv.linking import Links
from tensorway_kv.links import Link, Reader
from tensorway_kv.meeting import VERSION, Ground, RankRecord
from tensorway_kv.observed import Observer
from tensorway_kv.options import HandoverOptions
from tensorway_kv.pulls import Pull
from tensorway_kv.serving import Serving
from tensorway_kv.staging import Staging, copied, staging_of
from tensorway_kv.topology import TransferTopology
from tensorway_kv.writing import Answerer, Writer


class HandoverMover:
    """See `tensorway.kv.contract.LayerwiseMover`."""

    def __init__(self, options: HandoverOptions, context: KVContext) -> None:
        until = time.monotonic() + context.deadline
        self._geometry = _geometry(context)
        self._counts = Counters(METRICS, backend="handover", engine=context.engine, rank=str(context.rank))
        self._observer, self._deadline = Observer(self._counts, context, spans=options.spans), options.deadline
        endpoint = tensorway.create("transport", options.transport, dict(options.transport_options))
        self.endpoint: Transport = endpoint
        devices = {plane.device.partition(":")[0] for plane in self._geometry.planes}
        media = self.endpoint.capabilities.media | (devices if options.stage else set())
        self.capabilities = Capabilities(pull=True, push=True, layerwise=True, bidirectional=True, media=media)
        self._layerwise = options.layerwise
        self._ground = Ground(context.rendezvous, options.path, options.presence, context.facts)
        self._own: Directory | None = None
        self._staging: Staging | None = None
        #: Where others read from, and where fetched blocks arrive, if neither is the pages.
        self._between: Staging | None = None
        self._links: Links[Bound] | None = None
        self._wants: dict[str, tuple[orders.Want, Link[Bound], float]] = {}
        self._pulls: dict[str, Pull] = {}
        #: Those that have ended, and whose staging memory may still be written to.
        self._clearing: list[Pull] = []
        self._landings: dict[tuple[str, str, int], Landing] = {}
        self._serving: Serving | None = None
        #: Where the transport's reads are slow: what others ask us to write, and we them.
        self._answering: Answering | None = None
        self._asking: Asking | None = None
        #: What had ended already when it was submitted.
        self._early: list[Result] = []
        self._replaced: deque[tuple[str, str]] = deque()
        self._closed = False
        try:
            self._open(context, options, until)
        except BaseException:
            self.close()
            raise
        export("mover", self.statistics, METRICS)

    def _open(self, context: KVContext, options: HandoverOptions, until: float) -> None:
        capabilities = self.endpoint.capabilities
        if "read" not in capabilities.operations or not capabilities.notify:
            asked = f"KV blocks were to be handed over by transport {self.endpoint.name}."
            raise Unsupported(asked, "It cannot read, or cannot notify.", "Take another.")
        self._staging = staging_of(options, context, capabilities.media)
        self._between = self._staging if options.stage else None
        told = self._geometry if self._between is None else self._between.geometry
        self._board, scratch = Board(told.blocks), Scratch()
        pages = [plane.region for plane in told.planes] if self._between is None else []
        regions = {(one.address, one.nbytes): one for one in pages}
        landing = self._staging.regions if self._staging is not None else ()
        self.endpoint.register(*regions.values(), self._board.region, scratch.region, *landing)
        engine = self._ground.wait_engine(context.engine, _left(until, context))
        #: This life of the engine; the planner chose it.
        self.incarnation = engine.incarnation
        me = {"engine": self.incarnation, "rank": str(context.rank)}
        self._own = self._ground.join(self.endpoint, context.engine, self.incarnation, f"r{context.rank}", me)
        self._own.live(_left(until, context))
        board, staged = self._board.region.address, self._staging.geometry if self._staging is not None else None
        record = RankRecord(VERSION, self.endpoint.incarnation, told, board, staged)
        key = self._ground.rank_key(context.engine, self.incarnation, context.rank)
        self._ground.tell(key, record, _left(until, context))
        records = self._ground.ranks(context.engine, self.incarnation, context.ranks, until)
        ranks, who = [record.geometry for record in records], (context.engine, self.incarnation)
        self._reader = Reader(self._ground, self.endpoint, TransferTopology(ranks, context.rank), scratch, who)
        self._links = Links(self._reader)
        writer = Writer(self._ground, self.endpoint, ranks, who, context.rank)
        self._serving = Serving(writer, self._board, self._counts)
        self._ears = Ears(self.endpoint, self._own)
        if any(operation == "read" for _, operation in capabilities.emulated):
            answerer = Answerer(self._ground, self.endpoint, ranks, who, context.rank)
            self._answering = Answering(answerer, self._board, self._ears)
            self._asking = Asking(self._reader) if options.prefer == "auto" else None
        self._ground.follow(lambda name, life: self._replaced.append((name, life)))

    # -- what the planner says

    def submit(self, plan: bytes) -> None:
        """Write the words, and begin what is to be fetched; raises only for a plan that is none."""
        self._check()
        what = orders.decode(plan, self.incarnation)
        for mark in what.marks:
            self._board.write(mark)
        self._early += [copied(self._between, copy) for copy in what.copies]
        now = time.monotonic()
        for want in what.wants:
            link = self._to(want)
            link.hold(want)
            self._wants[want.request] = (want, link, now + want.seconds)
        for fetch in what.fetches:
            self._fetch(fetch)
        for order in what.awaits:
            self._await(order)
        for request in what.cancels:
            self.cancel(request)
        self._serve.submit(what)
        self._early += self._advance(now)

    def cancel(self, request: str) -> None:
        """Give up what is under way for it."""
        self._unwant(request)
        if (pull := self._pulls.get(request)) is not None:
            pull.cancel()
        for landing in self._landings.values():
            if landing.fetch.want.request == request:
                landing.cancel()

    def poll(self) -> list[Result]:
        """What has ended, and what was heard."""
        self._check()
        now = time.monotonic()
        while self._replaced:
            life = self._replaced.popleft()
            self._known.replaced(*life)
            self._serve.links.replaced(*life)
            if self._answering is not None:
                self._answering.replaced(*life)
        for request in [request for request, (_, _, end) in self._wants.items() if end <= now]:
            self._unwant(request)
        results = [*self._early, *self._go_on(now)]
        self._early.clear()
        self._tidy()
        return results

    def before_layer(self, layer: int, deadline: float) -> None:
        """Wait until the layer's pages of all that is being fetched have arrived, or nobody waits for them."""
        self._check()
        until, waits = time.monotonic() + deadline, pauses()
        while missing := self._missing(layer):
            self._early += self._go_on(time.monotonic())
            if time.monotonic() >= until:
                raise DeadlineExceeded(
                    f"Layer {layer} was to be computed.",
                    f"Its pages have not arrived within {deadline:g} s of: {', '.join(missing[:8])}.",
                    "Leave these requests out of the step; the mover says what becomes of them.",
                )
            time.sleep(next(waits))

    def after_layer(self, layer: int) -> None:
        """Send a layer of what this step computes to whoever has asked for it."""
        self._check()
        self._serve.after_layer(layer)

    def flush(self, deadline: float) -> None:
        """Wait until no page of what failed is written to any more."""
        until = time.monotonic() + deadline
        while not all(pull.safe for pull in self._pulls.values() if pull.failing):
            if time.monotonic() >= until:
                raise DeadlineExceeded(
                    "Pages were to be overwritten.",
                    f"Transfers into some of them have not let go of them within {deadline:g} s.",
                    "Leave these pages alone until the mover has said that their requests failed.",
                )
            self.endpoint.poll()
            time.sleep(1e-3)

    def statistics(self) -> list[Sample]:
        """What became of fetches, how long their phases took, and what was not believed."""
        counts, reading, writing = self._counts, self._known, self._serve.links
        for cause, count in self._ears.refused.items():
            counts.set("kv_messages_refused_total", count, cause=cause)
        told = reading.told() + writing.told()
        for what in ("sent", "again", "given_up"):
            counts.set("kv_messages_total", told[what], what=what)
        counts.set("kv_links", len(reading) + len(writing), state="known")
        counts.set("kv_links", reading.connected() + writing.connected(), state="connected")
        counts.set("kv_requests_waiting", len(self._pulls), direction="pull")
        counts.set("kv_requests_waiting", len(self._landings), direction="push")
        return counts.samples()

    def close(self, deadline: float = 5.0) -> None:
        """End; whoever reads from here sees that this rank is gone."""
        if self._closed:
            return
        self._closed = True
        until = time.monotonic() + deadline
        if self._links is not None:
            self._links.stop()
        if self._answering is not None:
            self._answering.close(until)
        if self._serving is not None:
            self._serving.links.close(until)
        if self._links is not None:
            self._links.close(until)
        if self._own is not None:
            self._own.close()
        self._ground.close(max(0.1, until - time.monotonic()))
        self.endpoint.close(max(0.1, until - time.monotonic()))

    # -- inside

    def _go_on(self, now: float) -> list[Result]:
        heard = self._heard(now)  # first, because it may be what somebody waits for
        return [*self._advance(now), *heard]

    def _missing(self, layer: int) -> list[str]:
        """Requests of which a layer's pages may still come: what is pushed is there all at once."""
        pushed = [landing.fetch.want.request for landing in self._landings.values() if not landing.ended]
        return [request for request, pull in self._pulls.items() if not pull.has(layer)] + pushed

    @property
    def _known(self) -> Links[Bound]:
        assert self._links is not None
        return self._links

    @property
    def _serve(self) -> Serving:
        assert self._serving is not None
        return self._serving

    def _fetch(self, fetch: orders.Fetch) -> None:
        self._unwant(fetch.want.request)
        if fetch.want.request not in self._pulls:
            self._pulls[fetch.want.request] = Pull(
                fetch,
                self._to(fetch.want),
                self._reader,
                layerwise=self._layerwise,
                staging=self._between,
                asking=self._asking,
            )

    def _await(self, order: orders.Await) -> None:
        assert self._staging is not None, "a planner without staging memory asks for none to be written to"
        self._unwant(order.fetch.want.request)
        landing = Landing(order, self._to(order.fetch.want), self._reader, self._staging)
        if landing.fits():
            self._landings[landing.key] = landing
            return
        self._early.append(cleared(order.fetch.want))
        if any(order.fetch.their_blocks) and self._between is None:
            self._fetch(order.fetch)  # the ranks do as each must; the producer counts them alike
            return
        landing.fail("refused", "what is to be asked for is longer than what the transport carries; stage less at once")
        self._early += [result for result in landing.advance(time.monotonic(), landing.link) if result.cause]

    def _advance(self, now: float) -> list[Result]:
        results = []
        for request, pull in list(self._pulls.items()):
            result = pull.advance(now)
            if result is not None:
                del self._pulls[request]
                results.append(result)
                self._observer.ended(pull.seen(result, self._deadline))
                if pull.fetch.pages is not None:
                    self._clearing.append(pull)
        for pull in [pull for pull in self._clearing if pull.let_go()]:
            self._clearing.remove(pull)
            results.append(cleared(pull.fetch.want))
        for key, landing in list(self._landings.items()):
            for result in landing.advance(now, self._to(landing.fetch.want) if landing.ended else landing.link):
                results.append(result)
                if result.what == "received":
                    self._observer.ended(landing.seen(result, self._deadline))
            if landing.clear:
                del self._landings[key]
        self._serve.advance(now)
        for peer, cause in self._answering.ended() if self._answering is not None else ():
            self._counts.add("kv_transfers_total", direction="push", peer=peer, cause=cause or "none")
        return results

    def _to(self, want: orders.Want) -> Link[Bound]:
        return self._known.to(want.engine, want.incarnation)

    def _unwant(self, request: str) -> None:
        found = self._wants.pop(request, None)
        if found is not None:
            found[1].drop(found[0])

    def _tidy(self) -> None:
        self._known.tidy(
            {
                *(pull.link for pull in (*self._pulls.values(), *self._clearing)),
                *(one.link for one in self._landings.values()),
            }
        )
        self._serve.tidy()

    def _heard(self, now: float) -> list[Result]:
        """What is for the planner; what a push says is for who awaits it."""
        results = []
        heard = self._ears.listen(now) if self._answering is None else self._answering.hear(now)
        for message, payload in heard:
            if isinstance(message, messages.Ready | messages.Pushed | messages.Refusal):
                if not self._awaited(message):
                    self._counts.add("kv_messages_refused_total", cause="unawaited")
            else:
                results.append(Result(getattr(message, "request", ""), "heard", proof=payload))
        return results

    def _awaited(self, message: messages.Ready | messages.Pushed | messages.Refusal) -> bool:
        if self._asking is not None and self._asking.heard(message):
            return True
        if isinstance(message, messages.Ready):
            return False
        landing = self._landings.get((message.sender, message.request, message.epoch))
        return landing is not None and landing.heard(message)

    def _check(self) -> None:
        if self._closed:
            raise Closed("A mover of KV blocks was used.", "It is closed.", "Open another.")


def _geometry(context: KVContext) -> RankGeometry:
    if context.geometry is None:
        asked = f"A mover of engine {context.engine} was to be made."
        raise LayoutInvalid(asked, "It was given no geometry.", "Give the memory of its rank in the context.")
    context.geometry.check(f"rank {context.rank} of {context.engine}")
    return context.geometry


def _left(until: float, context: KVContext) -> float:
    left = until - time.monotonic()
    if left <= 0:
        asked = f"A mover of engine {context.engine} was to be opened."
        raise DeadlineExceeded(asked, f"It took more than {context.deadline:g} s.", "See whether its planner runs.")
    return left
