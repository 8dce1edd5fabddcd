"""A tier that keeps blocks in memory and misbehaves on purpose: by chance from a seed, or as a test says.

May import the core's offload room. What composes tiers must keep its promises over it: no wrong byte, no wait.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from tensorway.metrics import Sample
from tensorway.offload import OffloadKey, OfTenant, Outcome, TierCapabilities, key_tenant
from tensorway.types import ProbeResult

#: What can happen to a call, by name.
FAULTS: Final = {
    "raise": "it raises",
    "fail": "every block of it fails, or is not there",
    "part": "every second block of it fails",
    "delay": "it takes as long as `seconds`",
    "hang": "it does not return before `release`; a read then writes to its rows, as if it had never been late",
    "short": "its answer is too short",
    "none": "its answer is None",
    "words": "its answer is of words that mean nothing",
    "full": "there is no room for any block; of a read, nothing happens",
    "corrupt": "of a read, half of each block is written, and the tier says that it is corrupt and gone",
    "vanish": "of a read, its blocks are gone, although the tier said that it has them",
    "fatal": "it raises what ends a program",
}
_LIES: Final[Mapping[str, Any]] = {"short": [], "none": None, "words": ["nonsense"] * 3}
_T = TypeVar("_T")


class FaultyTier:
    """Blocks in a dictionary. Threads share it."""

    def __init__(
        self,
        seed: int = 0,
        rates: Mapping[str, float] | None = None,
        capabilities: TierCapabilities | None = None,
        seconds: float = 0.01,
    ) -> None:
        """`rates`: how likely each fault is for one call."""
        self.capabilities = capabilities or TierCapabilities()
        self.rates, self.seconds = dict(rates or {}), seconds
        #: Ordered faults, by the name of the call: `get`, `put`, `contains`, `delete`, `probe`.
        self.next: dict[str, deque[str]] = {}
        self.blocks: dict[OffloadKey, bytes] = {}
        self.calls: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        #: Calls that are under way now, and whether it was told to end.
        self.under_way, self.closed = 0, False
        #: What a probe says.
        self.usable = True
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._released = threading.Event()

    def release(self) -> None:
        """Let all that hangs go on, and nothing hang from now on."""
        self._released.set()

    def probe(self, deadline: float) -> ProbeResult:
        """As it was told."""
        return self._serve(
            "probe",
            lambda: ProbeResult(self.usable, "as the test says"),
            lambda _: ProbeResult.failed("as the test says"),
        )

    def contains(self, keys: Sequence[OffloadKey], deadline: float) -> list[bool]:
        """Which of these it has."""
        return self._serve("contains", lambda: [key in self.blocks for key in keys], lambda _: [False] * len(keys))

    def put(self, items: Sequence[tuple[OffloadKey, memoryview]], deadline: float) -> list[Outcome]:
        """Keep copies."""

        def keep(which: Sequence[tuple[OffloadKey, memoryview]] = items) -> list[Outcome]:
            for key, view in which:
                self.blocks[key] = bytes(view)
            return ["done"] * len(which)

        def spoilt(fault: str) -> list[Outcome]:
            if fault == "part":
                keep(items[1::2])
            outcome: Outcome = "full" if fault == "full" else "failed"
            return ["done" if fault == "part" and place % 2 else outcome for place in range(len(items))]

        return self._serve("put", keep, spoilt)

    def get(self, items: Sequence[tuple[OffloadKey, memoryview]], deadline: float) -> list[Outcome]:
        """Give copies."""

        def give(which: Sequence[tuple[OffloadKey, memoryview]] = items) -> list[Outcome]:
            return [self._give(key, view) for key, view in which]

        def spoilt(fault: str) -> list[Outcome]:
            if fault == "part":
                found = iter(give(items[1::2]))
                return [next(found) if place % 2 else "failed" for place in range(len(items))]
            if fault in ("corrupt", "vanish"):
                for key, view in items:
                    self.blocks.pop(key, None)
                    if fault == "corrupt":
                        half = len(view) // 2
                        view[:half] = b"\xee" * half
                return ["corrupt" if fault == "corrupt" else "missing"] * len(items)
            return ["failed"] * len(items)

        return self._serve("get", give, spoilt)

    def delete(self, which: Sequence[OffloadKey] | OfTenant, deadline: float) -> int:
        """Remove these."""

        def remove() -> int:
            tenant = which.tenant if isinstance(which, OfTenant) else None
            gone = [k for k in self.blocks if key_tenant(k) == tenant] if tenant is not None else list(which)  # type: ignore[arg-type]
            return sum(self.blocks.pop(key, None) is not None for key in gone)

        return self._serve("delete", remove, lambda _: -1)

    def stats(self) -> Sequence[Sample]:
        """Nothing of its own."""
        return []

    def close(self, deadline: float = 5.0) -> None:
        """End; what hangs goes on hanging."""
        self.closed = True

    def _give(self, key: OffloadKey, view: memoryview) -> Outcome:
        data = self.blocks.get(key)
        if data is None:
            return "missing"
        if len(data) != len(view):
            return "corrupt"
        view[:] = data
        return "done"

    def _serve(self, name: str, right: Callable[[], _T], spoilt: Callable[[str], _T]) -> _T:
        with self._lock:
            self.calls[name] += 1
            self.under_way += 1
            fault = self._fault(name)
        try:
            if fault == "raise":
                raise OSError(f"the tier's own trouble in {name}")
            if fault == "fatal":
                raise SystemExit(3)
            if fault == "hang":
                self._released.wait()
            if fault == "delay":
                time.sleep(self.seconds)
            if fault in ("", "hang", "delay"):
                with self._lock:
                    return right()
            if fault in ("short", "none", "words"):
                lie: _T = _LIES[fault]
                return lie
            with self._lock:
                return spoilt(fault)
        finally:
            with self._lock:
                self.under_way -= 1

    def _fault(self, name: str) -> str:
        ordered = self.next.get(name)
        if ordered:
            fault = ordered.popleft()
        else:
            nothing = max(0.0, 1 - sum(self.rates.values()))
            (fault,) = self._random.choices(["", *self.rates], [nothing, *self.rates.values()])
        if fault == "hang" and self._released.is_set():
            fault = ""
        if fault:
            self.faults[fault] += 1
        return fault
