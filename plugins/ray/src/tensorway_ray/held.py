"""Memory that is registered as long as an object of Ray needs it. May import tensorway's ground and `transport`."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Final

import attrs

from tensorway.memory import Region
from tensorway.transport import Transport
from tensorway.transport.contract import Registration

#: How long memory may still be in use here when its last object has gone: nothing reads into it.
_ENDS: Final = 5.0


@attrs.define
class _Row:
    registration: Registration
    #: The objects that need it.
    names: set[str]


class Held:
    """The regions of objects; those that share memory share its registration. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[tuple[int, int], _Row] = {}
        self._registered = 0

    def hold(self, name: str, endpoint: Transport, regions: Iterable[Region]) -> tuple[bytes, int]:
        """Register what is not; returns a description with all of it, and its number, which grows."""
        with self._lock:
            try:
                for region in regions:
                    row = self._rows.get((region.address, region.nbytes))
                    if row is None:
                        row = _Row(endpoint.register(region), set())
                        self._rows[region.address, region.nbytes] = row
                        self._registered += 1
                    row.names.add(name)
            except BaseException:
                self._free(name)
                raise
            return endpoint.describe(), self._registered

    def free(self, name: str) -> None:
        """An object is no more, and neither is what no other one needs."""
        with self._lock:
            self._free(name)

    def __len__(self) -> int:
        return len(self._rows)

    def _free(self, name: str) -> None:
        for key, row in list(self._rows.items()):
            row.names.discard(name)
            if not row.names:
                del self._rows[key]
                row.registration.close(_ENDS)
