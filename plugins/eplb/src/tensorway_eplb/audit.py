"""Weights compared with their digests beside a serving loop, slowly, for as long as it runs.

May import the core and its own dist. One row at a time, under the lock of the layers: so a commit waits for one row at
most, and no row is read while it is written. Memory that goes bad is found before another rank asks for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import attrs

from tensorway._logging import logger
from tensorway.eplb import ExpertLayout
from tensorway.errors import Closed, DeadlineExceeded, PlacementInvalid

_log = logger("eplb")


class Audited(Protocol):
    """What an audit needs of a `Rebalancer`."""

    layout: ExpertLayout

    @property
    def verifies(self) -> bool:
        """Whether there are digests."""
        ...

    def check_row(self, layer: int, slot: int) -> tuple[int, bool] | None:
        """The expert there, and whether its row is right; None if that cannot be said; raises `Closed`."""
        ...


@attrs.frozen
class WrongRow:
    """A row that is not what was loaded."""

    layer: int
    slot: int
    expert: int


class Audit:
    """Reads all weights of this rank again and again, in a thread. Any thread may call everything here."""

    def __init__(
        self,
        rebalancer: Audited,
        on_wrong: Callable[[WrongRow], None],
        *,
        bytes_per_second: float = 100e6,
    ) -> None:
        """`on_wrong` is called in the audit's thread, once for a row until that is right or another expert's.

        Nothing is locked then: it may reload the row. What it raises ends the audit, and is `error`. Slots that are
        empty take their time, too, so that a pass takes as long on every rank.
        """
        asked = f"An audit of {bytes_per_second} bytes per second was to be made."
        if not 0 < bytes_per_second < float("inf"):
            raise PlacementInvalid(asked, "A rate is a number above 0.", "Give what serving can do without.")
        if not rebalancer.verifies:
            true = "The group keeps no digests: verify is False, or the processor cannot read the weights."
            raise PlacementInvalid(asked, true, "Join with verify=True, or do without an audit.")
        self._rebalancer, self._on_wrong, self._rate = rebalancer, on_wrong, bytes_per_second
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False
        #: Layer and slot -> expert.
        self._wrong: dict[tuple[int, int], int] = {}
        self._next, self._pass_began = 0, time.monotonic()
        self._counted = dict.fromkeys(("rows_checked", "bytes_checked", "wrong_found", "passes", "pass_seconds"), 0.0)
        #: What ended the thread, if it was not `stop`.
        self.error: Exception | None = None

    @property
    def running(self) -> bool:
        """Whether rows are being checked."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def wrong(self) -> tuple[WrongRow, ...]:
        """The rows that were wrong when they were last read."""
        with self._lock:
            return tuple(WrongRow(*place, expert) for place, expert in sorted(self._wrong.items()))

    def statistics(self) -> Mapping[str, float]:
        """Since it was made: rows and bytes checked, wrong ones found, whole passes, and seconds of the last pass."""
        with self._lock:
            return {**self._counted, "wrong_now": float(len(self._wrong))}

    def start(self) -> None:
        """Begin, or go on after `stop`, with the row that is next; while it runs this does nothing."""
        with self._lock:
            if self._closed:
                raise Closed("An audit was to be started.", "It is closed.", "Make another.")
            if self.running:
                if self._stop.is_set():
                    raise _still_there("started again", "It was told to stop, and")
                return
            self._stop.clear()
            self.error = None
            self._thread = threading.Thread(target=self._run, name="tensorway-eplb-audit", daemon=True)
            self._thread.start()

    def stop(self, deadline: float = 5.0) -> None:
        """End after the row that is being read."""
        self._stop.set()
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        thread.join(deadline)
        if thread.is_alive():
            raise _still_there("stopped", f"After {deadline:g} s it")

    def close(self, deadline: float = 5.0) -> None:
        """Stop for good; the second call does nothing. Before the memory of the weights goes."""
        with self._lock:
            self._closed = True
        self.stop(deadline)

    def __enter__(self) -> Audit:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- the thread

    def _run(self) -> None:
        layout, slots = self._rebalancer.layout, self._rebalancer.layout.slots
        try:
            while not self._stop.is_set():
                layer, slot = divmod(self._next, slots)
                began = time.monotonic()
                if self._next == 0:
                    self._pass_began = began
                self._check(layer, slot)
                self._stop.wait(max(0.0, began + layout.row_bytes(layer) / self._rate - time.monotonic()))
                self._next = (self._next + 1) % (len(layout.layers) * slots)
                if self._next == 0:
                    self._count_pass()
        except Closed:
            _log.debug("The rebalancer is closed: its audit ends")
        except Exception as error:  # it belongs to who looks at `error`; the next start goes on
            self.error = error
            _log.warning("An audit of expert weights ended: %s: %s", type(error).__name__, error)

    def _check(self, layer: int, slot: int) -> None:
        found = self._rebalancer.check_row(layer, slot)
        with self._lock:
            if found is None:
                self._wrong.pop((layer, slot), None)
                return
            expert, right = found
            self._counted["rows_checked"] += 1
            self._counted["bytes_checked"] += self._rebalancer.layout.row_bytes(layer)
            known = self._wrong.pop((layer, slot), None)
            if right:
                return
            self._wrong[layer, slot] = expert
            if known == expert:
                return
            self._counted["wrong_found"] += 1
        _log.error("The row of expert %d in layer %d, slot %d is not what was loaded", expert, layer, slot)
        self._on_wrong(WrongRow(layer, slot, expert))

    def _count_pass(self) -> None:
        with self._lock:
            self._counted["passes"] += 1
            self._counted["pass_seconds"] = time.monotonic() - self._pass_began


def _still_there(asked: str, true: str) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"An audit was to be {asked}.",
        f"{true} still reads a row, waits for a reload, or is in its callback.",
        "See who holds a layer, and what the callback waits for.",
    )
