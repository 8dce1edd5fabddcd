"""One side of a backend, made beside the steps of an engine: no step waits for a rendezvous, and none fails with it.

May import the core. A planner or a mover may take long to be made, or not be made at all; both are found out in a
thread of their own, and what failed is tried again after pauses that grow.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, Literal, TypeVar

import attrs

import tensorway
from tensorway._logging import logger
from tensorway.errors import PluginDefect, TensorwayError
from tensorway.kv import KVContext, Mover, Planner, RankGeometry, Result
from tensorway.metrics import Counters
from tensorway.rendezvous import Rendezvous
from tensorway_vllm.handover.options import HandoverOptions

_log = logger("vllm")
_SideT = TypeVar("_SideT", Planner, Mover)
_ResultT = TypeVar("_ResultT")
#: Seconds after which a side that cannot be made is tried again, at most.
_LONGEST: Final = 60.0
#: Seconds after which the same is told again, and how many are told apart.
_AGAIN: Final = 60.0
_MOST: Final = 256
#: Seconds that the end of one side may take.
_ENDING: Final = 5.0


@attrs.frozen
class Recipe:
    """What both sides of this engine are made of."""

    options: HandoverOptions
    engine: str
    ranks: int

    def make(
        self, role: Literal["planner", "mover"], rank: int, geometry: RankGeometry, facts: Mapping[str, str]
    ) -> Opened[Any]:
        """Meet, and make the side."""
        options = self.options
        rendezvous: Rendezvous = tensorway.create("rendezvous", options.rendezvous, options.rendezvous_options)
        context = KVContext(
            self.engine, rendezvous, role, self.ranks, rank, geometry, facts, options.open_seconds
        )  # fmt: skip
        try:
            return Opened(tensorway.create("kv_connector", options.connector, options.options, context), rendezvous)
        except BaseException:
            rendezvous.close()
            raise


@attrs.frozen(eq=False)
class Opened(Generic[_SideT]):
    """A side, and where it meets others."""

    side: _SideT
    rendezvous: Rendezvous

    def close(self) -> None:
        """End both."""
        try:
            self.side.close(_ENDING)
        finally:
            self.rendezvous.close()


class Attempt(Generic[_SideT]):
    """A side that is being made."""

    def __init__(self, make: Callable[[], Opened[_SideT]], name: str) -> None:
        self._make: Callable[[], Opened[_SideT]] = make
        self._lock, self._done = threading.Lock(), threading.Event()
        self._opened: Opened[_SideT] | None = None
        self._unwanted = False
        #: Why it was not made.
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            opened = self._make()
        except Exception as error:  # of whatever backend: who asked for it is told
            self.error = error
        else:
            with self._lock:
                if not self._unwanted:
                    self._opened = opened
            if self._unwanted:
                ended(opened)
        finally:
            self._done.set()

    def wait(self, seconds: float) -> bool:
        """Until it is over; whether it is."""
        return self._done.wait(seconds)

    @property
    def over(self) -> bool:
        """Whether it was made, or was not."""
        return self._done.is_set()

    def take(self) -> Opened[_SideT] | None:
        """What was made."""
        return self._opened

    def abandon(self) -> None:
        """Nobody wants it any more: what is made of it is ended."""
        with self._lock:
            self._unwanted, opened, self._opened = True, self._opened, None
        if opened is not None:
            ended(opened)


def ended(opened: Opened[Any]) -> None:
    """End a side, whatever it raises: nobody uses it any more."""
    try:
        opened.close()
    except Exception as error:  # of whatever backend; the engine goes on
        _log.error("%s", defect("end", error))


class Pause:
    """When to try again: after a while, and after a longer one each time."""

    def __init__(self, first: float) -> None:
        self._first = self._next = first
        self._until = 0.0

    @property
    def over(self) -> bool:
        """Whether it is time."""
        return time.monotonic() >= self._until

    def begin(self) -> float:
        """It has failed; seconds until the next time."""
        seconds = self._next
        self._until, self._next = time.monotonic() + seconds, min(_LONGEST, 2 * seconds)
        return seconds

    def forget(self) -> None:
        """It works."""
        self._next = self._first


class Troubles:
    """What a backend raised: told once for each kind of it, in three lines, and counted each time."""

    def __init__(self, counts: Counters) -> None:
        self._counts, self._told = counts, set[tuple[str, type[BaseException]]]()
        #: When it was told last that blocks did not come, by cause and engine.
        self._missed: dict[tuple[str, str], float] = {}

    def say(self, doing: str, error: Exception) -> None:
        """It was to do something, and raised this."""
        self._counts.add("kv_fallbacks_total", peer="", cause="failed")
        kind = (doing, type(error))
        if kind in self._told:
            _log.debug("%s", defect(doing, error))
            return
        self._told.add(kind)
        _log.error("%s", defect(doing, error), exc_info=None if isinstance(error, TensorwayError) else error)

    def missed(self, result: Result) -> None:
        """A request's blocks did not come; told once a minute for each engine and cause."""
        whose, now = (result.cause, result.why.partition(":")[0]), time.monotonic()
        if now - self._missed.get(whose, -_AGAIN) < _AGAIN:
            return
        if len(self._missed) >= _MOST:
            self._missed.clear()
        self._missed[whose] = now
        why = " ".join(result.why.split())  # a client's words may be in it, and must not look like another line
        _log.warning("A request's KV blocks did not come, and are computed (%s). %s", result.cause, why)

    def guard(self, doing: str, call: Callable[[], _ResultT], otherwise: _ResultT) -> _ResultT:
        """What the call returns, or what is true if it raises."""
        try:
            return call()
        except Exception as error:  # of whatever backend: the request goes on without it
            self.say(doing, error)
            return otherwise


def defect(doing: str, error: Exception) -> TensorwayError:
    """The same in three lines."""
    if isinstance(error, TensorwayError):
        return error
    return PluginDefect(
        f"A connector of TensorwayConnector was to {doing}.",
        f"It raised {type(error).__name__}: {error}",
        "Requests are computed meanwhile. Report it to who made the connector.",
    )
