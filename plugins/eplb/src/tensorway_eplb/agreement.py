"""Whether a layer commits: every member must come to one answer, also when some of them die in between.

May import attrs and msgspec only. Without any waiting, sending or clock in it, so that a test can try all orders of
messages and deaths. Each member tells all others its whole state, again and again; a message that is lost costs time
and nothing else.

A member that says READY for a layer has all rows of it, verified, and cannot take that back. A layer commits when all
members are ready. Who is lost is a *view*; views grow, and are told. In a larger view everybody tells its state anew
before anything more is decided: so a member that had committed before is heard, and the others follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from operator import lt

import attrs
import msgspec


class Status(IntEnum):
    """Of one layer at one member; it only grows, and the last two are for ever."""

    WORKING = 0
    READY = 1
    COMMITTED = 2
    ABORTED = 3


class Report(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """All that a member says about a cycle."""

    epoch: int
    cycle: int
    #: Of the plan that it follows; another digest means another plan.
    plan: str
    #: Whom it knows to be lost.
    view: tuple[int, ...]
    #: The status of each layer of the plan, in the plan's order.
    statuses: bytes


@attrs.frozen
class Decision:
    """What becomes of a layer, for ever."""

    layer: int
    commit: bool
    why: str = ""


class Agreement:
    """One member's part in the agreement about the layers of one cycle."""

    def __init__(
        self, members: int, me: int, layers: Sequence[int], survivable: Callable[[int, frozenset[int]], bool]
    ) -> None:
        """`survivable(layer, lost)`: whether the group can do with the new layer when these members are gone."""
        self._members = frozenset(range(members))
        self._me = me
        self._layers = tuple(layers)
        self._survivable = survivable
        self._index = {layer: index for index, layer in enumerate(self._layers)}
        self.statuses = bytearray(len(self._layers))
        self.view: frozenset[int] = frozenset()
        #: Who said that this member is lost; the others go on without it.
        self.excluded_by: int | None = None
        self._heard: dict[int, tuple[frozenset[int], bytes]] = {}
        self._undecided = set(self._layers)
        self._decisions: list[Decision] = []

    @property
    def alive(self) -> frozenset[int]:
        """Who is not known to be lost."""
        return self._members - self.view

    @property
    def finished(self) -> bool:
        """Whether every layer is decided."""
        return not self._undecided

    def status(self, layer: int) -> Status:
        """Of a layer, here."""
        return Status(self.statuses[self._index[layer]])

    def ready(self, layer: int) -> None:
        """All rows of the layer are here and verified: from now on the group decides."""
        if self.status(layer) is Status.WORKING:
            self.statuses[self._index[layer]] = Status.READY
            self._decide([layer])

    def give_up(self, layer: int, why: str) -> None:
        """This member cannot have the layer; then nobody commits it. Only before it was ready."""
        if self.status(layer) is Status.WORKING:
            self._close(layer, False, why)

    def lose(self, member: int) -> None:
        """A member is lost for the rest of the cycle, whatever it says later."""
        if member not in self.view and member != self._me:
            self._see(self.view | {member})

    def hear(self, member: int, view: Iterable[int], statuses: bytes) -> None:
        """What another member reported."""
        seen = frozenset(view) & self._members
        if member not in self.alive or member == self._me or len(statuses) != len(self._layers):
            return
        if self._me in seen:
            self.excluded_by = member
            return
        before = self._heard.get(member)
        if before is not None and (not before[0] <= seen or any(map(lt, statuses, before[1]))):
            return  # it said more already: this was under way for longer
        self._heard[member] = (seen, statuses)
        if not seen <= self.view:
            self._see(self.view | seen)
        self._decide(list(self._undecided))

    def abandon(self, why: str) -> None:
        """Decide what is left without the others, who have gone on without this member: nothing of it commits here."""
        for layer in sorted(self._undecided):
            self._close(layer, False, why)

    def decisions(self) -> list[Decision]:
        """What was decided since the last call."""
        made, self._decisions = self._decisions, []
        return made

    def waiting_for(self) -> frozenset[int]:
        """Members without whose word the layers for which this one is ready cannot be decided."""
        pending = [self._index[layer] for layer in self._undecided if self.status(layer) is Status.READY]
        return frozenset(member for member in self.alive - {self._me} if pending and not self._says(member, pending))

    # -- inside

    def _see(self, view: frozenset[int]) -> None:
        self.view = view
        self._decide(list(self._undecided))

    def _says(self, member: int, ready: Iterable[int]) -> bool:
        """Whether a member's last word is of this very view, and it has these layers."""
        heard = self._heard.get(member)
        return heard is not None and heard[0] == self.view and all(heard[1][index] for index in ready)

    def _decide(self, layers: list[int]) -> None:
        others = self.alive - {self._me}
        for layer in sorted(layers):
            index = self._index[layer]
            said = [self._heard[member][1][index] for member in others if member in self._heard]
            if Status.ABORTED in said:
                self._close(layer, False, "another member gave it up")
            elif self.statuses[index] != Status.READY:
                continue
            elif Status.COMMITTED in said:
                self._close(layer, True)
            elif all(self._says(member, [index]) for member in others):
                if self._survivable(layer, self.view):
                    self._close(layer, True)
                else:
                    self._close(layer, False, "without the lost members, experts would be lost with it")

    def _close(self, layer: int, commit: bool, why: str = "") -> None:
        if layer in self._undecided:
            self._undecided.remove(layer)
            self.statuses[self._index[layer]] = Status.COMMITTED if commit else Status.ABORTED
            self._decisions.append(Decision(layer, commit, why))
