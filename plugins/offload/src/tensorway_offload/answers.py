"""What tiers have said of blocks: remembered for a while for all requests, and for one until it has ended.

May import the core's offload room and this package's guarded tiers. Of equal blocks a tier is asked once, however many
requests want to know.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Final

import attrs

from tensorway.offload import LookupResult, OffloadKey, ReqContext
from tensorway_offload.guarded import Guarded, Reply
from tensorway_offload.limits import BelowOptions

#: Answers that are remembered of one tier.
_MOST: Final = 65_536


class Known:
    """What one tier has said lately, and what it is being asked."""

    def __init__(self, tier: Guarded, seconds: float, clock: Callable[[], float]) -> None:
        self.tier, self._seconds, self._clock = tier, seconds, clock
        self._said: OrderedDict[OffloadKey, tuple[bool, float]] = OrderedDict()
        self._asked: set[OffloadKey] = set()
        self._life = 0

    def has(self, key: OffloadKey, now: float, since: float) -> bool | None:
        """Whether it has said so lately, or since somebody waits for it; None if it has said nothing."""
        found = self._said.get(key)
        if found is None or (now - found[1] > self._seconds and found[1] < since):
            return None
        return found[0]

    def had(self, key: OffloadKey) -> bool:
        """Whether it said so when it was last asked, however long ago."""
        return self._said.get(key, (False, 0.0))[0]

    def asking(self, key: OffloadKey) -> bool:
        """Whether it is being asked."""
        return key in self._asked

    def learn(self, key: OffloadKey, has: bool) -> None:
        """It has shown whether it has a block."""
        self._said[key] = has, self._clock()
        self._said.move_to_end(key)
        if len(self._said) > _MOST:
            self._said.popitem(last=False)

    def ask(self, keys: Sequence[OffloadKey]) -> None:
        """Ask it; whoever asks again hears its answer."""
        batch = self.tier.limits.batch_blocks
        for start in range(0, len(keys), batch):
            some = keys[start : start + batch]
            self._asked.update(some)
            self.tier.look(some, self._answered(some, self._life))

    def forget(self, which: Callable[[OffloadKey], bool]) -> None:
        """These are being deleted: it has them no more, whatever it said."""
        for key in [key for key in self._said if which(key)]:
            self._said[key] = False, self._clock()

    def reset(self) -> None:
        """Nothing was said, and what is being said is not heard."""
        self._said.clear()
        self._asked.clear()
        self._life += 1

    def _answered(self, keys: Sequence[OffloadKey], life: int) -> Callable[[Reply], None]:
        told = False

        def then(reply: Reply) -> None:
            nonlocal told
            if told or life != self._life:
                return
            told = True
            self._asked.difference_update(keys)
            # No answer is remembered as no for as long as an answer is: else a tier that hangs would be asked in
            # every step. Its breaker is what ends that.
            for key, has in zip(keys, reply.values if not reply.cause else [False] * len(keys), strict=True):
                self.learn(key, has)

        return then


@attrs.define
class _Memory:
    """What one request was told."""

    #: Since when it asks for blocks of which nothing is known.
    waits: dict[OffloadKey, float] = attrs.field(factory=dict)
    told: dict[OffloadKey, LookupResult] = attrs.field(factory=dict)


class Answers:
    """Which tier has a block, as far as requests were told."""

    def __init__(self, tiers: Sequence[Guarded], options: BelowOptions, clock: Callable[[], float]) -> None:
        self.known = [Known(tier, options.remember, clock) for tier in tiers]
        self._deadline, self._clock = options.lookup_deadline, clock
        self._requests: dict[str, _Memory] = {}

    def ask(self, keys: Sequence[OffloadKey], req: ReqContext) -> list[LookupResult]:
        """What the first tier that has not said no says of each."""
        memory = self._requests.get(req.request) or self._requests.setdefault(req.request, _Memory())
        told = memory.told
        if len(told) >= len(keys):  # as often as a request asks again
            found = [told.get(key) for key in keys]
            if None not in found:
                return [each for each in found if each is not None]
        now, wanted = self._clock(), self.allowed(req)
        questions: list[list[OffloadKey]] = [[] for _ in wanted]
        for key in dict.fromkeys(keys):
            if key not in told:
                self._resolve(key, memory, wanted, now, questions)
        for known, asked in zip(wanted, questions, strict=True):
            if asked:
                known.ask(asked)
        return [told.get(key, LookupResult.RETRY) for key in keys]

    def allowed(self, req: ReqContext) -> list[Known]:
        """Tiers that may be asked for it, in their order."""
        return [known for known in self.known if req.tiers is None or known.tier.name in req.tiers]

    def holders(self, key: OffloadKey, req: ReqContext) -> list[Known]:
        """Tiers that have said that they have it, in their order."""
        return [known for known in self.allowed(req) if known.had(key)]

    def failed(self, keys: Collection[OffloadKey], req: ReqContext) -> None:
        """What was promised to a request could not be read: it is not tried again for it."""
        memory = self._requests.get(req.request)
        if memory is not None:
            memory.told.update(dict.fromkeys(keys, LookupResult.MISS))

    def ended(self, req: ReqContext) -> None:
        """Forget what it was told."""
        self._requests.pop(req.request, None)

    def reset(self) -> None:
        """Forget everything."""
        self._requests.clear()
        for known in self.known:
            known.reset()

    def _resolve(
        self,
        key: OffloadKey,
        memory: _Memory,
        wanted: Sequence[Known],
        now: float,
        questions: Sequence[list[OffloadKey]],
    ) -> None:
        """Tell it what is certain, and note whom to ask for it.

        The first tier in order that has the block wins as soon as all before it have said no or are late: to read it
        from a slower tier, because a faster one answers later, would cost more than the wait.
        """
        since = memory.waits.setdefault(key, now)
        late = now - since >= self._deadline
        open_before = False
        for known, asked in zip(wanted, questions, strict=True):
            has = known.has(key, now, since)
            if has and not open_before:
                memory.told[key] = LookupResult.HIT
                return
            if has is not None or late:
                continue
            if not known.asking(key):
                if not known.tier.usable:
                    continue
                if not (known.tier.limits.asked_last and open_before):
                    asked.append(key)
            open_before = True
        if late or not open_before:
            memory.told[key] = LookupResult.MISS
