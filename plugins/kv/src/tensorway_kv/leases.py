"""A producer's promises to keep blocks: for which request, until when, who has had them, and what a late reader sees.

May import attrs only. No socket, no thread, no memory and no clock: `now` is an argument, so that a test can try all
orders of grants, renewals, acknowledgements, expiries and forced ends.

A lease is known by its epoch, a number that never comes again. An acknowledgement names its epoch and who gives it, so
that the same one twice counts once, and one for another lease counts for nothing. A lease ends when all readers of one
consumer have acknowledged to all ranks of the producer: two consumers that had a half each are not one that had all.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, get_args

import attrs

#: Block ids of one request: for each cache group, in the order of its tokens.
Blocks = tuple[tuple[int, ...], ...]
#: Who will acknowledge to each rank of the producer: exactly these ranks of a consumer; or so many of them; or, for 0,
#: as many as the acknowledgements to that rank say.
Readers = Mapping[int, int | Collection[int]]
#: How a lease ended.
Ending = Literal["acknowledged", "expired", "forced"]
#: Why a renewal or an acknowledgement counts for nothing. `unknown`: no lease of that request; `epoch`: the request has
#: another one; `ended`: that lease was acknowledged, or ended by force; `expired`: its time was over; `foreign`: it
#: comes from nobody who is expected.
Refused = Literal["unknown", "epoch", "ended", "expired", "foreign"]
#: What became of an acknowledgement: `again` changed nothing, `released` was the last one.
Verdict = Literal["counted", "again", "released"] | Refused

#: Seconds after its grant at which a lease ends, whoever renews it.
LONGEST: Final = 3600.0
#: What a renewal gives, of the time that was granted first.
RENEWAL: Final = 2 / 3
#: Consumers that may acknowledge one lease: the first, and those that took its request over.
MAX_CONSUMERS: Final = 16
#: Ended leases that are remembered, to say what a late acknowledgement was late for.
_REMEMBERED: Final = 4096
#: An epoch fits into what any reader of JSON takes for a number, for longer than any engine lives.
_FIRST_BITS: Final = 44
_FIRST_STEP: Final = 256


@attrs.frozen
class Consumer:
    """Who reads: one life of an engine, and a rank of it."""

    incarnation: str
    rank: int


@attrs.define
class _Tally:
    """What one consumer has acknowledged, by rank of the producer."""

    needs: dict[int, int | frozenset[int]]
    had: dict[int, set[int]]

    @classmethod
    def of(cls, needs: Mapping[int, int | frozenset[int]]) -> _Tally:
        return cls(dict(needs), {rank: set() for rank in needs})

    def takes(self, rank: int, reader: int, readers: int) -> bool:
        """Whether this reader is one of those that are expected at this rank."""
        need = self.needs.get(rank)
        if need is None:
            return False
        if isinstance(need, frozenset):
            return reader in need
        # What the first acknowledgement to this rank said holds for those that follow it.
        need = self.needs[rank] = need or readers
        return reader in self.had[rank] or len(self.had[rank]) < need

    @property
    def complete(self) -> bool:
        """Whether nobody is missing."""
        return all(need != 0 and len(self.had[rank]) >= _count(need) for rank, need in self.needs.items())

    def missing(self) -> dict[int, list[int] | int]:
        """By rank of the producer, the readers that are missing, or how many; -1 where nobody has said how many."""
        out: dict[int, list[int] | int] = {}
        for rank, need in self.needs.items():
            if isinstance(need, frozenset):
                if left := sorted(need - self.had[rank]):
                    out[rank] = left
            elif need == 0 or len(self.had[rank]) < need:
                out[rank] = need - len(self.had[rank]) if need else -1
        return out


@attrs.define(eq=False)
class Lease:
    """A promise to keep the blocks of a request; only its table changes it."""

    request: str
    epoch: int
    #: The life of the engine that promised.
    owner: str
    blocks: Blocks
    granted: float
    ttl: float
    deadline: float
    #: Nothing while it lasts.
    ended: Ending | None = None
    #: By which epoch it is known, too, if it was promised before its blocks were there; 0 if not.
    promised: int = 0
    _needs: dict[int, int | frozenset[int]] = attrs.field(factory=dict, repr=False)
    _tallies: dict[str, _Tally] = attrs.field(factory=dict, repr=False)

    def tally(self, incarnation: str) -> _Tally | None:
        """What this consumer has acknowledged; None for one consumer too many."""
        found = self._tallies.get(incarnation)
        if found is None and len(self._tallies) < MAX_CONSUMERS:
            found = self._tallies[incarnation] = _Tally.of(self._needs)
        return found

    @property
    def names(self) -> tuple[int, ...]:
        """The epochs by which its consumers may know it."""
        return (self.epoch, self.promised) if self.promised else (self.epoch,)

    def row(self, now: float) -> dict[str, Any]:
        """For people, and for JSON."""
        return {
            "request": self.request,
            "owner": self.owner,
            "epoch": self.epoch,
            "blocks": sum(map(len, self.blocks)),
            "age": round(now - self.granted, 3),
            "left": round(self.deadline - now, 3),
            "acknowledged": {
                incarnation: {str(rank): sorted(had) for rank, had in tally.had.items() if had}
                for incarnation, tally in self._tallies.items()
            },
            "missing": {
                incarnation: {str(rank): who for rank, who in tally.missing().items()}
                for incarnation, tally in (self._tallies or {"": _Tally.of(self._needs)}).items()
            },
        }


class LeaseTable:
    """All leases of one engine. One thread uses it."""

    def __init__(self, longest: float = LONGEST, first: int | None = None) -> None:
        """`first`: the first epoch; by default one that other lives of this engine have hardly used."""
        self._longest = longest
        self._next = first if first is not None else (secrets.randbits(_FIRST_BITS) + 1) * _FIRST_STEP
        self._live: dict[str, Lease] = {}
        self._released: list[Lease] = []
        self._ended: dict[tuple[str, int], Ending] = {}
        #: Whether nothing more is granted.
        self.draining = False
        #: Renewals and acknowledgements that counted for nothing, by cause.
        self.refused: dict[Refused, int] = dict.fromkeys(get_args(Refused), 0)
        #: Leases that ended, by how.
        self.endings: dict[Ending, int] = dict.fromkeys(get_args(Ending), 0)

    def __len__(self) -> int:
        return len(self._live)

    def grant(
        self, request: str, owner: str, blocks: Iterable[Iterable[int]], readers: Readers, ttl: float, now: float
    ) -> Lease | None:
        """Promise to keep the blocks; None while draining, or if this request has a lease: then keep nothing."""
        # A lease that ended and was not yet asked for in `released` still is one: the engine is told of requests, and
        # would take the end of the first for that of the second.
        if self.draining or request in self._live or any(request == lease.request for lease in self._released):
            return None
        needs = {rank: need if isinstance(need, int) else frozenset(need) for rank, need in readers.items()}
        if all(need == frozenset() for need in needs.values()) or not 0 < ttl < float("inf"):
            raise ValueError(f"a lease of {ttl} s for readers {readers} would not end as it should")
        epoch, self._next = self._next, self._next + 1
        kept = tuple(tuple(group) for group in blocks)
        deadline = now + min(ttl, self._longest)
        lease = self._live[request] = Lease(request, epoch, owner, kept, now, ttl, deadline, needs=needs)
        return lease

    def fill(self, request: str, blocks: Iterable[Iterable[int]]) -> Lease | None:
        """The blocks of a promise are there; None if it has ended.

        They are held under an epoch of now: leases that were granted since the promise may have had the same blocks.
        """
        lease = self._live.get(request)
        if lease is not None:
            lease.promised, lease.epoch, self._next = lease.epoch, self._next, self._next + 1
            lease.blocks = tuple(tuple(group) for group in blocks)
        return lease

    def renew(self, request: str, epoch: int, consumer: Consumer, now: float) -> float | None:
        """A consumer still wants the blocks: when the lease ends now; None if it has ended."""
        lease = self.find(request, epoch, now)
        if not isinstance(lease, Lease):
            self.refused[lease] += 1
            return None
        if lease.tally(consumer.incarnation) is None:
            self.refused["foreign"] += 1
            return None
        wanted = max(lease.deadline, now + RENEWAL * lease.ttl)
        # A consumer that hangs renews for ever, too.
        lease.deadline = min(wanted, lease.granted + self._longest)
        return lease.deadline

    def acknowledge(
        self, request: str, epoch: int, rank: int, consumer: Consumer, now: float, readers: int = 0
    ) -> Verdict:
        """A reader needs nothing more of a rank of ours; `readers`: how many of its engine read from that rank."""
        lease = self.find(request, epoch, now)
        if not isinstance(lease, Lease):
            self.refused[lease] += 1
            return lease
        tally = lease.tally(consumer.incarnation)
        if tally is None or not tally.takes(rank, consumer.rank, readers):
            self.refused["foreign"] += 1
            return "foreign"
        if consumer.rank in tally.had[rank]:
            return "again"
        tally.had[rank].add(consumer.rank)
        if not tally.complete:
            return "counted"
        self._end(lease, "acknowledged")
        return "released"

    def expire(self, now: float) -> None:
        """End the leases whose time is over."""
        for lease in [lease for lease in self._live.values() if lease.deadline <= now]:
            self._end(lease, "expired")

    def force(self, request: str) -> bool:
        """End a lease because an operator says so; whether there was one."""
        lease = self._live.get(request)
        if lease is not None:
            self._end(lease, "forced")
        return lease is not None

    def drain(self) -> None:
        """Grant nothing more; what is there may finish."""
        self.draining = True

    def released(self) -> Sequence[Lease]:
        """The leases that ended since the last call, in their order: each is here once."""
        out, self._released = self._released, []
        return out

    def list(self, now: float) -> Sequence[Mapping[str, Any]]:
        """What is held, the oldest first."""
        return [lease.row(now) for lease in self._live.values()]

    def find(self, request: str, epoch: int, now: float) -> Lease | Refused:
        """The lease, or why there is none."""
        lease = self._live.get(request)
        if lease is not None and epoch in lease.names:
            # Nobody has called `expire` yet, and the time is over all the same.
            return lease if now < lease.deadline else "expired"
        ending = self._ended.get((request, epoch))
        if ending is not None:
            return "expired" if ending == "expired" else "ended"
        return "unknown" if lease is None else "epoch"

    def _end(self, lease: Lease, ending: Ending) -> None:
        del self._live[lease.request]
        lease.ended = ending
        self.endings[ending] += 1
        self._released.append(lease)
        for name in lease.names:
            self._ended[lease.request, name] = ending
        while len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]


def _count(need: int | frozenset[int]) -> int:
    return need if isinstance(need, int) else len(need)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What `LeaseTable.list` says, as lines for people."""
    lines = [("REQUEST", "EPOCH", "BLOCKS", "AGE", "LEFT", "MISSING")]
    for row in rows:
        missing = "; ".join(
            f"{incarnation or 'any consumer'}: "
            + ", ".join(f"{_named(who)} at rank {rank}" for rank, who in of.items())
            for incarnation, of in row["missing"].items()
        )
        numbers = (str(row["epoch"]), str(row["blocks"]), f"{row['age']:.1f}", f"{row['left']:.1f}")
        lines.append((row["request"], *numbers, missing))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _named(missing: Sequence[int] | int) -> str:
    if isinstance(missing, int):
        return "unknown" if missing < 0 else f"{missing} ranks"
    return f"ranks {' '.join(map(str, missing))}"


# -- generations: what a reader finds beside the blocks


#: The word of a block that no lease holds.
FREE: Final = 0


@attrs.frozen
class Marks:
    """What is to be written beside blocks, in the memory of every rank that has them."""

    word: int
    blocks: Blocks

    def __bool__(self) -> bool:
        return any(self.blocks)


class Generations:
    """Which word stands beside each block, so that a reader whose data has arrived learns whether it was in time.

    The word is the epoch of the lease with which the block began to be held, and `FREE` when no lease holds it any
    more. Two leases may share a block (a common prefix); its word then stays, because its content does. Epochs grow,
    so `good` needs no more than the epoch of the reader's own lease.

    A `Marks` of `hold` is written before anybody learns of the lease, and one of `let_go` before the engine may use
    the blocks anew.
    """

    def __init__(self) -> None:
        self._last = FREE
        self._leases: dict[int, Blocks] = {}
        self._holders: dict[tuple[int, int], int] = {}

    def hold(self, epoch: int, blocks: Iterable[Iterable[int]]) -> Marks:
        """What to write for a new lease: beside those of its blocks that no other holds."""
        if epoch <= self._last:
            raise ValueError(f"epoch {epoch} after {self._last}: a late reader could not be told from one in time")
        self._last = epoch
        # A block that is named twice is held once.
        held = self._leases[epoch] = tuple(tuple(dict.fromkeys(group)) for group in blocks)
        fresh = tuple(
            tuple(block for block in ids if (group, block) not in self._holders) for group, ids in enumerate(held)
        )
        for group, ids in enumerate(held):
            for block in ids:
                self._holders[group, block] = self._holders.get((group, block), 0) + 1
        return Marks(epoch, fresh)

    def let_go(self, epoch: int) -> Marks:
        """What to write when the lease has ended: beside those of its blocks that nobody holds now."""
        held = self._leases.pop(epoch, ())
        free: list[tuple[int, ...]] = []
        for group, ids in enumerate(held):
            last = [block for block in ids if self._holders[group, block] == 1]
            for block in ids:
                self._holders[group, block] -= 1
            for block in last:
                del self._holders[group, block]
            free.append(tuple(last))
        return Marks(FREE, tuple(free))


def good(words: Iterable[int], epoch: int) -> int:
    """How many blocks, from the first on, still held what was promised under this epoch when their words were read."""
    count = 0
    for word in words:
        # Held since this lease or an earlier one, and without a gap: a new holding would have a later epoch.
        if not FREE < word <= epoch:
            break
        count += 1
    return count
