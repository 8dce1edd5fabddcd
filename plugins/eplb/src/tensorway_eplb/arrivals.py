"""The rows of one layer that have to come: from peers, from other peers when those fail, from a copy; verified.

May import the core and its own dist. It waits for nothing: it posts, and is told what became of it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import attrs

from tensorway.eplb import Fetch, Session, Staging
from tensorway.errors import StagingFull, TensorwayError
from tensorway.memory import Region
from tensorway_eplb.placement import Placement
from tensorway_eplb.plan import LayerPlan
from tensorway_eplb.rows import UNKNOWN, Digests, Rows


class CopySource(Protocol):
    """Experts outside of the group: a host copy, or the checkpoint."""

    def has(self, layer: int, expert: int) -> bool:
        """Whether it can be loaded."""
        ...

    def load(self, layer: int, expert: int, into: Mapping[str, Region]) -> None:
        """Fill the rows of all tensors of an expert; raises what it likes. Called from a thread of its own."""
        ...


@attrs.define
class Counts:
    """What a cycle did, for people and metrics."""

    fetched_rows: int = 0
    fetched_bytes: int = 0
    loaded_rows: int = 0
    resourced_rows: int = 0
    mismatched_rows: int = 0
    failed_fetches: int = 0


@attrs.frozen(eq=False)
class Supply:
    """What the arrivals of all layers of one cycle share."""

    session: Session
    staging: Staging
    rows: Rows
    old: Placement
    digests: Digests | None
    source: CopySource | None
    loader: ThreadPoolExecutor
    cycle: int
    #: Ranks from which nothing can be had.
    lost: Callable[[], frozenset[int]]
    #: What is left of the time for one fetch of so many bytes.
    seconds: Callable[[int], float]
    row_bytes: Callable[[int], int]
    counts: Counts


class Arrivals:
    """Of one layer. `missing` is empty when all rows are in staging and are what they should be."""

    def __init__(self, plan: LayerPlan, supply: Supply) -> None:
        self.plan = plan
        self.layer = plan.layer
        self._supply = supply
        self._lease = supply.staging.lease(plan.layer, plan.staging_rows)
        self._experts = plan.arrivals
        #: Which staging row each arrival comes into.
        self.rows = dict(enumerate(self._lease.rows[: len(self._experts)]))
        self.temporary = self._lease.rows[-1] if plan.temporary else None
        self.missing = set(self.rows)
        #: Why the layer cannot be had; empty while it can.
        self.failed = ""
        self._fetches: dict[Fetch, list[int]] = {}
        self._loads: dict[Future[None], int] = {}
        self._tried: dict[int, set[int]] = {arrival: set() for arrival in self.rows}
        self._attempts = 0

    def start(self) -> None:
        """Ask for everything, as the plan says."""
        lost, first = self._supply.lost(), 0
        for rows in self.plan.fetches:
            arrivals = list(range(first, first + len(rows.experts)))
            first += len(arrivals)
            if rows.peer in lost:
                self._find_elsewhere(arrivals, f"rank {rows.peer} is lost")
            else:
                self._fetch(rows.peer, arrivals, rows.slots)
        for arrival in range(first, len(self.rows)):
            self._load(arrival, "nobody holds it")

    def filled(self, fetch: Fetch) -> None:
        """The rows of a fetch are there; those that are not what they should be are asked for elsewhere."""
        arrivals = self._fetches.pop(fetch, [])
        wrong = [arrival for arrival in arrivals if not self._verified(arrival)]
        self.missing.difference_update(arrivals)
        self.missing.update(wrong)
        counts = self._supply.counts
        counts.fetched_rows += len(arrivals)
        counts.fetched_bytes += len(arrivals) * self._supply.row_bytes(self.layer)
        counts.mismatched_rows += len(wrong)
        if wrong:
            self._find_elsewhere(wrong, f"what rank {fetch.peer} has is not what was loaded")

    def fetch_failed(self, fetch: Fetch, why: str, released: bool) -> None:
        """A fetch failed; its rows are taken elsewhere, into other memory if a fabric may still write to theirs."""
        arrivals = self._fetches.pop(fetch, [])
        self._supply.counts.failed_fetches += 1
        if not released:
            self._lease.quarantine(fetch.rows)
        if self.failed:
            return
        if released or self._replace(arrivals):
            self._find_elsewhere(arrivals, why)

    def look(self) -> None:
        """Whether loads have ended."""
        for future in [future for future in self._loads if future.done()]:
            arrival = self._loads.pop(future)
            expert = self._experts[arrival]
            if (error := future.exception()) is not None:
                self._give_up(f"expert {expert} cannot be loaded: {_said(error)}")
            elif not self._verified(arrival):
                self._supply.counts.mismatched_rows += 1
                self._give_up(f"the copy of expert {expert} is not what was loaded")
            else:
                self._supply.counts.loaded_rows += 1
                self.missing.discard(arrival)

    def lose(self, peer: int) -> list[Fetch]:
        """Fetches of a peer that is lost, to be cancelled."""
        return [fetch for fetch in self._fetches if fetch.peer == peer]

    def write(self) -> None:
        """Make the live rows what the layer's new placement says."""
        writes = [(self.rows[arrival], slot) for arrival, slot in self.plan.writes]
        self._supply.rows.write(self.layer, self.plan.copies, writes, self.temporary)

    def release(self) -> list[Fetch]:
        """The layer is decided: give back its rows; returns fetches that are still under way, to be cancelled."""
        self.failed = self.failed or "the layer is decided"
        for future, arrival in self._loads.items():
            if not future.cancel():  # it may be writing: its row comes back when it has ended
                row = self.rows[arrival]
                self._lease.quarantine([row])
                future.add_done_callback(lambda _, row=row: self._supply.staging.drained([row]))  # type: ignore[misc]
        under_way = list(self._fetches)
        # What is under way holds its rows back until its fabric has let go.
        self._lease.quarantine(row for fetch in under_way for row in fetch.rows)
        self._lease.release()
        return under_way

    # -- inside

    def _fetch(self, peer: int, arrivals: list[int], slots: array[int]) -> None:
        self._attempts += 1
        rows = array("q", [self.rows[arrival] for arrival in arrivals])
        fetch = Fetch(self.layer, peer, slots, rows, self._supply.cycle, self._attempts)
        self._fetches[fetch] = arrivals
        for arrival in arrivals:
            self._tried[arrival].add(peer)
        nbytes = len(arrivals) * self._supply.row_bytes(self.layer)
        self._supply.session.post(fetch, self._supply.seconds(nbytes))

    def _find_elsewhere(self, arrivals: Iterable[int], why: str) -> None:
        """Another replica, else a copy, else the layer keeps its old weights."""
        by_peer: dict[int, list[tuple[int, int]]] = {}
        alone = self._supply.session.capabilities.initiator == "receiver"
        for arrival in arrivals:
            self._supply.counts.resourced_rows += 1
            found = self._holder(arrival) if alone else None
            if found is None:
                self._load(arrival, why)
            else:
                by_peer.setdefault(found[0], []).append((arrival, found[1]))
        for peer, rows in by_peer.items():
            self._fetch(peer, [arrival for arrival, _ in rows], array("q", [slot for _, slot in rows]))

    def _holder(self, arrival: int) -> tuple[int, int] | None:
        """Rank and slot of somebody who has the expert and was not asked yet."""
        old, expert = self._supply.old, self._experts[arrival]
        gone = self._supply.lost() | self._tried[arrival]
        for slot in (old.map[self.layer] == expert).nonzero()[0].tolist():
            rank, local = divmod(slot, old.slots)
            if rank not in gone:
                return rank, local
        return None

    def _load(self, arrival: int, why: str) -> None:
        source, expert = self._supply.source, self._experts[arrival]
        if source is None or not source.has(self.layer, expert):
            self._give_up(f"expert {expert} cannot be had: {why}, and there is no other copy")
            return
        into = self._supply.rows.regions(self.layer, self.rows[arrival])
        self._loads[self._supply.loader.submit(source.load, self.layer, expert, into)] = arrival

    def _replace(self, arrivals: list[int]) -> bool:
        """Other staging rows for these arrivals."""
        try:
            more = self._supply.staging.lease(self.layer, len(arrivals))
        except StagingFull as error:
            self._give_up(f"rows are in quarantine, and there are no others: {error.true}")
            return False
        self._lease.rows.extend(more.rows)
        self.rows.update(zip(arrivals, more.rows, strict=True))
        return True

    def _verified(self, arrival: int) -> bool:
        digests, expert = self._supply.digests, self._experts[arrival]
        if digests is None or digests[self.layer, expert] == UNKNOWN:
            return True
        return self._supply.rows.staged_digest(self.layer, self.rows[arrival]) == int(digests[self.layer, expert])

    def _give_up(self, why: str) -> None:
        self.failed = self.failed or why


def _said(error: BaseException) -> str:
    return error.true if isinstance(error, TensorwayError) else f"{type(error).__name__}: {error}"
