"""Threads that make a tier's calls, so that nobody else waits for them; how late a call may be, and what then.

May import the standard library only. A call that hangs cannot be taken back: its thread is written off until it
returns, another takes its place, and only so many do.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final, Literal

import attrs

#: How much of what is left of its time a call is told that it has: it may end a little later than it was told.
_SHARE: Final = 0.9


@attrs.define(eq=False)
class Call:
    """One call of a tier. Whoever has submitted it looks at it after `poll` has named it."""

    #: Told how many seconds it has.
    work: Callable[[float], object]
    #: When it is late, by the lanes' clock.
    until: float
    #: Told of it: once when it is over, and once before that if it is late and not over.
    then: Callable[[Call], None]
    state: Literal["queued", "running", "returned", "dropped"] = "queued"
    #: Set when its time was up before it was over.
    late: bool = False
    value: object = None
    error: BaseException | None = None
    started: float = 0.0
    ended: float = 0.0

    @property
    def over(self) -> bool:
        """Whether no thread is in it, and none will be."""
        return self.state in ("returned", "dropped")


class Lanes:
    """So many threads for the calls of one tier. One thread submits and polls, and never waits."""

    def __init__(self, name: str, most: int, spare: int, clock: Callable[[], float]) -> None:
        self._name, self._most, self._spare, self._clock = name, most, spare, clock
        self._changed = threading.Condition()
        self._queue: deque[Call] = deque()
        self._running: set[Call] = set()
        #: Over, and not told yet.
        self._over: deque[Call] = deque()
        self._threads: set[threading.Thread] = set()
        self._idle = self._stuck = 0
        self._closed = False

    @property
    def stuck(self) -> int:
        """Threads that are in a call whose time is up."""
        return self._stuck

    @property
    def blocked(self) -> bool:
        """Whether so many threads hang that nothing would be begun."""
        return self._stuck >= self._most + self._spare

    def busy(self) -> bool:
        """Whether a call is not over, or was not told."""
        return bool(self._queue or self._running or self._over)

    def submit(self, call: Call) -> bool:
        """Make this call when a thread is free; false if none will be, and then it was never there."""
        with self._changed:
            if self._closed or self.blocked:
                return False
            self._queue.append(call)
            self._staff()
            self._changed.notify()
            return True

    def poll(self, now: float) -> list[Call]:
        """Calls that are over, and those that have become late; each once for either."""
        if not self.busy():
            return []
        with self._changed:
            found = [call for call in self._running if not call.late and now >= call.until]
            for call in found:
                call.late = True
                self._stuck += 1
            if self._queue and (found or any(now >= call.until for call in self._queue)):
                self._drop(lambda call: now >= call.until)
            if found:
                self._staff()
            while self._over:
                found.append(self._over.popleft())
        return found

    def close(self) -> None:
        """Begin nothing new; who is idle ends."""
        with self._changed:
            self._closed = True
            self._drop(lambda call: True)
            self._changed.notify_all()

    def join(self, until: float) -> bool:
        """Wait for the threads until then; whether all have ended."""
        for thread in list(self._threads):
            thread.join(max(0.0, until - self._clock()))
        return not self._running

    def _drop(self, which: Callable[[Call], bool]) -> None:
        kept: deque[Call] = deque()
        for call in self._queue:
            if which(call):
                call.state, call.late = "dropped", True
                self._over.append(call)
            else:
                kept.append(call)
        self._queue = kept

    def _staff(self) -> None:
        """As many threads as there is work for; those that are stuck do not count, and only so many are replaced."""
        wanted = min(len(self._queue) - self._idle, self._most - (len(self._threads) - self._stuck))
        for _ in range(min(wanted, self._most + self._spare - len(self._threads))):
            thread = threading.Thread(target=self._work, name=f"tensorway-tier-{self._name[:40]}", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _work(self) -> None:
        while (call := self._next()) is not None:
            try:
                call.value = call.work(_SHARE * (call.until - call.started))
            except BaseException as error:  # whatever a tier raises is told, and must not cost the thread
                call.error = error
            call.ended = self._clock()
            with self._changed:
                call.state = "returned"
                self._running.discard(call)
                self._over.append(call)
                if call.late:
                    self._stuck -= 1
                    if len(self._threads) - self._stuck > self._most:  # another one has taken its place
                        self._threads.discard(threading.current_thread())
                        return
            del call  # what it holds must not stay while this thread is idle

    def _next(self) -> Call | None:
        with self._changed:
            self._idle += 1
            while not self._queue and not self._closed:
                self._changed.wait()
            self._idle -= 1
            if not self._queue:
                self._threads.discard(threading.current_thread())
                return None
            call = self._queue.popleft()
            call.state, call.started = "running", self._clock()
            self._running.add(call)
            return call
