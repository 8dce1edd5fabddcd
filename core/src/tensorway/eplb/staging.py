"""Where rows arrive before they are weights: buffers whose rows have states, so that none is used twice at once.

Room `eplb`; may import the rooms below. Live weights are never written by a communicator. A row is free, leased to a
layer, or in quarantine: given up, and perhaps still written to by a fabric that has not let go.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import attrs

from tensorway import memory
from tensorway.errors import MemoryInvalid, StagingFull
from tensorway.memory import Region
from tensorway.transport.blocks import BlockTable

#: Name, row length, device.
Kind = tuple[str, int, str]


@attrs.define(eq=False)
class StagingLease:
    """Rows that belong to one layer until they are released."""

    layer: int
    rows: list[int]
    pool: Staging = attrs.field(repr=False)

    def quarantine(self, rows: Iterable[int]) -> None:
        """These rows may still be written to: they leave the lease, and are free when they are `drained`."""
        self.pool._quarantine(self, set(rows))

    def release(self) -> None:
        """Give back what the lease has; again does nothing."""
        self.pool._release(self)


class Staging:
    """The same number of rows for each kind of row of a layout; row `i` of every kind is one expert's."""

    def __init__(self, buffers: dict[Kind, Region], rows: int) -> None:
        """Over memory of the engine: for each kind of `ExpertLayout.kinds`, `rows` dense rows."""
        for (name, row_bytes, _), region in buffers.items():
            if rows < 1 or region.nbytes < rows * row_bytes:
                raise MemoryInvalid(
                    f"Staging for {rows} rows of {name} was to be made of {region.nbytes:,} bytes.",
                    f"A row has {row_bytes:,} bytes, and there is at least one.",
                    "Give memory for that many rows.",
                )
        self.rows = rows
        self.regions = dict(buffers)
        self._lock = threading.Lock()
        self._free = list(reversed(range(rows)))
        self._quarantined: set[int] = set()

    @classmethod
    def on_host(cls, kinds: Iterable[Kind], rows: int) -> Staging:
        """In memory that other processes of this host can map."""
        return cls({kind: Region.of(memory.shared(rows * kind[1])) for kind in kinds}, rows)

    @property
    def nbytes(self) -> int:
        """What it takes of memory."""
        return sum(region.nbytes for region in self.regions.values())

    @property
    def free(self) -> int:
        """Rows that can be leased now."""
        with self._lock:
            return len(self._free)

    @property
    def quarantined(self) -> int:
        """Rows that nobody may use until a fabric has let go of them."""
        with self._lock:
            return len(self._quarantined)

    def lease(self, layer: int, rows: int) -> StagingLease:
        """So many rows for a layer; raises `StagingFull`."""
        with self._lock:
            if rows > len(self._free):
                raise StagingFull(
                    f"{rows} staging rows were asked for, for layer {layer}.",
                    f"{len(self._free)} of {self.rows} are free, and {len(self._quarantined)} in quarantine.",
                    "Give the pool more rows, or move fewer experts at once.",
                )
            taken = [self._free.pop() for _ in range(rows)]
        return StagingLease(layer, taken, self)

    def drained(self, rows: Iterable[int]) -> None:
        """Nothing writes to these rows any more: they are free."""
        with self._lock:
            back = self._quarantined.intersection(rows)
            self._quarantined -= back
            self._free.extend(back)

    def table(self, kind: Kind) -> BlockTable:
        """The rows of one kind, as a transport takes them."""
        region = self.regions[kind]
        return BlockTable((region.address,), kind[1], kind[1], self.rows, region.device)

    def row(self, kind: Kind, row: int) -> Region:
        """One row of one kind."""
        region = self.regions[kind]
        return Region(region.address + row * kind[1], kind[1], region.device, owner=region.owner)

    # What a lease has changes under the lock, so that two threads that give it up at once free no row twice.

    def _quarantine(self, lease: StagingLease, rows: set[int]) -> None:
        with self._lock:
            self._quarantined.update(rows.intersection(lease.rows))
            lease.rows = [row for row in lease.rows if row not in rows]

    def _release(self, lease: StagingLease) -> None:
        with self._lock:
            self._free.extend(lease.rows)
            lease.rows = []
