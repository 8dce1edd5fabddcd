"""Waiting for what comes about in its own time, with an end: for tests that follow threads and processes.

Room `testing`; may import the standard library only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def _pause() -> None:
    time.sleep(0.01)


def eventually(
    condition: Callable[[], Any],
    seconds: float = 30.0,
    otherwise: str = "it did not come about",
    step: Callable[[], object] = _pause,
) -> Any:
    """What `condition` returns once it is true; a failure if that is not in time. `step` comes between two looks."""
    until = time.monotonic() + seconds
    while True:
        late = time.monotonic() >= until  # before the look: who was kept from looking looks once more
        if value := condition():
            return value
        assert not late, f"within {seconds:g} s: {otherwise}"
        step()


def settled(grown: Callable[[], list[str]], seconds: float = 5.0) -> list[str]:
    """What has grown, and does not come back by itself."""
    until = time.monotonic() + seconds
    while True:
        late = time.monotonic() >= until
        if not (found := grown()) or late:
            return found
        _pause()
