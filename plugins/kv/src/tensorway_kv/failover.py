"""Where a request's blocks are fetched next when a source fails: peer, other peer, tier, and at last its own computing.

May import attrs only. No thread, no socket, no clock: `now` is an argument, and chance is injected. A `Chain` is one
request's and decides by what that request saw. `Peers` knows what is true of a peer for all requests: that it could not
be reached, and when to try again; nothing that goes wrong with one request's blocks is told to it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Final, Literal

import attrs

#: `peer` and `tier` may fail; `compute` is the engine itself, which needs no try and no deadline.
Kind = Literal["peer", "tier", "compute"]
#: Why a try ended. `handshake`: the peer could not be reached; `failed`, `deadline`: the transfer did not work, and
#: might another time; `lost`: this life of the peer is over; the others: this source has not what the request needs,
#: however often it is asked, and `short` that it had the beginning only.
Cause = Literal[
    "handshake", "failed", "deadline", "lost", "expired", "stale", "refused", "missing", "incompatible", "short"
]
#: After these the same source may be tried again.
_AGAIN: Final[frozenset[Cause]] = frozenset({"handshake", "failed", "deadline"})

_FOREVER: Final = float("inf")


@attrs.frozen
class Source:
    """Something that has a request's blocks, or can make them."""

    name: str
    kind: Kind
    #: Which life of a peer: another one is tried anew.
    incarnation: str = ""
    #: How often one life of it is tried for one request.
    tries: int = 2
    #: Seconds that one try may take.
    deadline: float = 10.0
    #: Seconds that a request rather waits for it than go to the next.
    patience: float = 1.0
    #: The peer whose troubles it shares with other requests' sources; nothing for one that has its own name.
    peer: str = ""

    @property
    def host(self) -> str:
        """Who is behind it, as `Peers` knows it."""
        return self.peer or self.name


@attrs.frozen
class Attempt:
    """What to do now: fetch these tokens from there."""

    #: Counts the request's attempts; what is said about another than the last one changes nothing.
    number: int
    source: Source
    #: Tokens `first` to `end`, without `end`; those before are good already.
    first: int
    end: int
    #: Not before this moment, and given up at that one.
    begin: float
    deadline: float


@attrs.define
class _Trouble:
    failures: int = 0
    failed_at: float = -_FOREVER
    ready_at: float = -_FOREVER


class Peers:
    """When peers that could not be reached may be tried again, for all requests together. One thread uses it."""

    def __init__(self, base: float = 0.1, longest: float = 60.0, chance: Callable[[], float] = random.random) -> None:
        """A pause is a chance of `base`, doubled with each failure, up to `longest`; `chance` is from 0 to 1."""
        self._base, self._longest, self._chance = base, longest, chance
        #: By a peer's name and life, so that a new life has no past.
        self._troubles: dict[tuple[str, str], _Trouble] = {}

    def __len__(self) -> int:
        return len(self._troubles)

    def pause(self, failures: int) -> float:
        """Seconds after so many failures: all of it is chance, so that who failed together comes back apart."""
        return min(self._longest, self._base * 2.0 ** min(max(failures, 1) - 1, 64)) * self._chance()

    def ready_at(self, name: str, incarnation: str) -> float:
        """When this life of the peer may be tried; long ago for one of which nothing bad is known."""
        trouble = self._troubles.get((name, incarnation))
        return trouble.ready_at if trouble is not None else -_FOREVER

    def failed(self, name: str, incarnation: str, begun: float, now: float) -> None:
        """An attempt that began then could not reach it; requests that failed together are one failure."""
        for key in [key for key, old in self._troubles.items() if now - old.ready_at > self._longest]:
            del self._troubles[key]
        trouble = self._troubles.setdefault((name, incarnation), _Trouble())
        if begun >= trouble.failed_at:
            trouble.failures += 1
            trouble.failed_at, trouble.ready_at = now, now + self.pause(trouble.failures)

    def reached(self, name: str, incarnation: str) -> None:
        """It answered: what was before does not count."""
        self._troubles.pop((name, incarnation), None)


class Chain:
    """What one request tries, in the order of its sources: each so often and so long as it may."""

    def __init__(
        self, sources: Sequence[Source], tokens: int, peers: Peers, now: float, *, have: int = 0, deadline: float = 30.0
    ) -> None:
        """`tokens` are wanted, of which the first `have` are good; after `deadline` seconds only `compute` is left."""
        self._sources = tuple(sources)
        self._tokens, self._peers, self._ends = tokens, peers, now + deadline
        self._tries: dict[tuple[str, str], int] = {}
        self._ready: dict[tuple[str, str], float] = {}
        self._useless: set[tuple[str, str]] = set()
        #: Tokens from the first on that are good, whoever they came from. Fewer than before only after `rewind`.
        self.good = have
        #: What failed so far, and how: a source's name, its life, the cause.
        self.failures: list[tuple[str, str, Cause]] = []
        #: What is to be done now; None when everything is here, or nothing is left to try.
        self.attempt: Attempt | None = None
        self._count = 0
        self._choose(now)

    @property
    def finished(self) -> bool:
        """Whether all tokens are good."""
        return self.good >= self._tokens

    def overdue(self, now: float) -> bool:
        """Whether the attempt has had its time; `next` with `deadline` then."""
        return self.attempt is not None and now >= self.attempt.deadline

    def next(self, attempt: Attempt, cause: Cause, good: int, now: float) -> Attempt | None:
        """The attempt has failed, with so many tokens good from the first on: what to do instead."""
        if attempt is not self.attempt:
            return self.attempt
        source = attempt.source
        key = (source.name, source.incarnation)
        self.good = max(self.good, min(good, attempt.end))
        self.failures.append((*key, cause))
        if cause not in _AGAIN:
            self._useless.add(key)
        elif cause == "handshake" and source.kind == "peer":
            self._peers.failed(source.host, source.incarnation, attempt.begin, now)
        else:
            # What went wrong with this request's blocks holds nobody else back.
            self._ready[key] = now + self._peers.pause(self._tries[key])
        return self._choose(now)

    def done(self, attempt: Attempt, good: int, now: float) -> Attempt | None:
        """The attempt has ended well; None if that was all, else where the rest is to come from."""
        return self.next(attempt, "short", good, now) if good < attempt.end else self._complete(attempt)

    def rewind(self, good: int) -> None:
        """What is behind these tokens is going to be written anew, and is not good until that has ended well."""
        self.good = min(self.good, good)

    def renewed(self, name: str, incarnation: str) -> None:
        """A source has another life, which may be tried as if it were new. The attempt that is under way goes on."""
        self._sources = tuple(
            attrs.evolve(source, incarnation=incarnation) if source.name == name else source for source in self._sources
        )

    def _complete(self, attempt: Attempt) -> Attempt | None:
        if attempt is self.attempt:
            self.good, self.attempt = attempt.end, None
        return self.attempt

    def _choose(self, now: float) -> Attempt | None:
        self.attempt = None
        ready = [(begin, source) for source in self._sources if (begin := self._begin(source, now)) < _FOREVER]
        if self.finished or not ready:
            return None
        # The first that need not be waited for too long; if all must be, the one that is there soonest.
        soon = (pair for pair in ready if pair[0] - now <= pair[1].patience)
        begin, source = next(soon, None) or min(ready, key=itemgetter(0))
        key = (source.name, source.incarnation)
        self._tries[key] = self._tries.get(key, 0) + 1
        deadline = _FOREVER if source.kind == "compute" else min(begin + source.deadline, self._ends)
        self._count += 1
        self.attempt = Attempt(self._count, source, self.good, self._tokens, begin, deadline)
        return self.attempt

    def _begin(self, source: Source, now: float) -> float:
        """When it may be tried; never for one that had its tries, or whose time is over."""
        key = (source.name, source.incarnation)
        if key in self._useless or self._tries.get(key, 0) >= source.tries:
            return _FOREVER
        if source.kind == "compute":
            return now
        begin = max(now, self._ready.get(key, now))
        if source.kind == "peer":
            begin = max(begin, self._peers.ready_at(source.host, source.incarnation))
        return begin if begin < self._ends else _FOREVER
