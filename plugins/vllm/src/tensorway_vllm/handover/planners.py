"""The planner of this engine's present life: made anew when it could not be made, or when it or a mover broke.

May import the core. A planner whose state is not known any more is given up with all that it had: its movers are
closed before anybody uses the pages that they may write to, and its requests are computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from tensorway._logging import logger
from tensorway.errors import (
    BackendConflict,
    BackendNotFound,
    LayoutInvalid,
    OptionsInvalid,
    SettingInvalid,
    Unauthenticated,
    Unsupported,
)
from tensorway.kv import Capabilities, Planner, Result
from tensorway.kv import Step as Decided
from tensorway.metrics import Sample
from tensorway_vllm.handover.making import Attempt, Opened, Pause, Troubles, ended
from tensorway_vllm.handover.words import Said

_log = logger("vllm")
#: What no other attempt will mend: the configuration is wrong.
_WRONG: Final = (
    BackendConflict, BackendNotFound, LayoutInvalid, OptionsInvalid, SettingInvalid, Unauthenticated, Unsupported,
)  # fmt: skip


class Planners:
    """One planner after the other."""

    def __init__(
        self, make: Callable[[], Opened[Planner]], ranks: int, retry: float, start: float, troubles: Troubles
    ) -> None:
        """Wait for the first one, but not for long; raises what is wrong with the configuration."""
        self._make, self._ranks, self._troubles, self._pause = make, ranks, troubles, Pause(retry)
        #: How many there were.
        self._life = 0
        self._opened: Opened[Planner] | None = None
        self._ready: set[int] = set()
        self._can = Capabilities()
        self._ending: list[threading.Thread] = []
        self._closed = False
        self._attempt: Attempt[Planner] | None = self._begin()
        if self._attempt.wait(start) and isinstance(self._attempt.error, _WRONG):
            raise self._attempt.error
        self.turn()

    def _begin(self) -> Attempt[Planner]:
        return Attempt(self._make, "tensorway-vllm-planner")

    @property
    def now(self) -> Planner | None:
        """The one that is there, if one is."""
        return self._opened.side if self._opened is not None else None

    def turn(self) -> int:
        """Which life it is now, 0 for none; here alone another one begins. If there is none, one is made in time."""
        if self._opened is None and self._attempt is not None and self._attempt.over:
            self._opened, error, self._attempt = self._attempt.take(), self._attempt.error, None
            if error is not None:
                self._failed("be opened", error)
            if self._opened is not None:
                self._can = self._opened.side.capabilities
            self._life += 1
            self._ready.clear()
        elif self._opened is None and self._attempt is None and not self._closed and self._pause.over:
            self._attempt = self._begin()
        return self.life

    @property
    def life(self) -> int:
        """Of the planner that is there, counted from 1; 0 if there is none. Movers are of one planner's life."""
        return self._life if self._opened is not None else 0

    @property
    def by_content(self) -> bool:
        """Whether blocks are looked up by what they are, also for requests without a ticket."""
        return self._opened is not None and self._can.by_content

    @property
    def by_ticket(self) -> bool:
        """Whether a request is handed over to whoever has its ticket."""
        return self._opened is not None and (self._can.pull or self._can.push)

    @property
    def opening(self) -> bool:
        """Whether movers are still being made for the planner that is there."""
        return self._opened is not None and len(self._ready) < self._ranks

    def guard(self, doing: str, call: Callable[[Planner], object]) -> None:
        """Say something of a request, which has what it needs whether it is heard or not."""
        planner = self.now
        if planner is not None:
            self._troubles.guard(doing, lambda: call(planner), None)

    def decided(self) -> Decided | None:
        """What it decided since the last time; None if there is none, or none any more."""
        planner = self.now
        if planner is None:
            return None
        try:
            step = planner.plan_step()
            return Decided(set(step.released), set(step.received), dict(step.failed), bytes(step.plan))
        except Exception as error:  # of whatever backend: its requests are computed
            self._failed("plan a step", error)
            return None

    def busy(self) -> bool:
        """Whether it must be asked although the engine has no request."""
        if self._opened is None:
            return False
        try:
            return self.opening or self._opened.side.busy()
        except Exception as error:  # of whatever backend
            self._failed("say whether it is busy", error)
            return False

    def heard(self, rank: int, said: Said) -> bool:
        """What a worker says; whether the planner may have something to decide now."""
        planner = self.now
        if planner is None or said.life != self.life:
            return False
        if said.broken:
            _log.error("Rank %d cannot move KV blocks, and requests are computed meanwhile. %s", rank, said.broken)
            self.give_up()
            return False
        if said.ready:
            self._ready.add(rank)
            if not self.opening:
                self._pause.forget()
        results: Sequence[Result] = said.results
        if not results:
            return False
        for result in results:
            if result.cause and result.cause != "cancelled":
                self._troubles.missed(result)
        try:
            planner.on_results(rank, results)
        except Exception as error:  # of whatever backend
            self._failed("hear what movers say", error)
            return False
        return True

    def _failed(self, doing: str, error: Exception) -> None:
        self._troubles.say(doing, error)
        self.give_up()

    def give_up(self) -> None:
        """Have none for a while; what is kept and fetched is over."""
        seconds = self._pause.begin()
        _log.warning("Requests are not handed over for the next %g s.", seconds)
        opened, self._opened = self._opened, None
        if opened is not None:
            thread = threading.Thread(target=ended, args=(opened,), name="tensorway-vllm-ending", daemon=True)
            thread.start()
            self._ending = [one for one in self._ending if one.is_alive()] + [thread]

    def statistics(self) -> Sequence[Sample]:
        """What the one that is there has counted."""
        opened, nothing = self._opened, list[Sample]()
        return nothing if opened is None else self._troubles.guard("count", opened.side.statistics, nothing)

    def close(self) -> None:
        """End."""
        self._closed = True
        attempt, self._attempt, opened, self._opened = self._attempt, None, self._opened, None
        if attempt is not None:
            attempt.abandon()
        if opened is not None:
            ended(opened)
        for thread in self._ending:
            thread.join(5.0)
