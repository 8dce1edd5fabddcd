"""A thread that wakes once a second: it looks after idle peers and NIXL's mailbox.

May import nothing of tensorway. It holds its owner weakly, so that an endpoint which is forgotten is forgotten.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Final

#: Seconds between two looks, and after one that found much.
_PERIOD: Final = 1.0
_HURRY: Final = 0.05


class Pulse:
    """Calls a bound method again and again; the method says whether to hurry."""

    def __init__(self, beat: Callable[[], bool], name: str) -> None:
        self._beat = weakref.WeakMethod(beat)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self, seconds: float = 5.0) -> None:
        """Let it end, and wait for that."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(seconds)

    def _run(self) -> None:
        pause = _PERIOD
        while not self._stop.wait(pause):
            beat = self._beat()
            if beat is None:
                return
            pause = _HURRY if beat() else _PERIOD
            del beat
