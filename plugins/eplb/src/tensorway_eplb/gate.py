"""Should a rebalance happen? Weighs what a better balance saves against what moving the rows costs.

May import the core's ground. A gate says why in words, logs it and counts it; it moves nothing.
"""

from __future__ import annotations

from typing import Final

import attrs

from tensorway import _logging
from tensorway.errors import PlacementInvalid

#: Why a gate decides as it does: code -> whether the rebalance happens.
CODES: Final = {
    "lost": True,
    "unchanged": False,
    "small-gain": False,
    "no-work": True,
    "too-dear": False,
    "worth-it": True,
}

_log = _logging.logger("eplb")


@attrs.frozen
class Decision:
    """Whether to rebalance, and why."""

    rebalance: bool
    #: One of `CODES`, for programs.
    code: str
    #: One line for people.
    reason: str
    #: The share of the experts' time that the new placement saves.
    gain: float
    #: Seconds that it saves until the next rebalance, and seconds that moving takes; None where nobody said.
    saved: float | None = None
    spent: float | None = None


@attrs.define
class Gate:
    """Decides for one group.

    Equal figures have equal answers, but figures that ranks measure for themselves differ: let one rank decide, and
    tell the others.
    """

    #: A gain below this is not worth a rebalance, whatever it costs.
    min_gain: float = attrs.field(default=0.01, validator=[attrs.validators.ge(0), attrs.validators.lt(1)])
    #: How much of the time of moving is lost to serving: 1 where serving stops for it, less where it goes on.
    lost_while_moving: float = attrs.field(default=1.0, validator=[attrs.validators.ge(0), attrs.validators.le(1)])
    #: How often it decided by each code.
    counts: dict[str, int] = attrs.field(factory=lambda: dict.fromkeys(CODES, 0), init=False)

    def decide(
        self,
        before: float,
        after: float,
        *,
        rows: int,
        lost: int = 0,
        work: float | None = None,
        seconds: float | None = None,
    ) -> Decision:
        """Weigh a placement of balancedness `after` against the one that is there, of balancedness `before`.

        `rows` is how many slots change, `lost` how many lost experts the new placement brings back, `work` the seconds
        that the experts are expected to take until the next rebalance, as things are, and `seconds` what moving takes:
        bytes by the measured rate.
        """
        given = [value for value in (before, after, work, seconds) if value is not None]
        if not all(0 <= value < float("inf") for value in given) or min(before, after) <= 0:
            raise PlacementInvalid(
                f"A gate was asked to weigh a balance of {after} against {before}, {work} s of work and {seconds} s.",
                "A balance is above 0, and a time is 0 or more.",
                "Give what was measured, or None.",
            )
        decision = self._weigh(1 - before / after, before, after, rows, lost, work, seconds)
        self.counts[decision.code] += 1
        _log.info(
            "%s: %s",
            "rebalance" if decision.rebalance else "no rebalance",
            decision.reason,
            extra={"code": decision.code, "gain": decision.gain},
        )
        return decision

    def _weigh(
        self, gain: float, before: float, after: float, rows: int, lost: int, work: float | None, seconds: float | None
    ) -> Decision:
        spent = None if seconds is None else seconds * self.lost_while_moving
        saved = None if work is None else max(gain, 0.0) * work

        def because(code: str, reason: str) -> Decision:
            return Decision(CODES[code], code, reason, gain, saved, spent)

        if lost:
            return because("lost", f"{lost} experts that nobody holds any more get a place again")
        if rows == 0:
            return because("unchanged", "the policy leaves everything where it is")
        balance = f"the balance goes from {before:.4f} to {after:.4f}"
        if gain < self.min_gain:
            return because("small-gain", f"{balance}, a gain of {gain:.2%}; below {self.min_gain:.2%} nothing is moved")
        if saved is None or spent is None:
            return because(
                "no-work", f"{balance}, a gain of {gain:.2%}; work or rate is unknown, so nothing is weighed"
            )
        weighed = f"{saved:.3g} s of {work:.3g} s are saved, and moving takes {spent:.3g} s"
        if saved < spent:
            return because("too-dear", f"{balance}, but {weighed}")
        return because("worth-it", f"{balance}: {weighed}")
