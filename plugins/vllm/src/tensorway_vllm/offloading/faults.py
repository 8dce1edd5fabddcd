"""What a backend raised, kept from the engine: logged once for each kind of call, and counted each time.

May import the core. Whoever asks says what it does instead: a miss, a store that is left out, a load that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from tensorway._logging import logger
from tensorway.metrics import Counters, Sample
from tensorway.offload import METRICS

_log = logger("vllm")
_Given = ParamSpec("_Given")
_Answer = TypeVar("_Answer")


class Faults:
    """Those of one backend on one side. One thread uses it."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._counters = Counters(METRICS, backend=backend)
        self._logged: set[str] = set()

    def asked(
        self, otherwise: _Answer, call: Callable[_Given, _Answer], *given: _Given.args, **named: _Given.kwargs
    ) -> _Answer:
        """What a call of the backend says, or this, if it raises."""
        try:
            return call(*given, **named)
        except Exception as error:  # a backend is a plugin of anybody, and no request is to end for it
            self.raised(getattr(call, "__name__", "call"), error)
            return otherwise

    def raised(self, what: str, error: Exception) -> None:
        """A call has raised this."""
        self.count(what, "failed")
        if what not in self._logged:
            self._logged.add(what)
            _log.warning(
                "Offloading '%s' raised in %s, and the engine goes on without what was asked. From now on this is "
                "counted, in offload_failures_total, and not logged.",
                self._backend,
                what,
                exc_info=error,
            )

    def count(self, what: str, cause: str, blocks: int = 1) -> None:
        """Something was not done, for one of `tensorway.offload.CAUSES`."""
        self._counters.add("offload_failures_total", blocks, medium="engine", what=what, cause=cause)

    def beside(self, statistics: Callable[[], Sequence[Sample]]) -> list[Sample]:
        """What the backend counts, and what was counted here."""
        theirs: Sequence[Sample] = self.asked((), statistics)
        return [*theirs, *self._counters.samples()]
