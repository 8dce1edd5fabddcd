"""What is known of blocks that a request asks for, and what is done so that it knows more the next time.

May import the core's offload room and this dist's index, requests and room. A lookup comes to an end: a block that is
on its way has a deadline for each request, what has failed for a request is a miss for it, and what has arrived is
leased to it, so that no promotion takes the place of another one of the same request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tensorway.offload import LookupResult, OffloadKey
from tensorway_offload.index import Index
from tensorway_offload.lower import Lower
from tensorway_offload.requests import GIVEN_UP, Request, Requests, unique

#: Reserves rows for as many of these blocks as can have them, and begins to promote them; which ones.
Promote = Callable[[Sequence[OffloadKey], Request], Sequence[OffloadKey]]

_MISS, _HIT = LookupResult.MISS, LookupResult.HIT
_PENDING, _RETRY = LookupResult.HIT_PENDING, LookupResult.RETRY


class Lookups:
    """Answers, leases, and who waits for which block."""

    def __init__(
        self, index: Index, requests: Requests, lower: Lower | None, promote: Promote, pending_seconds: float
    ) -> None:
        self._index, self._requests, self._lower, self._promote = index, requests, lower, promote
        self._pending = pending_seconds
        self._waiting: dict[OffloadKey, dict[int, Request]] = {}

    def ready(self, keys: Sequence[OffloadKey], request: Request, now: float) -> int | None:
        """How many of these, from the first on, are ready; they are leased. None if more may be had: `look`."""
        rows = self._index.find(keys)
        count = self._index.leading(rows)
        if count < len(keys) and (rows[count] is not None or self._may_ask(request)):
            return None
        self._requests.lease(request, keys[:count], rows[:count], now)  # type: ignore[arg-type]  # none is None
        request.patience = None
        return count

    def look(self, keys: Sequence[OffloadKey], request: Request, now: float, *, prefix: bool) -> list[LookupResult]:
        """What is known of each; of a prefix, up to the first miss. What is ready is leased."""
        rows = self._index.find(keys)
        said = self._ask(keys, rows, request, now, prefix)
        found: dict[OffloadKey, LookupResult] = {}
        for key, row in zip(keys, rows, strict=True):
            if key not in found:
                found[key] = self._known(key, row, said.get(key, _MISS), request, now)
                if prefix and found[key] is _MISS:
                    break
        self._lease(keys, rows, found, request, now)
        below = [key for key, result in found.items() if result is _PENDING and said.get(key) is _HIT]
        if below:
            coming = set(self._promote(below, request))
            found.update((key, _MISS) for key in below if key not in coming)
        results = [found.get(key, _MISS) for key in keys]
        if prefix:
            results = results[: results.index(_MISS)] if _MISS in results else results
        self._wait(zip(keys, results, strict=False), request)
        if _PENDING not in results and _RETRY not in results:
            request.patience = None
        return results

    def arrived(self, keys: Sequence[OffloadKey], rows: Sequence[int], now: float) -> None:
        """These can be read: whoever waits for them has them leased."""
        for request, some in self._woken(zip(keys, rows, strict=True)).items():
            due = [(key, row) for key, row in some if request.until.get(key, GIVEN_UP) > now]
            if due and not request.over:
                self._requests.lease(request, [key for key, _ in due], [row for _, row in due], now)

    def failed(self, keys: Sequence[OffloadKey], *, for_good: bool) -> None:
        """These do not come; `for_good` if whoever waits for them must not try again."""
        for request, some in self._woken((key, 0) for key in keys).items():
            if for_good:
                request.until.update((key, GIVEN_UP) for key, _ in some)

    def reset(self) -> None:
        """Nobody waits for anything."""
        self._waiting.clear()

    def _may_ask(self, request: Request) -> bool:
        tiers = request.req.tiers
        return self._lower is not None and (tiers is None or bool(tiers))

    def _ask(
        self, keys: Sequence[OffloadKey], rows: Sequence[int | None], request: Request, now: float, prefix: bool
    ) -> dict[OffloadKey, LookupResult]:
        """What lower tiers say of what is not here, as far as the request may still wait for it."""
        if self._lower is None or not self._may_ask(request):
            return {}
        absent = []
        for key, row in zip(keys, rows, strict=True):
            if row is not None:
                continue
            if request.until.get(key, now) >= now:
                absent.append(key)
            elif prefix:
                break
        absent = unique(absent)
        return dict(zip(absent, self._lower.ask(absent, request.req), strict=True)) if absent else {}

    def _known(
        self, key: OffloadKey, row: int | None, said: LookupResult, request: Request, now: float
    ) -> LookupResult:
        if row is not None and self._index.is_ready(row):
            return _HIT
        if row is None and said is _MISS:
            return _MISS
        if request.deadline(key, now, self._pending) <= now:
            return _MISS
        return _RETRY if said is _RETRY else _PENDING

    def _lease(
        self,
        keys: Sequence[OffloadKey],
        rows: Sequence[int | None],
        found: dict[OffloadKey, LookupResult],
        request: Request,
        now: float,
    ) -> None:
        here = {key: row for key, row in zip(keys, rows, strict=True) if row is not None and found.get(key) is _HIT}
        self._requests.lease(request, list(here), list(here.values()), now)

    def _wait(self, results: Iterable[tuple[OffloadKey, LookupResult]], request: Request) -> None:
        for key, result in results:
            if result is _PENDING:
                self._waiting.setdefault(key, {})[id(request)] = request

    def _woken(self, pairs: Iterable[tuple[OffloadKey, int]]) -> dict[Request, list[tuple[OffloadKey, int]]]:
        woken: dict[Request, list[tuple[OffloadKey, int]]] = {}
        if self._waiting:
            for key, row in pairs:
                for request in self._waiting.pop(key, {}).values():
                    woken.setdefault(request, []).append((key, row))
        return woken
