"""What the dist of a movement is given and returns to show it in `tensorway demo`, which is in `tensorway-tools`.

Room `cli`; may import every room. The entry-point group is `tensorway.demo`, the names are those of `MOVEMENTS`, and
the value refers to a `Demonstration`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Final

import attrs

from tensorway.cli.charts import Chart
from tensorway.cli.output import Output
from tensorway.errors import DeadlineExceeded, PeerLost

_COPIES: Final = 10
_AGAIN: Final = "Run it again; if it ends the same way, report what --debug shows."


@attrs.frozen
class Stage:
    """Where a movement shows itself: how, over what, and by when."""

    out: Output
    #: What is shown, for people: `A rebalance`.
    title: str
    #: The transport to move over; empty where there is none to choose.
    transport: str
    #: By `time.monotonic`.
    until: float
    #: Whether fewer sizes and rounds will do.
    quick: bool = False

    @property
    def asked(self) -> str:
        """The first line of an error."""
        return f"{self.title} was to be shown."

    def say(self, share: float, text: str) -> None:
        """What is being done right now, and how much of all is done: 0 to 1."""
        self.out.live(text, share)

    def left(self) -> float:
        """Seconds that are left for whatever waits next; raises if there are none."""
        seconds = self.until - time.monotonic()
        if seconds <= 0:
            raise DeadlineExceeded(self.asked, "It was not over in the time that it had.", "Give it more: --deadline.")
        return seconds

    @contextlib.contextmanager
    def processes(self) -> Iterator[None]:
        """In here a process of `tensorway.testing.ranks` that ends, raises or is late is an error of three lines."""
        from tensorway.testing.ranks import RankFailed

        try:
            yield
        except RankFailed as error:
            if error.error is not None:
                raise error.error from error
            self.left()
            # A traceback of another process ends with what was raised there, which may be the end of a third one.
            last = str(error).strip().splitlines()[-1].removeprefix("tensorway.testing.ranks.RankFailed: ")
            raise PeerLost(self.asked, f"One of its processes failed: {last}.", _AGAIN) from error


@attrs.frozen
class Ratio:
    """A time of this run, to that of something else in the same run."""

    #: `handing 1024 tokens over`.
    what: str
    #: `computing them again`.
    beside: str
    seconds: float
    other: float

    @property
    def value(self) -> float:
        """How many times as long."""
        return self.seconds / max(self.other, 1e-9)

    @property
    def text(self) -> str:
        """The same for people: two digits that count."""
        return f"{self.value:.2g} x" if self.value < 10 else f"{self.value:,.0f} x"


@attrs.frozen
class Shown:
    """What one movement has shown."""

    #: What moved it: a transport, or tiers.
    over: str
    #: Real processes between which it was moved.
    processes: int
    nbytes: int
    #: Whether every byte, and what was made of it, is as it has to be.
    right: bool
    #: The one figure to remember, and in a few words what it is: `0.65 -> 1.00`, `balancedness`.
    headline: tuple[str, str]
    #: What was moved, and what it was good for.
    text: str
    ratios: tuple[Ratio, ...]
    charts: tuple[Chart, ...] = ()


#: What an entry point of the group refers to.
Demonstration = Callable[[Stage], Shown]
#: Entry-point name -> what it shows, for people; whether over a transport; and the extra that brings one.
MOVEMENTS: Final = {
    "rebalance": ("A rebalance", True, "eplb"),
    "handover": ("A hand-over", True, "kv"),
    "offload": ("Offloading", False, "cpu"),
}


def memmove(nbytes: int) -> float:
    """Seconds that copying as many bytes takes within this process, measured now."""
    source, target = bytearray(nbytes), bytearray(nbytes)
    target[:] = source  # touch the pages first
    started = time.perf_counter()
    for _ in range(_COPIES):
        target[:] = source
    return (time.perf_counter() - started) / _COPIES
