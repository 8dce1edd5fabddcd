"""One request, made again while that may help; and what became of it, in words that do not depend on the store.

May import the ground and its own package; loads obstore. How often requests are made again is limited for all of them
together: each that succeeds earns a part of one more. A store that is overloaded is then asked little more than before.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Literal, TypeVar

from tensorway_object import library
from tensorway_object.options import ObjectOptions
from tensorway_object.stores import said_by

#: `missing`: no such object; `there`: one that was not to be; `gone`: the bucket is not there; `denied`: we may not;
#: `refused`: the store does not take such a request; `full`: it has no room; `busy`: it is overloaded; `failed`:
#: something else.
What = Literal["missing", "there", "gone", "denied", "refused", "full", "busy", "failed"]
#: What is true then, and what an operator can do.
TRUE: Final[Mapping[What, str]] = {
    "missing": "There is no such object",
    "there": "Somebody else has written it",
    "gone": "The bucket is not there",
    "denied": "The store does not let us do that",
    "refused": "The store does not take such a request",
    "full": "The store has no room",
    "busy": "The store is overloaded",
    "failed": "The store did not answer as it should",
}
_REACH: Final = "See whether the store runs, and whether this host reaches it."
REMEDIES: Final[Mapping[What, str]] = {
    "missing": _REACH,
    "there": _REACH,
    "gone": "Create the bucket, or correct the option url.",
    "denied": "Grant what the backend's page lists; without the right to list, what is missing looks forbidden.",
    "refused": "Compare url, endpoint, region and config with what the store expects.",
    "full": "Give it more room, or let a lifecycle rule remove old objects sooner.",
    "busy": "Use fewer requests at once (concurrency), or a store that takes more.",
    "failed": _REACH,
}
_T = TypeVar("_T")

#: Characters of what a store says that are told to people.
_WORDS: Final = 400
#: The longest pause, in seconds.
_LONGEST: Final = 5.0
#: Requests that may be made again before any has succeeded.
_CREDIT: Final = 20.0
_GONE: Final = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist", re.IGNORECASE)
_BUSY: Final = re.compile(r"status code: (?:503|429)|SlowDown|ServerBusy|TooManyRequests", re.IGNORECASE)
_FULL: Final = re.compile(r"No space left|Disk quota|StorageFull|QuotaExceeded|status code: 507", re.IGNORECASE)
#: What the client did wrong it does wrong again; 408 is a time-out, and 409 somebody else who writes just now.
_OURS: Final = re.compile(r"status code: (?:4(?!08|09|29)\d\d|501)")
#: What of an error's words says what it is, where its class does not; the first that is found.
_SIGNS: Final[tuple[tuple[re.Pattern[str], What], ...]] = (
    (_FULL, "full"),
    (_BUSY, "busy"),
    (_GONE, "gone"),
    (_OURS, "refused"),
)


class Trouble(Exception):
    """A request that did not do what it was for."""

    def __init__(self, what: What, words: str) -> None:
        super().__init__(what, words)
        self.what, self.words = what, words


class Requests:
    """Makes requests. Threads share it."""

    def __init__(self, options: ObjectOptions, again: Callable[[], None]) -> None:
        """`again` is called for each request that is made once more."""
        self._options, self._again = options, again
        self._credit = _CREDIT
        self._lock = threading.Lock()

    async def make(self, request: Callable[[], Awaitable[_T]]) -> _T:
        """What it returns; raises `Trouble` in the end, and ends when whoever waits for it is cancelled."""
        for attempt in itertools.count(1):
            try:
                result = await request()
            except Exception as error:
                trouble = trouble_of(error)
                if trouble.what not in ("busy", "failed") or attempt >= self._options.attempts or not self._pay():
                    raise trouble from error
            else:
                self._earn()
                return result
            self._again()
            # All of it at random, so that those who were refused together do not come back together.
            await asyncio.sleep(random.uniform(0, min(_LONGEST, self._options.pause * 2 ** (attempt - 1))))
        raise AssertionError("attempts are counted without end")

    def _pay(self) -> bool:
        with self._lock:
            if self._credit < 1:
                return False
            self._credit -= 1
            return True

    def _earn(self) -> None:
        with self._lock:
            self._credit = min(_CREDIT, self._credit + self._options.retry_ratio)


def trouble_of(error: Exception) -> Trouble:
    """What an exception of obstore means; what is not one of its is raised again."""
    text = said_by(error)
    words = text[:_WORDS]
    if isinstance(error, library.AlreadyExists | library.Precondition):
        return Trouble("there", words)
    if isinstance(error, library.Denied | library.Unauthenticated | PermissionError):
        return Trouble("denied", words)
    if isinstance(error, FileNotFoundError):
        return Trouble("gone" if _GONE.search(text) else "missing", words)
    if isinstance(error, library.NotSupported | NotImplementedError):
        return Trouble("refused", words)
    if not isinstance(error, library.Trouble | OSError):
        raise error
    return Trouble(next((what for sign, what in _SIGNS if sign.search(text)), "failed"), words)
