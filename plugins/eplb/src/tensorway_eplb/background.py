"""A rebalance beside a serving loop: rows travel in a thread, and layers are taken over between two steps.

May import the core and its own dist. In an expert-parallel group a layer must have its new rows and its new map from
the same step on, on every rank. Which step that is, the ranks find out with one number: each says how many layers, in
the plan's order, are agreed here, and takes over as many as the least says.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from enum import Enum

import attrs

from tensorway._logging import logger
from tensorway.errors import Closed, DeadlineExceeded
from tensorway_eplb.cycle import Engine, Outcome
from tensorway_eplb.placement import Map, Placement
from tensorway_eplb.rebalancer import Rebalancer

_log = logger("eplb")
#: The least of what all ranks give; every rank calls it in the same step: an all-reduce that the engine has anyway.
Least = Callable[[int], int]


class State(Enum):
    """Where a background rebalance is; its owner is who moves it on."""

    IDLE = "idle"  # owner: the engine, by `start`
    PLANNING = "planning"  # owner: the thread; the policy runs
    MOVING = "moving"  # owner: the thread; the deadline ends it
    FAILED = "failed"  # owner: the engine: `error` says why; regroup if members are lost, then `start` again


@attrs.define(eq=False)
class _Agreed:
    """A layer that all ranks have, until the engine takes it over; see `cycle.Pending`."""

    layer: int
    experts: Map
    write: Callable[[], None]
    lock: threading.Lock = attrs.field(factory=threading.Lock)
    done: bool = False
    withdrawn: bool = False

    def withdraw(self) -> bool:
        """Take it back, unless the engine was faster."""
        with self.lock:
            self.withdrawn = not self.done
            return self.withdrawn


class Background:
    """One rank's rebalances beside its serving loop. The engine's thread calls everything here, `state` excepted."""

    def __init__(self, rebalancer: Rebalancer, engine: Engine, least: Least) -> None:
        """`engine.commit` is called within `step`."""
        self._rebalancer, self._engine, self._least = rebalancer, engine, least
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        #: All layers of this rebalance that were agreed, in the plan's order, and how many the engine has taken over.
        self._agreed: list[_Agreed] = []
        self._taken = 0
        self._state, self._since = State.IDLE, time.monotonic()
        self._seconds: dict[str, float] = {}
        self._closed = False
        #: What the last rebalance did, and why it failed; None before one ended.
        self.outcome: Outcome | None = None
        self.error: Exception | None = None

    @property
    def state(self) -> State:
        """Where it is now; any thread may ask."""
        return self._state

    def statistics(self) -> Mapping[str, float]:
        """Seconds spent in each state, and layers that wait for the engine now."""
        with self._lock:
            now = {f"{self._state.value}_seconds": time.monotonic() - self._since}
            merged = {name: self._seconds.get(name, 0.0) + now.get(name, 0.0) for name in {**self._seconds, **now}}
            return {**merged, "waiting_layers": float(len(self._agreed) - self._taken)}

    def start(self, propose: Callable[[Placement], Placement | None], deadline: float = 60.0) -> None:
        """Begin: `propose` makes the new placement of the current one, in the thread; None leaves everything as it is.

        Every rank starts in the same step, and `propose` must give the same on each.
        """
        if self._closed:
            raise Closed("A rebalance was to be started.", "It is closed.", "Make another.")
        if self._thread is not None and self._thread.is_alive():
            raise DeadlineExceeded(
                "A rebalance was to be started.",
                f"The one before is still {self._state.value}.",
                "Wait until its state is idle or failed, or cancel it.",
            )
        self._stop.clear()
        self.outcome = self.error = None
        self._agreed, self._taken = [], 0
        self._enter(State.PLANNING)
        self._thread = threading.Thread(
            target=self._run, args=(propose, deadline), name="tensorway-eplb-background", daemon=True
        )
        self._thread.start()

    def step(self) -> tuple[int, ...]:
        """Between two steps, on every rank in the same one: take over what all have; returns these layers.

        Ranks that have called `start` call it in every step, until `state` is no longer moving on any of them.
        """
        with self._lock:
            mine = len(self._agreed)
        # Layers are handed over in the plan's order, so that the n-th is the same one on every rank.
        least = min(mine, self._least(mine))
        taken = []
        for agreed in self._agreed[self._taken : least]:
            with agreed.lock:
                if agreed.withdrawn:
                    break
                self._engine.commit(agreed.layer, agreed.experts, agreed.write)
                agreed.done = True
            self._taken += 1
            taken.append(agreed.layer)
        return tuple(taken)

    def cancel(self) -> None:
        """Begin no further layer; those that all ranks have already are taken over by `step`."""
        self._stop.set()

    def wait(self, deadline: float) -> Outcome | None:
        """For the end of the thread, while another thread calls `step`; raises what it failed with."""
        thread = self._thread
        if thread is not None:
            thread.join(deadline)
            if thread.is_alive():
                raise DeadlineExceeded(
                    "The end of a background rebalance was waited for.",
                    f"It is still {self._state.value} after {deadline:g} s.",
                    "See that every rank calls step; cancel it.",
                )
        if self.error is not None:
            raise self.error
        return self.outcome

    def close(self, deadline: float = 5.0) -> None:
        """Cancel what runs, and wait for it; the second call does nothing."""
        self._closed = True
        self.cancel()
        if self._thread is not None:
            self._thread.join(deadline)

    # -- the thread

    def commit(self, layer: int, experts: Map, write: Callable[[], None]) -> _Agreed:
        """Called by the cycle: keep the layer until the engine's next step."""
        agreed = _Agreed(layer, experts, write)
        with self._lock:
            self._agreed.append(agreed)
        return agreed

    def _run(self, propose: Callable[[Placement], Placement | None], deadline: float) -> None:
        until = time.monotonic() + deadline
        try:
            new = propose(self._rebalancer.placement)
            # Who was told to stop meanwhile begins, too, and gives up all layers at once: others may have begun.
            if new is not None and not self._closed:
                self._enter(State.MOVING)
                left = max(1e-3, until - time.monotonic())
                self.outcome = self._rebalancer.rebalance(new, left, engine=self, stop=self._stop)
            self._enter(State.IDLE)
        except Exception as error:  # it belongs to who calls `wait` or looks at `error`; the next start begins anew
            self.outcome, self.error = self._rebalancer.outcome, error
            _log.warning("A background rebalance failed: %s", error)
            self._enter(State.FAILED)

    def _enter(self, state: State) -> None:
        now = time.monotonic()
        with self._lock:
            name = f"{self._state.value}_seconds"
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
            self._state, self._since = state, now
