"""Writing rows to the tiers below: to each that takes them, as much as its quota and its pressure let through.

May import the core's offload room and this package's guarded tiers, answers and quotas. Deletions are here, too,
because nothing that is being written may come after the deletion that was to remove it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

import attrs

from tensorway.offload import OffloadingEvent, OffloadKey, OfTenant, Outcome, key_tenant
from tensorway_offload.answers import Known
from tensorway_offload.guarded import Item, Reply
from tensorway_offload.quota import Quota

#: How often a deletion is tried, and what nobody could delete is told.
_TRIES: Final = 5
#: Outcomes, the best first: what is told of a block that several tiers were to write.
_RANKS: Final[tuple[Outcome, ...]] = ("done", "full", "late", "failed", "corrupt", "missing")


@attrs.define(eq=False)
class Cascade:
    """Rows that are being written, to one tier or to several."""

    job: int
    outcomes: dict[OffloadKey, Outcome] = attrs.field(factory=dict)
    #: Calls that may still read its rows.
    calls: int = 0

    def note(self, key: OffloadKey, outcome: Outcome) -> None:
        """What one tier did with a block."""
        known = self.outcomes.get(key)
        if known is None or _RANKS.index(outcome) < _RANKS.index(known):
            self.outcomes[key] = outcome


@attrs.define(eq=False)
class _Deletion:
    which: Sequence[OffloadKey] | OfTenant
    keys: frozenset[OffloadKey]
    tries: int = 0
    not_before: float = 0.0
    running: bool = False

    def has(self, key: OffloadKey) -> bool:
        """Whether it removes this block."""
        return key_tenant(key) == self.which.tenant if isinstance(self.which, OfTenant) else key in self.keys


class Outlet:
    """All that goes to one tier."""

    def __init__(self, known: Known, tell: Callable[[OffloadingEvent], None], clock: Callable[[], float]) -> None:
        self.known, self.tier, self._tell, self._clock = known, known.tier, tell, clock
        self._quota = Quota(self.tier.limits.tenant_bytes)
        self._writing: set[OffloadKey] = set()
        self._deletions: list[_Deletion] = []

    def offer(self, items: Sequence[Item], done: Callable[[], Cascade]) -> None:
        """Write what may be written of these; what may not is counted. `done` is asked for the cascade if any is."""
        if not self.tier.capabilities.writable:
            return
        items = [item for item in items if item[0] not in self._writing]
        if not self.tier.usable:
            self.tier.drop(["open"] * len(items))
            return
        taken = list(self._admitted(items))
        batch = self.tier.limits.batch_blocks
        for start in range(0, len(taken), batch):
            some, cascade = taken[start : start + batch], done()
            cascade.calls += 1
            self._writing.update(key for key, _ in some)
            self._quota.wrote((key, view.nbytes) for key, view in some)
            self.tier.store(some, partial(self._stored, some, cascade))

    def delete(self, which: Sequence[OffloadKey] | OfTenant) -> None:
        """Remove these, once nothing is under way that would bring them back."""
        if not self.tier.capabilities.deletes or not self.tier.capabilities.writable:
            return
        keys = frozenset() if isinstance(which, OfTenant) else frozenset(which)
        deletion = _Deletion(which, keys)
        self._deletions.append(deletion)
        self.known.forget(deletion.has)

    def poll(self, now: float) -> None:
        """Go on with deletions."""
        self._quota.heard(self.tier.said())
        for deletion in self._deletions:
            if deletion.running or now < deletion.not_before or not self.tier.usable:
                continue
            if any(deletion.has(key) for key in self._writing):
                continue
            deletion.running, deletion.tries = True, deletion.tries + 1
            self.tier.delete(deletion.which, partial(self._deleted, deletion))

    def busy(self) -> bool:
        """Whether something can be deleted now. What waits for a tier that is left alone keeps no engine awake."""
        return any(deletion.running for deletion in self._deletions) or bool(self._deletions and self.tier.usable)

    def _admitted(self, items: Sequence[Item]) -> Iterator[Item]:
        """Those that nothing speaks against; the others are counted, each with its cause."""
        sizes = [(key, view.nbytes) for key, view in items]
        causes = ["" if fits else "quota" for fits in self._quota.admit(sizes)]
        for place, (key, _) in enumerate(items):
            if any(deletion.has(key) for deletion in self._deletions):
                causes[place] = "refused"
        open_to = [place for place, cause in enumerate(causes) if not cause]
        count, why = self.tier.pressure.admit([sizes[place][1] for place in open_to], self._clock())
        for place in open_to[count:]:
            causes[place] = why
        self.tier.drop([cause for cause in causes if cause])
        return (item for item, cause in zip(items, causes, strict=True) if not cause)

    def _stored(self, items: Sequence[Item], cascade: Cascade, reply: Reply) -> None:
        if not reply.free:
            return
        done = []
        for (key, view), outcome in zip(items, reply.outcomes(len(items)), strict=True):
            cascade.note(key, outcome)
            self._writing.discard(key)
            if outcome == "done":
                done.append(key)
                self.known.learn(key, True)
            else:
                self._quota.withdrew([(key, view.nbytes)])
        if done:
            self._tell(OffloadingEvent("stored", done, self.tier.name))
        cascade.calls -= 1

    def _deleted(self, deletion: _Deletion, reply: Reply) -> None:
        if not reply.free:
            return
        deletion.running = False
        if reply.cause and deletion.tries < _TRIES:
            deletion.not_before = self._clock() + 0.1 * 2**deletion.tries
            return
        self._deletions.remove(deletion)
        if reply.cause:
            return  # counted with the call
        if isinstance(deletion.which, OfTenant):
            self._quota.deleted(deletion.which)
        elif deletion.which:
            self._tell(OffloadingEvent("removed", list(deletion.which), self.tier.name, "deleted"))
        self.tier.counters.add("offload_removed_total", reply.values[0], medium=self.tier.name, cause="deleted")
        self.known.forget(deletion.has)
