"""Engines: which are asked, which are left alone, and for how long. May import the standard library and the core.

An engine that is down is found by its health, or by a connection that breaks. An error that it answers with is no sign:
the same request may be answered so by every engine, and would have all of them left alone.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from typing import Final, Literal
from urllib.parse import urlsplit

from tensorway._logging import logger
from tensorway.metrics import Counters
from tensorway_vllm.router.options import RouterOptions

Role = Literal["prefill", "decode"]
_log = logger("vllm.router")
_FIRST_BACKOFF: Final = 0.5


class Engine:
    """One `vllm serve`, as this router knows it. Not asked until it has said that it is healthy."""

    def __init__(self, role: Role, url: str, options: RouterOptions, counts: Counters) -> None:
        self.role, self.url = role, url.rstrip("/")
        self.name = urlsplit(url).netloc
        self.up = False
        #: Why it is not asked.
        self.reason = "it has not answered yet"
        #: Requests that it has of this router.
        self.running = 0
        #: Until when others are asked rather, and which of all choices chose it last.
        self.doubted, self.chosen = 0.0, 0
        #: Set when its health is to be looked at before its time, or it goes down: `gone` is done then.
        self.look = asyncio.Event()
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._options, self._counts = options, counts
        self._failures = 0
        self._ejections = 0
        self._count()

    def healthy(self) -> None:
        """It says so."""
        self._failures = 0
        if not self.up:
            _log.info("The %s engine %s is healthy.", self.role, self.name)
            self.up, self.reason = True, ""
            self.gone = asyncio.get_running_loop().create_future()
            self._count()

    def ill(self, reason: str, at_once: bool = False) -> None:
        """It does not answer as it should; several times in a row, or where it is sure, it is left alone."""
        self._failures += 1
        self.look.set()
        if not self.up:
            self.reason = reason
        elif at_once or self._failures >= self._options.health_failures:
            _log.warning("The %s engine %s is left alone: %s.", self.role, self.name, reason)
            self.up, self.reason = False, reason
            self._ejections += 1
            self._failures = 0
            self._counts.add("router_ejections_total", role=self.role, engine=self.name)
            self._count()
            self.gone.set_result(None)

    def failed(self, cause: str) -> None:
        """A request failed there; what it means for its health is for its health to say, unless nobody listens."""
        self._counts.add("router_engine_failures_total", role=self.role, engine=self.name, cause=cause)
        self.doubted = time.monotonic() + self._options.health_backoff
        if cause in ("unreachable", "lost"):
            self.ill("a connection to it failed" if cause == "unreachable" else "it broke a connection off")
        self.look.set()

    def served(self) -> None:
        """It has answered a request: whatever it was ejected for before is over."""
        self._ejections = self._failures = 0
        self.doubted = 0.0

    @property
    def pause(self) -> float:
        """Seconds until it is asked for its health again: longer each time, while it is down."""
        if self.up:
            return self._options.health_seconds
        exponent = min(max(self._failures, self._ejections), 16)
        return min(_FIRST_BACKOFF * 2.0**exponent, self._options.health_backoff)

    def __enter__(self) -> Engine:
        self.running += 1
        self._count()
        return self

    def __exit__(self, *_: object) -> None:
        self.running -= 1
        self._count()

    def _count(self) -> None:
        labels = {"role": self.role, "engine": self.name}
        self._counts.set("router_engine_up", int(self.up), **labels)
        self._counts.set("router_engine_running", self.running, **labels)


class Engines:
    """All of them, and which is the next."""

    def __init__(self, options: RouterOptions, counts: Counters) -> None:
        self.prefill = [Engine("prefill", url, options, counts) for url in options.prefill]
        self.decode = [Engine("decode", url, options, counts) for url in options.decode]
        self._least = options.choice == "least-loaded"
        self._choices = itertools.count(1)

    def __iter__(self) -> itertools.chain[Engine]:
        return itertools.chain(self.prefill, self.decode)

    def choose(self, role: Role, tried: Sequence[Engine] = ()) -> Engine | None:
        """One that is up, if there is any: rather one that was not tried, then the one with the fewest requests.

        Requests of this router are what is known at once: load that engines report is seconds old, and all of a burst
        would follow it to the same engine. Of equal ones it is the one that was chosen longest ago. An engine that has
        just failed a request comes after all others: who fails quickly has few requests, and would be given them all.
        """
        engines = self.prefill if role == "prefill" else self.decode
        usable = [engine for engine in engines if engine.up]
        left = [engine for engine in usable if engine not in tried] or usable
        if not left:
            return None
        now = time.monotonic()

        def order(engine: Engine) -> tuple[bool, int, int]:
            return engine.doubted > now, engine.running if self._least else 0, engine.chosen

        best = min(left, key=order)
        best.chosen = next(self._choices)
        return best
