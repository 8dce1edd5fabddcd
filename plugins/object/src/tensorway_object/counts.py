"""What the tier counts; what any tier does is counted by who asks it. May import the core's offload room."""

from __future__ import annotations

import threading

from tensorway.metrics import Counters, Sample
from tensorway.offload import METRICS


class Counts:
    """Values of `tensorway.offload.METRICS`. Threads share it."""

    def __init__(self, engine: str) -> None:
        self._counters = Counters(METRICS, backend="object", engine=engine)
        self._lock = threading.Lock()

    def again(self) -> None:
        """A request is made once more."""
        with self._lock:
            self._counters.add("offload_retries_total", medium="object")

    def samples(self) -> list[Sample]:
        """All values."""
        with self._lock:
            return self._counters.samples()
