"""A tier in memory whose bytes follow from its keys, and that fails as it is told: for what is above it.

Room `testing`; may import `offload` and the rooms below.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any, Final

from tensorway.metrics import Sample
from tensorway.offload import OffloadKey, OfTenant, Outcome, TierCapabilities, key_tenant
from tensorway.testing.offload_ground import block
from tensorway.types import ProbeResult

#: No call lasts longer, so that no test leaves a thread behind.
_LONGEST: Final = 100.0


class Shelves:
    """It has blocks that nobody stored, and whatever is stored. `fault` is what becomes of every `get`."""

    capabilities = TierCapabilities(shared=True)

    def __init__(self, keys: Iterable[OffloadKey], fault: str = "") -> None:
        self._has, self.fault = set(keys), fault
        #: What was stored, as it was told to.
        self.written: set[OffloadKey] = set()
        self._released = threading.Event()

    def release(self) -> None:
        """Let calls that hang go on, and fail."""
        self._released.set()

    def probe(self, deadline: float) -> ProbeResult:
        """Yes."""
        return ProbeResult.passed("shelves")

    def contains(self, keys: Sequence[OffloadKey], deadline: float) -> list[bool]:
        """What it says that it has."""
        return [key in self._has for key in keys]

    def put(self, items: Sequence[tuple[OffloadKey, memoryview]], deadline: float) -> list[Outcome]:
        """Keep the keys: the bytes are known."""
        self.written |= {key for key, _ in items}
        self._has |= self.written
        return ["done" for _ in items]

    def get(self, items: Sequence[tuple[OffloadKey, memoryview]], deadline: float) -> list[Outcome]:
        """The bytes, or what was said of them."""
        if self.fault == "raises":
            raise OSError("the shelves fell over")
        if self.fault == "hangs":
            self._released.wait(_LONGEST)
            return ["failed" for _ in items]
        if self.fault == "short":
            return []
        if self.fault:
            outcome: Any = self.fault
            return [outcome for _ in items]
        return [self._get(key, view) for key, view in items]

    def _get(self, key: OffloadKey, view: memoryview) -> Outcome:
        if key not in self._has:
            return "missing"
        view[:] = block(key, len(view))
        return "done"

    def delete(self, which: Sequence[OffloadKey] | OfTenant, deadline: float) -> int:
        """Take these off the shelves."""
        wanted = set(which) if not isinstance(which, OfTenant) else self._of(which.tenant)
        gone = self._has & wanted
        self._has -= gone
        return len(gone)

    def _of(self, tenant: bytes) -> set[OffloadKey]:
        return {key for key in self._has if key_tenant(key) == tenant}

    def stats(self) -> Sequence[Sample]:
        """Nothing."""
        return ()

    def close(self, deadline: float = 5.0) -> None:
        """Nothing is open."""
        self.release()
