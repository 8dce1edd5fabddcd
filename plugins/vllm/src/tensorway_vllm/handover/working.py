"""A worker's side: the mover beside its memory, made for each planner's life, and closed before another one comes.

May import the core. What a mover raises ends it: it is closed, so that nothing is written to pages any more, and the
scheduler's side, which hears why, gives its requests up.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from tensorway.kv import METRICS, Mover, Result
from tensorway.metrics import Counters, Sample
from tensorway_vllm.handover.making import Attempt, Opened, Troubles, defect, ended
from tensorway_vllm.handover.words import Said, Step

#: Seconds between two questions to a mover of which the scheduler's side expects nothing.
_QUIET: Final = 0.05


class Working:
    """The mover's side of one rank."""

    def __init__(self, make: Callable[[], Opened[Mover]]) -> None:
        self._make = make
        self._counts = Counters(METRICS, backend="vllm")
        self._troubles = Troubles(self._counts)
        self._life = 0
        self._attempt: Attempt[Mover] | None = None
        self._opened: Opened[Mover] | None = None
        self._plans: deque[bytes] = deque()
        self._asked = 0.0
        self._ready = False
        self._broken = ""

    def begin(self, step: Step) -> None:
        """See `start_load_kv`."""
        if step.life != self._life:
            self._change(step.life)
        if not self._life:
            return
        self._plans.extend(step.plans)
        mover = self._mover()
        try:
            while mover is not None and self._plans:
                mover.submit(self._plans.popleft())
        except Exception as error:  # of whatever backend
            self._break("begin what a step says", error)

    def said(self, listen: bool) -> Said | None:
        """What has ended, and what has become of the mover; `listen`: whether that is expected."""
        results: Sequence[Result] = ()
        now, mover = time.monotonic(), self._mover()
        if mover is not None and (listen or now - self._asked >= _QUIET):
            self._asked = now
            try:
                results = mover.poll()
            except Exception as error:  # of whatever backend
                self._break("say what has ended", error)
        if not (results or self._ready or self._broken):
            return None
        said = Said(self._life, results, self._ready, self._broken)
        self._ready, self._broken = False, ""
        return said

    def _mover(self) -> Mover | None:
        """The one of this life, if it is made."""
        attempt = self._attempt
        if attempt is not None and attempt.over:
            self._attempt, self._opened = None, attempt.take()
            self._ready = self._opened is not None
            if attempt.error is not None:
                self._break("be opened", attempt.error)
        return self._opened.side if self._opened is not None else None

    def _change(self, life: int) -> None:
        """Another planner decides; before anybody uses pages of the last one's requests, nothing writes to them."""
        self._end()
        self._life, self._ready, self._broken = life, False, ""
        if life:
            self._attempt = Attempt(self._make, "tensorway-vllm-mover")

    def _break(self, doing: str, error: Exception) -> None:
        self._troubles.say(doing, error)
        self._broken = str(defect(doing, error))
        self._end()

    def _end(self) -> None:
        attempt, self._attempt, opened, self._opened = self._attempt, None, self._opened, None
        self._plans.clear()
        if attempt is not None:
            attempt.abandon()
        if opened is not None:
            ended(opened)

    def statistics(self) -> Sequence[Sample]:
        """What the mover counts, and what was counted here."""
        opened = self._opened
        nothing: Sequence[Sample] = ()
        told = nothing if opened is None else self._troubles.guard("count", opened.side.statistics, nothing)
        return [*told, *self._counts.samples()]

    def close(self) -> None:
        """End; no page is touched afterwards."""
        self._end()
