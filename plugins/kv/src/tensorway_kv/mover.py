"""The mover of `handover`: beside one rank's memory, it writes words, fetches blocks, and passes on what it hears.

May import the core and this package's meeting, links, pulls and orders. It decides nothing: what is kept and until when
the planner says, and what other engines' ranks tell it goes to the planner as it came, after it was seen that they are
who they say.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import Final

import tensorway
from tensorway._logging import logger
from tensorway.errors import Closed, DeadlineExceeded, LayoutInvalid, Unsupported
from tensorway.kv import METRICS, Capabilities, KVContext, RankGeometry, Result
from tensorway.metrics import Counters, Sample
from tensorway.rendezvous import Directory
from tensorway.transport import Notification, Transport
from tensorway_kv import messages, orders
from tensorway_kv.board import Board, Scratch
from tensorway_kv.links import Link, Reader
from tensorway_kv.meeting import VERSION, Ground, RankRecord
from tensorway_kv.observed import Observer
from tensorway_kv.options import HandoverOptions
from tensorway_kv.pulls import Pull
from tensorway_kv.topology import TransferTopology

_log = logger("kv")
#: Messages of strangers that are kept until the directory says who they are, and for how many seconds.
_STRANGERS: Final = 1024
_PATIENCE: Final = 5.0
#: Senders that are remembered after they left the directory.
_KNOWN: Final = 4096
#: Messages that one poll passes on.
_HEARD: Final = 1024
_FAMILIAR: Final = 0.05


class HandoverMover:
    """See `tensorway.kv.contract.Mover`."""

    def __init__(self, options: HandoverOptions, context: KVContext) -> None:
        until = time.monotonic() + context.deadline
        self._geometry = _geometry(context)
        self._counts = Counters(METRICS, backend="handover", engine=context.engine, rank=str(context.rank))
        self._observer, self._deadline = Observer(self._counts, context, spans=options.spans), options.deadline
        endpoint = tensorway.create("transport", options.transport, dict(options.transport_options))
        self.endpoint: Transport = endpoint
        self.capabilities = Capabilities(pull=True, media=self.endpoint.capabilities.media)
        self._ground = Ground(context.rendezvous, options.path, options.presence, context.facts)
        self._own: Directory | None = None
        self._links: dict[tuple[str, str], Link] = {}
        self._wants: dict[str, tuple[orders.Want, Link, float]] = {}
        self._pulls: dict[str, Pull] = {}
        #: What had ended already when it was submitted.
        self._early: list[Result] = []
        #: Links that are over; their threads may still have something to say.
        self._over: list[Link] = []
        self._told: Counter[str] = Counter()
        self._messages = messages.Reader()
        self._strangers: deque[tuple[float, Notification]] = deque()
        self._senders: dict[str, tuple[str, int]] = {}
        self._familiar_at = 0.0
        self._replaced: deque[tuple[str, str]] = deque()
        self._closed = False
        try:
            self._open(context, until)
        except BaseException:
            self.close()
            raise

    def _open(self, context: KVContext, until: float) -> None:
        capabilities = self.endpoint.capabilities
        if "read" not in capabilities.operations or not capabilities.notify:
            asked = f"KV blocks were to be handed over by transport {self.endpoint.name}."
            raise Unsupported(asked, "It cannot read, or cannot notify.", "Take another.")
        self._board, scratch = Board(self._geometry.blocks), Scratch()
        regions = {(one.address, one.nbytes): one for one in (plane.region for plane in self._geometry.planes)}
        self.endpoint.register(*regions.values(), self._board.region, scratch.region)
        engine = self._ground.wait_engine(context.engine, _left(until, context))
        #: This life of the engine; the planner chose it.
        self.incarnation = engine.incarnation
        me = {"engine": self.incarnation, "rank": str(context.rank)}
        self._own = self._ground.join(self.endpoint, context.engine, self.incarnation, f"r{context.rank}", me)
        self._own.live(_left(until, context))
        record = RankRecord(VERSION, self.endpoint.incarnation, self._geometry, self._board.region.address)
        key = self._ground.rank_key(context.engine, self.incarnation, context.rank)
        self._ground.tell(key, record, _left(until, context))
        records = self._ground.ranks(context.engine, self.incarnation, context.ranks, until)
        topology = TransferTopology([record.geometry for record in records], context.rank)
        self._reader = Reader(self._ground, self.endpoint, topology, scratch, (context.engine, self.incarnation))
        self._ground.follow(lambda name, life: self._replaced.append((name, life)))

    # -- what the planner says

    def submit(self, plan: bytes) -> None:
        """Write the words, and begin what is to be fetched; raises only for a plan that is none."""
        self._check()
        what = orders.decode(plan, self.incarnation)
        for mark in what.marks:
            self._board.write(mark)
        now = time.monotonic()
        for want in what.wants:
            link = self._link(want)
            link.hold(want)
            self._wants[want.request] = (want, link, now + want.seconds)
        for fetch in what.fetches:
            self._unwant(fetch.want.request)
            if fetch.want.request not in self._pulls:
                self._pulls[fetch.want.request] = Pull(fetch, self._link(fetch.want), self._reader)
        for request in what.cancels:
            self.cancel(request)
        self._early += self._advance(now)

    def cancel(self, request: str) -> None:
        """Give up what is under way for it."""
        self._unwant(request)
        if (pull := self._pulls.get(request)) is not None:
            pull.cancel()

    def poll(self) -> list[Result]:
        """What has ended, and what was heard."""
        self._check()
        now = time.monotonic()
        while self._replaced:
            name, life = self._replaced.popleft()
            for link in self._links.values():
                if link.engine == name and link.incarnation != life:
                    link.lose("lost", f"it was replaced by its incarnation {life[:12]}")
        for request in [request for request, (_, _, end) in self._wants.items() if end <= now]:
            self._unwant(request)
        results = [*self._early, *self._advance(now), *self._heard(now)]
        self._early.clear()
        self._tidy()
        return results

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
        counts, links = self._counts, list(self._links.values())
        for cause, count in self._messages.refused.items():
            counts.set("kv_messages_refused_total", count, cause=cause)
        told = sum((Counter(link.counts) for link in (*links, *self._over)), Counter(self._told))
        for what in ("sent", "again", "given_up"):
            counts.set("kv_messages_total", told[what], what=what)
        counts.set("kv_links", len(links), state="known")
        counts.set("kv_links", sum(link.bound is not None and not link.lost for link in links), state="connected")
        counts.set("kv_requests_waiting", len(self._pulls), direction="pull")
        return counts.samples()

    def close(self, deadline: float = 5.0) -> None:
        """End; whoever reads from here sees that this rank is gone."""
        if self._closed:
            return
        self._closed = True
        until = time.monotonic() + deadline
        links = [*self._links.values(), *self._over]
        for link in links:
            link.stop()
        for link in links:
            link.close(max(0.0, until - time.monotonic()))
        if self._own is not None:
            self._own.close()
        self._ground.close(max(0.1, until - time.monotonic()))
        self.endpoint.close(max(0.1, until - time.monotonic()))

    # -- inside

    def _advance(self, now: float) -> list[Result]:
        results = []
        for request, pull in list(self._pulls.items()):
            result = pull.advance(now)
            if result is not None:
                del self._pulls[request]
                results.append(result)
                self._observer.ended(pull.ended(result, self._deadline))
        return results

    def _link(self, want: orders.Want) -> Link:
        key = (want.engine, want.incarnation)
        link = self._links.get(key)
        if link is not None and link.lost and link.hopeless is None:
            self._retire(link)  # the connection broke, and the engine may live
            link = None
        if link is None:
            link = self._links[key] = Link(self._reader, *key)
        return link

    def _unwant(self, request: str) -> None:
        found = self._wants.pop(request, None)
        if found is not None:
            found[1].drop(found[0])

    def _tidy(self) -> None:
        """Let go of lives that are over, once nobody waits for them."""
        used = {pull.link for pull in self._pulls.values()}
        for key, link in list(self._links.items()):
            if link.hopeless is not None and link not in used:
                self._retire(link)
                del self._links[key]
        for link in [link for link in self._over if link.ended]:
            self._over.remove(link)
            self._told.update(link.counts)

    def _retire(self, link: Link) -> None:
        link.stop()
        self._over.append(link)

    def _heard(self, now: float) -> list[Result]:
        if now >= self._familiar_at:
            self._familiar_at = now + _FAMILIAR
            self._meet()
        waiting = [*self._strangers, *((now, note) for note in self.endpoint.notifications())]
        self._strangers.clear()
        results: list[Result] = []
        for since, note in waiting:
            sender = self._senders.get(note.incarnation)
            if len(results) >= _HEARD or (sender is None and now - since < _PATIENCE):
                self._strangers.append((since, note))
                continue
            message = self._messages.decode(note.payload)
            if message is not None and sender is not None and self._is(message, sender):
                request = getattr(message, "request", "")
                results.append(Result(request, "heard", proof=note.payload))
            elif sender is None:
                self._messages.refused["foreign"] += 1
        while len(self._strangers) > _STRANGERS:
            self._strangers.popleft()
            self._messages.refused["foreign"] += 1
        return results

    def _is(self, message: messages.Message, sender: tuple[str, int]) -> bool:
        """Whether it comes from who it says that it is from, life and rank."""
        if self._messages.checked(message, sender[0]) is None:
            return False
        if getattr(message, "rank", sender[1]) != sender[1]:
            self._messages.refused["forged"] += 1
            return False
        return True

    def _meet(self) -> None:
        """Who is in our directory, by their endpoints: whose words may be believed."""
        if self._own is None:
            return
        try:
            members = self._own.members().values()
        except Closed as error:  # another process took our place; the planner that is with it will not hear us
            _log.debug("%s", error)
            return
        for member in members:
            life, rank = (member.facts.get(name) for name in ("engine", "rank"))
            if life is None or rank is None or not isinstance(life.value, str) or not str(rank.value).isdecimal():
                continue
            self._senders.pop(member.incarnation, None)
            self._senders[member.incarnation] = (life.value, int(str(rank.value)))
        while len(self._senders) > _KNOWN:
            del self._senders[next(iter(self._senders))]

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
