"""Many requests at once for one call, on its caller's own thread, until its time is over. May import the errors.

Each call has an event loop to itself and leaves it behind: so nothing of it runs once the call has returned, whatever
the store does, and no buffer of a caller's can be written to later. Requests that are given up are cancelled where
they are, in the library's own threads. Those go on after a call's end for a moment, and end a process that leaves
just then by an abort; so a process that has made calls leaves a little later.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, Literal

from tensorway.errors import Closed

#: How a call ended: all was done, its time was over, or somebody closed the tier.
End = Literal["done", "late", "closed"]
#: Loops that are kept for the next call; each is three open files.
_IDLE: Final = 8
#: Seconds in which the library's threads let go of what a call has left to them: Python values, for which they need an
#: interpreter. One process of seven aborted without, and none of hundreds with a tenth of it.
_SETTLES: Final = 0.2
#: Those of this process that have been used, and are not closed.
_used: Final[weakref.WeakSet[Flights]] = weakref.WeakSet()
#: The process that waits when it ends.
_waits = 0


class Flights:
    """The calls of one tier. Threads share it; `most` requests at once are those of all its calls together, about."""

    def __init__(self, most: int) -> None:
        self._most, self._process = most, os.getpid()
        self._idle: list[asyncio.AbstractEventLoop] = []
        #: Loops of calls, with what ends each of them early.
        self._busy: dict[asyncio.AbstractEventLoop, asyncio.Task[End]] = {}
        self._changed = threading.Condition()
        self._closed = False

    def run(self, one: Callable[[int], Awaitable[None]], count: int, until: float) -> End:
        """Do `one` for each number below `count`; what it raises is raised when all others have ended."""
        with self._loop() as loop:
            race = loop.create_task(self._race(one, count, until))
            self._admit(loop, race)
            try:
                return loop.run_until_complete(race)
            except asyncio.CancelledError:
                return "closed"
            except BaseException:
                if not race.done():  # interrupted: what is under way must not go on when the loop is used again
                    race.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        loop.run_until_complete(race)
                raise

    def close(self, deadline: float) -> bool:
        """End all calls and admit no other; whether none is left."""
        until = time.monotonic() + deadline
        with self._changed:
            self._closed = True
            if self._process != os.getpid():
                return True
            for loop, race in self._busy.items():
                loop.call_soon_threadsafe(race.cancel)
            while self._busy and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            idle, self._idle = self._idle, []
            for loop in idle:
                loop.close()
            return not self._busy

    def check(self) -> None:
        """Raise if nothing can be asked any more."""
        if self._closed or self._process != os.getpid():
            raise Closed(
                "The tier object was asked for something.",
                "It is closed, or belongs to the process that this one was forked from.",
                "Construct it anew, in this process.",
            )

    async def _race(self, one: Callable[[int], Awaitable[None]], count: int, until: float) -> End:
        numbers = iter(range(count))

        async def work() -> None:
            for number in numbers:
                await one(number)

        if not count:
            return "done"
        share = max(1, self._most // max(1, len(self._busy)))
        tasks = [asyncio.ensure_future(work()) for _ in range(min(count, share))]
        try:
            _, pending = await asyncio.wait(tasks, timeout=max(0.0, until - time.monotonic()))
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return "late" if pending else "done"

    def _admit(self, loop: asyncio.AbstractEventLoop, race: asyncio.Task[End]) -> None:
        _register(self)
        with self._changed:
            self._busy[loop] = race
            if self._closed:  # a moment ago
                race.cancel()

    @contextlib.contextmanager
    def _loop(self) -> Iterator[asyncio.AbstractEventLoop]:
        with self._changed:
            self.check()
            loop = self._idle.pop() if self._idle else asyncio.new_event_loop()
        try:
            yield loop
        finally:
            with self._changed:
                self._busy.pop(loop, None)
                if self._closed or len(self._idle) >= _IDLE:
                    loop.close()
                else:
                    self._idle.append(loop)
                self._changed.notify_all()


def _register(flights: Flights) -> None:
    """It is used: what is left of that is waited for before the interpreter goes."""
    global _waits
    if _waits != os.getpid():
        _waits = os.getpid()
        atexit.register(_leave, _waits)
    _used.add(flights)


def _leave(process: int) -> None:
    if process == os.getpid():
        for flights in list(_used):
            flights.close(1.0)
        time.sleep(_SETTLES)
