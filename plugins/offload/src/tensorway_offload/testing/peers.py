"""An engine among peers, for tests: rows with known content, a primary tier that lends them, and the tier `peer`.

May import the core, its `testing` and this dist. `Engine` is in this process; the functions below are called in
processes of `tensorway.testing.ranks`, which can be killed and stopped.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tensorway.offload import OffloadKey, Outcome, TierContext
from tensorway.rendezvous import Rendezvous
from tensorway.testing.ranks import Rank
from tensorway_offload.peer.options import PeerOptions
from tensorway_offload.peer.tier import PeerTier
from tensorway_offload.testing.rows import Rows, keys_of

FINGERPRINT = bytes(range(32))
NBYTES = 4096


@functools.cache
def churned(number: int) -> OffloadKey:
    """One of the blocks that come and go at a busy engine."""
    return keys_of(f"churned {number}", 1)[0]


class Shelf:
    """A primary tier as far as it lends: which key is in which row, and until when it must stay there."""

    def __init__(self, rows: Rows, count: int) -> None:
        self.rows, self.count = rows, count
        self.where: dict[OffloadKey, int] = {}
        self.pins: dict[OffloadKey, list[float]] = {}
        self.returns: Counter[str] = Counter()
        self.lock = threading.Lock()

    def put(self, keys: Sequence[OffloadKey], first: int = 0) -> None:
        """Keep these, in rows from this one on."""
        with self.lock:
            for row, key in enumerate(keys, first):
                self.rows.fill(key, row)
                self.where[key] = row

    def lend(self, keys: Sequence[OffloadKey], seconds: float) -> list[int | None]:
        """As a manager does."""
        until = time.monotonic() + seconds
        with self.lock:
            for key in keys:
                if key in self.where:
                    self.pins.setdefault(key, []).append(until)
            return [self.where.get(key) for key in keys]

    def returned(self, keys: Sequence[OffloadKey]) -> None:
        """As a manager does; counts what was never lent."""
        with self.lock:
            for key in keys:
                known = self.pins.get(key)
                self.returns["right" if known else "wrong"] += 1
                if known:
                    known.pop()

    def pinned(self, key: OffloadKey) -> bool:
        """Whether it must stay; call it with the lock held."""
        now = time.monotonic()
        left = [until for until in self.pins.get(key, ()) if until > now]
        self.pins[key] = left
        return bool(left)

    def churn(self, number: int) -> bool:
        """Put another block into the next row, if what is there may go; as a busy engine does."""
        with self.lock:
            row = number % self.count
            old = next((key for key, place in self.where.items() if place == row), None)
            if old is not None and self.pinned(old):
                return False
            new = churned(number % (3 * self.count))
            if old is not None:
                del self.where[old]
            self.where.pop(new, None)
            self.rows.fill(new, row)
            self.where[new] = row
            return True


class Engine:
    """One engine: its rows, its shelf, its tier."""

    def __init__(
        self,
        rendezvous: Rendezvous,
        name: str,
        fingerprint: bytes = FINGERPRINT,
        count: int = 64,
        options: Mapping[str, Any] | None = None,
        services: Mapping[str, Any] | None = None,
    ) -> None:
        self.rows = Rows(count, NBYTES)
        self.shelf = Shelf(self.rows, count)
        given = {"rendezvous": rendezvous, "transport": "local", **(services or {})}
        context = TierContext(
            name,
            fingerprint,
            (NBYTES,),
            memory=self.rows.region,
            row_bytes=NBYTES,
            lender=self.shelf,
            services=given,
        )
        self.tier = PeerTier(PeerOptions(**(options or {})), context)

    def get(
        self, keys: Sequence[OffloadKey], deadline: float = 10.0, first: int = 32
    ) -> tuple[list[Outcome], list[bool]]:
        """Read these into rows from this one on; the outcomes, and which rows hold what their block does."""
        items = [(key, self.rows.row(key, row)) for row, key in enumerate(keys, first)]
        outcomes = self.tier.get(items, deadline)
        return outcomes, [self.rows.right(key, row) for row, key in enumerate(keys, first)]


# -- what processes are told


def open_engine(
    rank: Rank,
    name: str,
    kept: Sequence[OffloadKey],
    fingerprint: bytes = FINGERPRINT,
    transport: str = "local",
    **options: Any,
) -> None:
    """Be an engine that keeps these."""
    engine = Engine(rank.rendezvous(), name, fingerprint, options=options, services={"transport": transport})
    engine.shelf.put(kept)
    rank.notes["engine"] = engine


def begin_churn(rank: Rank) -> None:
    """Evict and store without end, on a thread."""
    shelf = rank.notes["engine"].shelf

    def churn() -> None:
        for number in itertools.count():
            shelf.churn(number)
            time.sleep(0.0005)

    threading.Thread(target=churn, daemon=True).start()


def close_engine(rank: Rank) -> tuple[int, int]:
    """End it; how many rows were given back, and how many that nobody had lent."""
    engine = rank.notes.pop("engine")
    engine.tier.close()
    return engine.shelf.returns["right"], engine.shelf.returns["wrong"]


def returns(rank: Rank) -> tuple[int, int]:
    """How many rows were given back, and how many that nobody had lent."""
    counted = rank.notes["engine"].shelf.returns
    return counted["right"], counted["wrong"]
