"""The scheduler's side: vLLM's questions to a planner, and what vLLM is told of requests.

May import the core. vLLM asserts what it is told: only a request that it has parked is told as received, and only one
whose pages it keeps as sent. Both are known here, and nothing is told of any other. What a request is worth is decided
here as well: one that cannot be handed over, for whatever reason, is computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import attrs

from tensorway._logging import logger
from tensorway.kv import METRICS, Match, Planner, RequestView, Retention
from tensorway.kv import Step as Decided
from tensorway.metrics import Counters, Sample
from tensorway_vllm.handover.making import Opened, Troubles
from tensorway_vllm.handover.memory import Shape
from tensorway_vllm.handover.options import HandoverOptions
from tensorway_vllm.handover.planners import Planners
from tensorway_vllm.handover.wishes import Promised, about, promised, told, wanted
from tensorway_vllm.handover.words import Said, Step

_log = logger("vllm")
_NOTHING: Final = Match(0, "nothing")
_UNKEPT: Final = Retention(False)
#: Why a request ends that was not given up.
_SAID: Final = ("stop", "length", "repetition")


@attrs.define(eq=False)
class _Coming:
    """A request that came with a ticket, until it ends."""

    view: RequestView
    #: Tokens that can be had, as far as they are needed: the last one of the prompt is computed in any case.
    tokens: int
    #: What the engine had when it asked last.
    have: int = 0
    #: When it was first told to ask again, and when its pages were allocated.
    later: float = 0.0
    reserved: bool = False


@attrs.define(eq=False)
class _Parked:
    """A request that vLLM computes only when it is told that its pages have come."""

    have: int
    tokens: int
    lists: list[list[int]]
    since: float
    given_up: bool = False


class Scheduling:
    """The planner's side of one engine."""

    def __init__(
        self,
        options: HandoverOptions,
        shape: Shape,
        make: Callable[[], Opened[Planner]],
        ranks: int,
        *,
        consumer: bool = True,
        producer: bool = True,
    ) -> None:
        """`consumer`, `producer`: whether requests are handed over to this engine, and by it."""
        self._options, self._shape, self._consumer, self._producer = options, shape, consumer, producer
        self._counts = Counters(METRICS, backend="vllm")
        self._troubles = Troubles(self._counts)
        self._planners = Planners(make, ranks, options.retry_seconds, options.start_seconds, self._troubles)
        self._life = self._planners.life
        #: Requests that came with a ticket; None for those whose ticket is none.
        self._coming: dict[str, _Coming | None] = {}
        self._parked: dict[str, _Parked] = {}
        #: How many pages are kept of each.
        self._kept: dict[str, int] = {}
        #: What the next step tells.
        self._plans: list[bytes] = []
        self._sent: set[str] = set()
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._bad: set[int] = set()
        #: Something was said to the planner, so it may have something to say.
        self._asked = False
        self._idle = Step(0)

    # -- a request that came with a ticket

    def matched(self, request: Any, have: int) -> tuple[int | None, bool]:
        """See `get_num_new_matched_tokens`. Of a request that was asked for once, there is nothing any more."""
        coming = self._came(request)
        if coming is None or coming.reserved:
            return 0, False
        coming.have = have
        planner = self._planners.now
        if planner is None or coming.tokens <= have:
            return 0, False
        if self._planners.opening:
            return self._later(coming)
        self._asked = True
        match = self._troubles.guard("look a request up", lambda: planner.lookup(coming.view, have), _NOTHING)
        if match.mode == "later":
            return self._later(coming)
        tokens = 0 if match.mode == "nothing" else min(coming.tokens, self._pages(have + match.tokens)) - have
        return (tokens, True) if tokens > 0 else (0, False)

    def _later(self, coming: _Coming) -> tuple[int | None, bool]:
        """It is not known yet; a request does not wait for that for ever."""
        now = time.monotonic()
        coming.later = coming.later or now
        return (None, False) if now - coming.later < self._options.later_seconds else (0, False)

    def _pages(self, tokens: int) -> int:
        """What whole pages hold: a planner is told of nothing else, and may have less than was asked for."""
        return tokens // self._shape.tokens * self._shape.tokens

    def _came(self, request: Any) -> _Coming | None:
        name = request.request_id
        if not self._consumer or not self.concerns(request):
            return None
        if name not in self._coming:
            self._coming[name] = self._of(request, promised(request) if self._planners.by_ticket else None)
        return self._coming[name]

    def concerns(self, request: Any) -> bool:
        """Whether anything can be had for it, or of it."""
        known = request.kv_transfer_params is not None or request.request_id in self._coming
        return known or self._planners.by_content

    def _of(self, request: Any, found: Promised | None) -> _Coming | None:
        """Without a ticket, what may be found by its content: whole pages, for only these have a hash."""
        name, tokens = request.request_id, request.num_tokens - 1
        hashes = self._hashes(request, tokens)
        if found is None:
            tokens = len(hashes) * self._shape.tokens
            return _Coming(RequestView(name, tokens, hashes=hashes), tokens) if hashes else None
        tokens = min(found.tokens, tokens)
        view = RequestView(name, self._shape.whole(tokens), found.ticket, hashes, found.about)
        return _Coming(view, tokens)

    def _hashes(self, request: Any, tokens: int) -> tuple[bytes, ...]:
        """Of whole pages, if the backend asks for them; in vLLM's is the salt that separates tenants already."""
        if not self._planners.by_content or not self._shape.hashed:
            return ()
        return tuple(map(bytes, request.block_hashes[: tokens // self._shape.tokens]))

    def allocated(self, request: Any, blocks: Sequence[Sequence[int]], tokens: int) -> None:
        """See `update_state_after_alloc`: vLLM calls it a second time when the pages have come."""
        coming = self._came(request)
        if coming is None or coming.reserved:
            return
        coming.reserved, name = True, request.request_id
        have = coming.have
        lists = self._shape.lists(blocks, have + tokens)
        if tokens:
            self._parked[name] = _Parked(have, tokens, lists, time.monotonic())
        planner = self._planners.now
        more = self._shape.whole(have + tokens) - have if tokens else 0
        if planner is None or not self._told(coming, lists, have, more):
            self._planners.guard("give a request up", lambda planner: planner.cancel(name))
            self._lose(name)

    def _told(self, coming: _Coming, lists: list[list[int]], have: int, tokens: int) -> bool:
        """Whether the planner took it."""
        self._asked = True

        def reserve() -> bool:
            planner = self._planners.now
            if planner is None:
                return False
            planner.reserve(coming.view, lists, have, tokens)
            return True

        return self._troubles.guard("fetch a request", reserve, otherwise=False)

    def _lose(self, name: str) -> None:
        """Nothing is written to its pages, and it is computed."""
        parked = self._parked.pop(name, None)
        if parked is not None:
            self._received.add(name)
            self._failed.add(name)
            self._counts.add("kv_requests_total", direction="pull", peer="", cause="failed")

    # -- a request that ends

    def finished(self, request: Any, blocks: Sequence[Sequence[int]]) -> tuple[bool, dict[str, Any] | None]:
        """See `request_finished_all_groups`. What is still written to, vLLM keeps until it hears of it."""
        name = request.request_id
        coming = self._coming.pop(name, None)
        if name in self._parked:
            self._give_up(name)
            return False, None
        if coming is not None and not coming.reserved:  # it was aborted before it had pages
            self._told(coming, [[] for _ in self._shape.groups], 0, 0)
        if not self._producer or str(request.get_finished_reason()) not in _SAID:
            return False, None
        if wanted(request) and self._planners.by_ticket:
            return self._hand_over(request, blocks)
        return self._offer(request, blocks) if self._planners.by_content else (False, None)

    def _hand_over(self, request: Any, blocks: Sequence[Sequence[int]]) -> tuple[bool, dict[str, Any] | None]:
        tokens = min(request.num_prompt_tokens, request.num_computed_tokens - request.num_in_flight_tokens)
        what = about(request, tokens) if tokens > 0 else None
        if what is None or self._planners.now is None:
            return False, None
        lists = self._shape.lists(blocks, tokens)
        if not self._shape.suffice(lists, tokens):
            self._counts.add("kv_leases_refused_total")
            return False, None
        hashes = self._hashes(request, tokens)
        view = RequestView(request.request_id, self._shape.whole(tokens), None, hashes, what, hand_over=True)
        kept = self._keep(view, lists)
        return kept.keep, None if kept.ticket is None else told(kept.ticket, tokens)

    def _offer(self, request: Any, blocks: Sequence[Sequence[int]]) -> tuple[bool, dict[str, Any] | None]:
        """To whoever has the same content: all whole pages, of what was said, too."""
        hashes = self._hashes(request, request.num_computed_tokens - request.num_in_flight_tokens)
        if not hashes:
            return False, None
        tokens = len(hashes) * self._shape.tokens
        view = RequestView(request.request_id, tokens, None, hashes)
        return self._keep(view, self._shape.lists(blocks, tokens)).keep, None

    def _keep(self, view: RequestView, lists: list[list[int]]) -> Retention:
        """Let the planner keep these pages."""
        planner, count = self._planners.now, sum(map(len, lists))
        if planner is None:
            return _UNKEPT
        if self._too_many(count):
            self._counts.add("kv_leases_refused_total")
            return _UNKEPT
        self._asked = True
        kept = self._troubles.guard("keep a request", lambda: planner.finish(view, lists, view.tokens), _UNKEPT)
        if kept.keep:
            self._kept[view.id] = count
        return kept

    def _too_many(self, pages: int) -> bool:
        return sum(self._kept.values()) + pages > self._options.max_kept * self._shape.pages

    def _give_up(self, name: str) -> None:
        """Nobody wants it any more; its pages are vLLM's again when nothing is written to them."""
        parked = self._parked[name]
        if not parked.given_up:
            parked.given_up, parked.since, self._asked = True, time.monotonic(), True
            self._planners.guard("give a request up", lambda planner: planner.cancel(name))

    # -- each step

    def step(self) -> Step:
        """See `build_connector_meta`."""
        self._look_after()
        self._check_life()
        self._life = self._planners.turn()
        busy = self._busy()
        if busy or self._asked:
            self._asked = False
            decided = self._planners.decided()
            if decided is not None:
                self._received |= self._take(decided)
        self._check_life()
        if not (busy or self._plans or self._sent or self._received):
            if self._idle.life != self._life:
                self._idle = Step(self._life)
            return self._idle
        step = Step(self._life, tuple(self._plans), True, self._sent, self._received, self._failed, self._bad)
        self._plans, self._sent, self._received, self._failed, self._bad = [], set(), set(), set(), set()
        return step

    def heard(self, told: Mapping[int, Iterable[Said]]) -> set[str]:
        """See `update_connector_output`; requests that vLLM can be told of at once, for their pages are here."""
        decide = False
        for rank, several in told.items():
            for said in several:
                decide |= self._planners.heard(rank, said)
        decided = self._planners.decided() if decide else None
        received = self._take(decided) if decided is not None else set()
        self._check_life()
        return received

    def _take(self, decided: Decided) -> set[str]:
        """What a step has decided; requests that were received."""
        self._plans.append(decided.plan)
        for name in decided.released:
            if self._kept.pop(name, None) is not None:
                self._sent.add(name)
        for name, good in decided.failed.items():
            parked = self._parked.pop(name, None)
            if parked is not None:
                self._received.add(name)
                self._fail(name, parked, good)
        received = {name for name in decided.received if name in self._parked}
        for name in received:
            del self._parked[name]
        return received

    def _fail(self, name: str, parked: _Parked, good: int) -> None:
        """What is good of it stays: of one cache group vLLM can be told where what is bad begins."""
        begin = good // self._shape.tokens
        if len(parked.lists) > 1 or begin * self._shape.tokens <= parked.have or begin >= len(parked.lists[0]):
            self._failed.add(name)
        else:
            self._bad.update(parked.lists[0][begin:])

    def _check_life(self) -> None:
        """If the planner was given up, so is all that it had: workers end their movers before they report it."""
        if not self._life or self._planners.life:
            return
        for name in list(self._parked):
            self._lose(name)
        self._sent.update(self._kept)
        self._kept.clear()
        self._plans.clear()
        self._life = 0

    def _look_after(self) -> None:
        """A request that nobody says anything of is given up, and then the planner with it."""
        now = time.monotonic()
        for name, parked in list(self._parked.items()):
            if now - parked.since < self._options.parked_seconds:
                continue
            if parked.given_up:
                _log.error(
                    "Nothing was said of request %.200r, which was given up; its connector is opened anew.", name
                )
                self._planners.give_up()
                return
            _log.warning("Request %.200r is given up: its blocks have not come.", name)
            self._give_up(name)

    def _busy(self) -> bool:
        return bool(self._parked or self._kept) or self._planners.busy()

    def busy(self) -> bool:
        """See `has_pending_push_work`."""
        return self._busy() or bool(self._sent or self._received or self._asked)

    def reset(self) -> bool:
        """See `reset_cache`: what is kept is of other weights."""
        self._asked = True
        self._planners.guard("forget what it keeps", lambda planner: planner.reset())
        return True

    def statistics(self) -> Sequence[Sample]:
        """What the planner counts, and what was counted here."""
        return [*self._planners.statistics(), *self._counts.samples()]

    def close(self) -> None:
        """End."""
        self._planners.close()
