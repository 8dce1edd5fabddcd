"""The connector `breaking` of this process: `handover`, of which any call raises, is silent or says what a test wants.

May import the core and `tensorway-kv`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from tensorway.kv import KVContext
from tensorway.plugins import register
from tensorway.types import Offer, ProbeResult
from tensorway_kv.options import HandoverOptions


class Broken(RuntimeError):
    """What a backend raises that has a defect."""


@attrs.frozen
class BreakingOptions:
    """Options of the connector `breaking`: those of `handover`, and by which name a test finds its sides."""

    of: str
    options: dict[str, object] = attrs.field(factory=dict)


@attrs.define
class Breaking:
    """What goes wrong, by engine, side and call: the side is `planner` or `mover`, and to be made is `made`."""

    #: What is called instead, with the real side; `raised` if nothing.
    wrong: dict[tuple[str, str, str], Callable[..., Any]] = attrs.field(factory=dict)
    #: Calls that went wrong.
    seen: list[tuple[str, str, str]] = attrs.field(factory=list)

    def offer(self) -> None:
        """Let engines of this process find it."""
        register(
            Offer(
                name="breaking",
                kind="kv_connector",
                summary="Goes wrong as a test says.",
                probe=lambda: ProbeResult.passed("it is only a test"),
                probe_in="host",
                factory=self._construct,
                options=BreakingOptions,
                devices={"cpu"},
                capabilities={"pull"},
                priority=1,
            )
        )

    def breaks(self, of: str, side: str, call: str, instead: Callable[..., Any] | None = None) -> None:
        """From now on this call raises, or does something else."""
        self.wrong[of, side, call] = instead or raised

    def mend(self) -> None:
        """All is well again."""
        self.wrong.clear()

    def instead(self, of: str, side: str, call: str) -> Callable[..., Any] | None:
        """What is called instead."""
        found = self.wrong.get((of, side, call))
        if found is not None:
            self.seen.append((of, side, call))
        return found

    def _construct(self, options: BreakingOptions, context: KVContext) -> _Side:
        from tensorway_kv.mover import HandoverMover
        from tensorway_kv.planner import HandoverPlanner

        if (wrong := self.instead(options.of, context.role, "made")) is not None:
            wrong(None)
        kind: Any = HandoverPlanner if context.role == "planner" else HandoverMover
        given: Any = options.options
        return _Side(self, options.of, context.role, kind(HandoverOptions(**given), context))


def raised(side: object, *given: object, **named: object) -> None:
    """A defect."""
    raise Broken("a defect")


class _Side:
    """A planner or a mover, as far as nothing else is called instead."""

    def __init__(self, breaking: Breaking, of: str, side: str, real: Any) -> None:
        self._breaking, self._of, self._side, self._real = breaking, of, side, real

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        wrong = self._breaking.instead(self._of, self._side, name) if callable(real) else None
        return real if wrong is None else lambda *given, **named: wrong(self._real, *given, **named)
