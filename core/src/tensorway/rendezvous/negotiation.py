"""Whether two members fit together: fact by fact, and a refusal that prints the facts that differ.

Room `rendezvous`; may import the ground and its own room. Movements add facts of their own (block sizes, layers,
ranks); who compares needs no idea of what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs
import msgspec

from tensorway.errors import Incompatible

#: `equal` on both sides; one must `divide` the other; `inform` is for people only.
Rule = Literal["equal", "divide", "inform"]
Value = str | int | float | bool | None


class Fact(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One thing that a member says of itself, and how it must relate to what another says."""

    value: Value
    rule: Rule = "equal"


Facts = Mapping[str, Fact]


@attrs.frozen
class Difference:
    """A fact in which two members do not fit."""

    name: str
    rule: Rule
    #: None where a side does not say.
    mine: Fact | None
    theirs: Fact | None

    def __str__(self) -> str:
        here, there = (f"{fact.value!r}" if fact else "nothing" for fact in (self.mine, self.theirs))
        must = "must be equal" if self.rule == "equal" else "one must divide the other"
        return f"{self.name}: {here} here, {there} there ({must})"


def differences(mine: Facts, theirs: Facts) -> list[Difference]:
    """All facts in which two members do not fit, by name; the stricter rule of the two counts."""
    found = []
    for name in sorted(mine.keys() | theirs.keys()):
        here, there = mine.get(name), theirs.get(name)
        rules = {fact.rule for fact in (here, there) if fact is not None}
        if rules == {"inform"}:
            continue
        rule: Rule = "equal" if "equal" in rules else "divide"
        if not _fits(rule, here, there):
            found.append(Difference(name, rule, here, there))
    return found


def agree(peer: str, mine: Facts, theirs: Facts) -> None:
    """Raise `Incompatible` with every difference, unless there is none."""
    found = differences(mine, theirs)
    if found:
        raise Incompatible(
            f"Member {peer} was to be connected to.",
            f"{len(found)} facts do not fit. " + "; ".join(map(str, found)) + ".",
            "Configure both alike, or put them into different groups.",
        )


def _fits(rule: Rule, here: Fact | None, there: Fact | None) -> bool:
    if here is None or there is None:
        return False
    # 1 == True and 1 == 1.0 in Python; a member that means another type means another thing.
    if type(here.value) is type(there.value) and here.value == there.value:
        return True
    if rule == "equal" or not (_whole(here.value) and _whole(there.value)):
        return False
    low, high = sorted((int(here.value or 0), int(there.value or 0)))
    return low > 0 and high % low == 0


def _whole(value: Value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
