"""The planner of `shared-store`: what of a request is stored, what is loaded and saved, and when each of it has ended.

May import the core and this package's meeting and store. One thread uses it, and nothing here waits: threads of a
`Keeper` ask the folder, and movers are talked to by `Step.plan` and `Result`.
"""

from __future__ import annotations

import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Final

import attrs

from tensorway import settings
from tensorway.exports import export
from tensorway.kv import (
    METRICS,
    Blocks,
    Capabilities,
    Event,
    KVContext,
    Match,
    RequestView,
    Result,
    Retention,
    Step,
)
from tensorway.metrics import Counters, Sample
from tensorway_kv.meeting import VERSION, EngineRecord, Ground
from tensorway_kv.store import orders
from tensorway_kv.store.announced import Announced
from tensorway_kv.store.keeper import Keeper, Kept, Whose
from tensorway_kv.store.looks import Look, layouts_of
from tensorway_kv.store.opening import folders
from tensorway_kv.store.options import SharedStoreOptions
from tensorway_kv.store.orders import Load, Orders, Save
from tensorway_kv.store.seals import Seals
from tensorway_kv.store.sections import check

#: Seconds for which an answer is good.
_GOOD: Final = 2.0
#: Requests whose blocks were looked for and that were not heard of again.
_MOST: Final = 4096
#: Requests that are running, and more.
_BEGUN: Final = 65_536
_NOTHING: Final = Match(0, "nothing")


@attrs.define(eq=False)
class _Loading:
    """A request whose blocks are loaded."""

    since: float
    #: Tokens that were there before, which is all that is good if the weights are others by now.
    have: int
    stale: bool = False
    said: dict[int, tuple[int, str]] = attrs.field(factory=dict)


@attrs.define(eq=False)
class _Saving:
    """A request that ended, whose blocks are kept until they are saved."""

    salt: str
    tenant: bytes
    #: Of all its full blocks; the names of those from `first` on.
    hashes: tuple[bytes, ...]
    first: int
    names: tuple[bytes, ...]
    #: For each group with which block its list begins.
    begins: tuple[int, ...]
    said: dict[int, tuple[int, str]] = attrs.field(factory=dict)


class SharedStorePlanner:
    """See `tensorway.kv.contract.Planner`."""

    capabilities = Capabilities(pull=False, by_content=True)

    def __init__(self, options: SharedStoreOptions, context: KVContext) -> None:
        geometry = check(context)
        self._options, self._ranks = options, context.ranks
        self._tokens = geometry.groups[0].block_tokens
        self._windows = {group: about.window for group, about in enumerate(geometry.groups)}
        self._seals = Seals(options.secret or settings.secret())
        where = folders(options, context.facts, self._seals, context.deadline)
        #: This life of the engine.
        self.incarnation = uuid.uuid4().hex
        #: What the weights are known by: empty for those that the facts name.
        self._epoch = ""
        self._looks: OrderedDict[str, Look] = OrderedDict()
        self._loading: dict[str, _Loading] = {}
        self._saving: dict[str, _Saving] = {}
        #: Blocks of requests that were loaded, from the first to behind the last: they need not be saved.
        self._loaded: OrderedDict[str, tuple[int, int]] = OrderedDict()
        #: In which epoch requests were first heard of.
        self._begun: OrderedDict[str, str] = OrderedDict()
        self._loads: list[Load] = []
        self._saves: list[Save] = []
        self._cancels: list[str] = []
        self._received: list[str] = []
        self._released: list[str] = []
        self._failed: dict[str, int] = {}
        #: What was saved, with how many blocks, and was not told yet; who never asks for events is not waited for.
        self._saved: deque[tuple[_Saving, int]] = deque(maxlen=_MOST)
        self._announced = Announced(self._tokens)
        self._counts = Counters(METRICS, backend="shared-store", engine=context.engine)
        self._closed = False
        self._ground = Ground(context.rendezvous, options.path, options.presence, context.facts)
        record = EngineRecord(VERSION, self.incarnation, context.ranks)
        self._ground.tell(self._ground.engine_key(context.engine), record, context.deadline)
        self._ground.follow()
        whose = Whose(context.engine, self.incarnation, context.ranks, dict(context.facts))
        kept = Kept(options.save, options.max_bytes)
        self._keeper = Keeper(whose, kept, self._ground, self._seals, where)
        export("planner", self.statistics, METRICS)

    # -- what is stored

    def lookup(self, request: RequestView, have: int) -> Match:
        """The longest prefix that is stored, beyond what is here; `later` while the folder is asked."""
        self._begun.setdefault(request.id, self._epoch)
        while len(self._begun) > _BEGUN:
            self._begun.popitem(last=False)
        look = self._look(request, have)
        if look is None:
            return _NOTHING
        if not look.over:
            return Match(0, "later")
        tokens = self._stop(look, request) - have
        return Match(tokens, "background", {self._options.label: tokens}) if tokens > 0 else _NOTHING

    def _look(self, request: RequestView, have: int) -> Look | None:
        """What is known of a request, or begins to be found out; None if nothing of it can be stored."""
        now, look = time.monotonic(), self._looks.get(request.id)
        if self._closed or request.id in self._loading:
            return None
        if look is not None:
            self._judge(look, now)
        old = look is not None and look.over and now - look.over_at > _GOOD
        if look is not None and not old and look.first <= max(0, have) // self._tokens:
            return look
        first = max(0, have) // self._tokens
        hashes = request.hashes[first : request.tokens // self._tokens]
        if not hashes:
            return None
        tenant = self._seals.tenant(request.salt, self._epoch)
        look = Look(request.id, first, hashes, tenant, now + self._options.lookup_deadline, self._windows)
        self._looks[request.id] = look
        while len(self._looks) > _MOST:
            self._looks.popitem(last=False)[1].end()
        self._keeper.look(look)
        return look

    def _judge(self, look: Look, now: float) -> None:
        """A look whose time is over counts as far as it came; who watches learns that the folder is slow, or broken."""
        late = not look.over and now >= look.until
        if late:
            look.end()
        if late or (look.why and not look.judged):
            look.judged = True
            self._count("load", "deadline" if late else "failed")

    def _stop(self, look: Look, request: RequestView) -> int:
        """Behind the last token that can be had."""
        most = max(0, request.tokens // self._tokens - look.first)
        return (look.first + look.blocks(self._tokens, most)) * self._tokens

    # -- loading

    def reserve(self, request: RequestView, blocks: Blocks, have: int, tokens: int) -> None:
        """Load `tokens` beyond `have`, as far as `lookup` has found them."""
        if request.id in self._loading:
            return
        look = self._looks.pop(request.id, None)
        if look is not None:
            look.end()
        if tokens <= 0:
            return
        first = have // self._tokens
        stop = have + tokens
        if look is None or self._closed or first < look.first or have < 0 or stop > self._stop(look, request):
            self._count("load", "refused")
            self._failed[request.id] = have
            return
        begin, end = first - look.first, -(-stop // self._tokens) - look.first
        layouts, which = layouts_of(look.found[begin:end], len(self._windows))
        now = time.monotonic()
        self._loading[request.id] = _Loading(now, have)
        names = tuple(look.names[begin:end])
        seconds = self._options.deadline
        self._loads.append(Load(request.id, seconds, have, stop, names, layouts, which, _ids(blocks)))
        self._loaded[request.id] = (first, -(-stop // self._tokens))
        while len(self._loaded) > _MOST:
            self._loaded.popitem(last=False)

    # -- saving

    def finish(self, request: RequestView, blocks: Blocks, tokens: int, *, aborted: bool = False) -> Retention:
        """Keep the blocks until those that are full are saved."""
        look = self._looks.pop(request.id, None)
        if look is not None:
            look.end()
        loaded, begun = self._loaded.pop(request.id, (0, 0)), self._begun.pop(request.id, self._epoch)
        count = min(len(request.hashes), tokens // self._tokens)
        if aborted or not self._options.save or self._closed or request.id in self._saving:
            return Retention(False)
        if begun != self._epoch:
            return Retention(False)  # some of it was computed by other weights
        first = loaded[1] if loaded[0] == 0 else 0
        if count <= first or not any(blocks):
            return Retention(False)
        tenant = self._seals.tenant(request.salt, self._epoch)
        names = tuple(self._seals.name(block, tenant) for block in request.hashes[first:count])
        hashes = tuple(request.hashes[first:count])
        ids, held = _ids(blocks), -(-tokens // self._tokens)
        begins = tuple(max(0, held - len(group)) for group in ids)
        self._saving[request.id] = _Saving(request.salt, tenant, hashes, first, names, begins)
        self._saves.append(Save(request.id, self._options.deadline, tokens, first, names, ids))
        return Retention(True)

    # -- each step

    def plan_step(self) -> Step:
        """What ended, and what movers are to do."""
        now, label = time.monotonic(), self._options.label
        for load in self._loads:
            queued = now - self._loading[load.request].since
            self._counts.took("kv_phase_seconds", queued, direction="load", peer=label, phase="queued")
        plan = orders.encode(
            Orders(orders.VERSION, self.incarnation, tuple(self._loads), tuple(self._saves), tuple(self._cancels))
        )
        step = Step(self._released, self._received, self._failed, plan)
        self._released, self._received, self._failed = [], [], {}
        self._loads, self._saves, self._cancels = [], [], []
        return step

    def on_results(self, rank: int, results: Sequence[Result]) -> None:
        """What a rank has loaded, and what it has saved."""
        for result in results:
            known = self._known(result)
            if known is None or rank in known.said or not 0 <= rank < self._ranks:
                self._counts.add("kv_results_refused_total")
                continue
            known.said[rank] = (result.tokens, result.cause)
            if len(known.said) < self._ranks:
                continue
            good = min(tokens for tokens, _ in known.said.values())
            causes = sorted({cause for _, cause in known.said.values() if cause})
            if isinstance(known, _Loading):
                self._loading_ended(result.request, good, causes)
            else:
                self._saving_ended(result.request, known, good, causes)

    def _known(self, result: Result) -> _Loading | _Saving | None:
        if result.what == "received":
            return self._loading.get(result.request)
        return self._saving.get(result.request) if result.what == "sent" else None

    def _loading_ended(self, request: str, good: int, causes: list[str]) -> None:
        loading = self._loading.pop(request)
        if loading.stale:
            good, causes = loading.have, causes or ["cancelled"]
        self._count("load", causes[0] if causes else "none")
        if not causes:
            self._received.append(request)
            return
        self._loaded.pop(request, None)
        self._failed[request] = good

    def _saving_ended(self, request: str, saving: _Saving, good: int, causes: list[str]) -> None:
        del self._saving[request]
        self._released.append(request)
        self._count("save", causes[0] if causes else "none")
        self._saved.append((saving, max(0, good // self._tokens - saving.first)))

    def cancel(self, request: str) -> None:
        """Give up what is loaded or saved for it."""
        self._begun.pop(request, None)
        look = self._looks.pop(request, None)
        if look is not None:
            look.end()
        if request in self._loading or request in self._saving:
            self._cancels.append(request)

    def busy(self) -> bool:
        """Whether anything is loaded, saved, or still to be said."""
        pending = self._received or self._released or self._failed or self._cancels
        return bool(self._loading or self._saving or pending)

    def reset(self) -> None:
        """Find nothing more of what was stored: the weights are others, under a name that only this life knows."""
        self._epoch = uuid.uuid4().hex
        for look in self._looks.values():
            look.end()
        self._looks.clear()
        self._loaded.clear()
        self._cancels += self._loading
        for loading in self._loading.values():
            loading.stale = True
        self._saved.clear()
        self._announced.cleared()

    def events(self) -> Sequence[Event]:
        """What was stored and, of that, removed."""
        catalogue, removed = self._keeper.catalogue, self._keeper.removed
        if catalogue is None:
            return self._announced.events()
        while self._saved:
            saving, whole = self._saved.popleft()
            if saving.tenant == self._seals.tenant(saving.salt, self._epoch):  # and not of weights that are gone
                for group in catalogue.groups:
                    saved = slice(max(0, saving.begins[group] - saving.first), whole)
                    self._announced.stored(saving.names[saved], saving.hashes[saved], saving.salt, group)
        groups = {one.layout: one.group for one in catalogue.own}
        while removed:
            layout, name = removed.popleft()
            if layout in groups:
                self._announced.removed(name, groups[layout])
        return self._announced.events()

    def statistics(self) -> list[Sample]:
        """What became of requests, and how much is stored where that is limited."""
        for direction, waiting in (("load", self._loading), ("save", self._saving)):
            self._counts.set("kv_requests_waiting", len(waiting), direction=direction)
        if self._keeper.stored is not None:
            self._counts.set("kv_stored_bytes", self._keeper.stored, peer=self._options.label)
        return self._counts.samples()

    def close(self, deadline: float = 5.0) -> None:
        """End this life of the engine; what is stored stays."""
        if self._closed:
            return
        self._closed = True
        until = time.monotonic() + deadline
        for look in self._looks.values():
            look.end()
        self._keeper.close(deadline)
        self._ground.close(max(0.1, until - time.monotonic()))

    def _count(self, direction: str, cause: str) -> None:
        self._counts.add("kv_requests_total", direction=direction, peer=self._options.label, cause=cause)


def _ids(blocks: Blocks) -> orders.Ids:
    return tuple(tuple(map(int, group)) for group in blocks)
