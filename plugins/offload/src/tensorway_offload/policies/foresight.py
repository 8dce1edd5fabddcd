"""The policy `foresight`"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tensorway.offload import OffloadKey, PolicyContext, ReqContext
from tensorway_offload.policies.hazards import Hazards, Table
from tensorway_offload.policies.runs import Runs

_SPENT = None


class Foresight:
    def __init__(self, context: PolicyContext) -> None:
        self._context = context
        self.reset()

    def reset(self) -> None:
        self._hazards = Hazards()
        self._runs = Runs(self._context.capacity)

    def used(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        places = self._runs.places
        self._runs.claim(places.there(keys), self._hazards.root, self._hazards.now)

    def wanted(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        pass

    def stored(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        self._runs.claim(keys, self._hazards.root, self._hazards.now)

    def ended(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        if not keys:
            return
        table = self._hazards.ended(keys)
        here = self._runs.places.there(keys)
        now = self._hazards.now
        if here and here[-1] == keys[-1] and len(keys) > 1 and self._hazards.cuts_last():
            self._runs.claim(here[-1:], _SPENT, now)
            here = here[:-1]
        self._runs.claim(here, table, now)

    def removed(self, keys: Sequence[OffloadKey]) -> None:
        self._runs.places.drop(keys)

    def _value(self, kind: Table | None, since: int) -> float:
        return -1.0 if kind is None else kind.value(self._hazards.now - since)

    def victims(self) -> Iterator[OffloadKey]:
        return self._runs.by_value(self._value)

    def evicted(self, keys: Sequence[OffloadKey]) -> None:
        self._runs.places.drop(keys)
