"""Who is in the group, and what each of them truly holds: told through the rendezvous, and decided there once.

May import the core and its own dist. After a failure nobody trusts a map: every member says what is in its slots, and
the placement is put together from that. A record that only one can create decides who goes on; who is not in it is out.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Sequence
from typing import Final

import attrs
import msgspec
import numpy as np

from tensorway.decoding import UNREADABLE
from tensorway.eplb import Group
from tensorway.errors import DeadlineExceeded, DescriptionInvalid, Excluded, Incompatible, RecordRefused, Unsupported
from tensorway.rendezvous import Rendezvous
from tensorway_eplb.placement import EMPTY, Map, Placement
from tensorway_eplb.records import OwnRecords
from tensorway_eplb.rows import UNKNOWN, Digests

#: Between two looks at what others say.
_PAUSE: Final = 0.01
#: Epochs whose decision is kept, for members that are slow.
_KEPT: Final = 8
#: Ranks and experts that an error names.
_NAMED: Final = 5


class _Held(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a member has in its slots: 32-bit experts and 64-bit digests, [layers, slots], lowest byte first."""

    life: str
    layers: int
    slots: int
    experts: bytes
    digests: bytes


_DECODE_HELD: Final = msgspec.msgpack.Decoder(_Held).decode


class _Next(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The members of an epoch."""

    run: str
    epoch: int
    members: list[str]


_DECODE_NEXT: Final = msgspec.msgpack.Decoder(_Next).decode


@attrs.frozen(eq=False)
class Truth:
    """What all members hold, put together."""

    group: Group
    placement: Placement
    digests: Digests


class Membership:
    """One member's place in a group, over its epochs."""

    def __init__(self, rendezvous: Rendezvous, group: Group, num_logical: int) -> None:
        for ability in ("lease", "compare"):
            if ability not in rendezvous.abilities:
                raise Unsupported(
                    f"A group of experts was to meet in the rendezvous {rendezvous.name}.",
                    f"It has no {ability}, without which nobody decides who goes on after a loss.",
                    "Use direct, etcd or redis.",
                )
        self.group = group
        self._rendezvous, self._num_logical = rendezvous, num_logical
        self._life = uuid.uuid4().hex
        #: Which start of the group this is; epochs of another mean nothing.
        self._run = "start"
        self._records = OwnRecords(rendezvous)

    def exchange(self, held: Map, digests: Digests, deadline: float) -> Truth:
        """Say what is in our slots, and learn what is in all others; [layers, slots] each. Waits for all members."""
        until, group = time.monotonic() + deadline, self.group
        said = _Held(
            self._life, held.shape[0], held.shape[1], held.astype("<i4").tobytes(), digests.astype("<u8").tobytes()
        )
        prefix = f"{group.path}/{self._run}/held/{group.epoch}"
        self._put(f"{prefix}/{group.name}", msgspec.msgpack.encode(said), until)
        found = self._read_all(prefix, held.shape, until)
        if self._run == "start":
            found = self._one_start(prefix, found, until)
        self._put(f"{group.path}/{self._run}/here/{group.name}", b"", until)
        experts = np.concatenate([np.frombuffer(each.experts, "<i4").reshape(held.shape) for each in found], axis=1)
        placement = Placement(experts.astype(np.int32), self._num_logical, len(found), group.epoch)
        seen = np.concatenate([np.frombuffer(each.digests, "<u8").reshape(held.shape) for each in found], axis=1)
        return Truth(group, placement, self._one_table(placement, seen.astype(np.uint64)))

    def regroup(self, members: Sequence[str] | None, lost: Sequence[str], deadline: float) -> Group:
        """The next epoch: as somebody decided already, else with these members (all that are not lost, if None).

        Raises `Excluded` when the others decided to go on without this one.
        """
        until, old = time.monotonic() + deadline, self.group
        epoch = old.epoch + 1
        wanted = tuple(members) if members is not None else tuple(name for name in old.members if name not in lost)
        if old.name not in wanted or len(set(wanted)) != len(wanted):
            raise Incompatible(
                f"Member {old.name} was to regroup.",
                f"The members of the next epoch would be {', '.join(wanted[:_NAMED])}.",
                "Name each once, and itself among them.",
            )
        key, chosen = self._epoch(epoch), _Next(self._run, epoch, list(wanted))
        try:
            # Without a lease: a decision holds when who made it is dead.
            self._rendezvous.put(key, msgspec.msgpack.encode(chosen), expected=0, deadline=deadline)
        except RecordRefused:  # another was faster
            chosen = _decoded(key, self._rendezvous.wait(key, max(1e-3, until - time.monotonic())).value)
        if old.name not in chosen.members:
            raise Excluded(
                f"Member {old.name} was to be of epoch {epoch} of {old.path}.",
                f"Its members are {', '.join(chosen.members)}: they held this one for lost.",
                "Start this member anew; the others invite it by regroup(members=...).",
            )
        for name in set(chosen.members) - (set(old.members) - set(lost)):
            self._put(f"{old.path}/invited/{name}", msgspec.msgpack.encode(chosen), until)
        if epoch > _KEPT:
            self._rendezvous.delete(self._epoch(epoch - _KEPT), deadline=max(1e-3, until - time.monotonic()))
        self.group = Group(old.path, tuple(chosen.members), chosen.members.index(old.name), epoch)
        return self.group

    def accept(self, deadline: float) -> Group:
        """For a member that comes later: wait until a group invites it, and be of it."""
        until, key = time.monotonic() + deadline, f"{self.group.path}/invited/{self.group.name}"
        while True:
            record = self._rendezvous.wait(key, max(1e-3, until - time.monotonic()))
            chosen = _decoded(key, record.value)
            if self.group.name not in chosen.members:
                raise DescriptionInvalid(f"The record {key} was read.", "It invites somebody else.", "Regroup again.")
            if self._counts(chosen, until):
                break
            time.sleep(_PAUSE)
        self._run = chosen.run
        members = tuple(chosen.members)
        self.group = Group(self.group.path, members, members.index(self.group.name), chosen.epoch)
        return self.group

    def close(self) -> None:
        """Take back what was said."""
        self._records.close()
        if self._run != "start" and not self._rendezvous.list(f"{self.group.path}/{self._run}/here/"):
            for record in self._rendezvous.list(f"{self.group.path}/{self._run}/epochs/"):  # the last one cleans up
                self._rendezvous.delete(record.key)

    def _epoch(self, number: int) -> str:
        return f"{self.group.path}/{self._run}/epochs/{number}"

    def _put(self, key: str, value: bytes, until: float, expected: int | None = None) -> None:
        """Write a record that ends with this member."""
        self._records.put(key, value, max(1e-3, until - time.monotonic()), expected)

    def _read_all(self, prefix: str, shape: tuple[int, ...], until: float) -> list[_Held]:
        return [
            self._checked(
                name, self._rendezvous.wait(f"{prefix}/{name}", max(1e-3, until - time.monotonic())).value, shape
            )
            for name in self.group.members
        ]

    def _one_start(self, prefix: str, found: list[_Held], until: float) -> list[_Held]:
        """What all members say in the life that they have now.

        What a killed life said lasts as long as its lease. So each member says whose lives it has read, its own among
        them, and goes on when all say the same: nobody who is dead has read of a life that came later.
        """
        group, shape = self.group, (found[0].layers, found[0].slots)
        while True:
            lives = hashlib.blake2b("".join(each.life for each in found).encode(), digest_size=8).hexdigest()
            self._put(f"{group.path}/start/seen/{group.name}", lives.encode(), until)
            seen = [self._rendezvous.get(f"{group.path}/start/seen/{name}") for name in group.members]
            if all(record is not None and record.value == lives.encode() for record in seen):
                self._run = lives
                return found
            if time.monotonic() >= until:
                names = [
                    name
                    for name, record in zip(group.members, seen, strict=True)
                    if record is None or record.value != lives.encode()
                ]
                raise DeadlineExceeded(
                    f"The group {group.path} was to begin.",
                    f"These members did not begin with the others in time: {', '.join(names[:_NAMED])}.",
                    "Start all members at about the same time.",
                )
            time.sleep(_PAUSE)
            found = self._read_all(prefix, shape, until)

    def _counts(self, chosen: _Next, until: float) -> bool:
        """Whether an invitation is for us: nobody of our name has taken it, and its epoch is not over."""
        self._run = chosen.run
        if self._rendezvous.get(self._epoch(chosen.epoch + 1)) is not None:
            return False
        try:
            self._put(f"{self._epoch(chosen.epoch)}/{self.group.name}", b"", until, expected=0)
        except RecordRefused:
            return False
        return True

    def _checked(self, name: str, value: bytes, shape: tuple[int, ...]) -> _Held:
        asked = f"Member {name} said what it holds."
        try:
            held = _DECODE_HELD(value)
        except UNREADABLE as error:
            true = f"That cannot be read: {str(error).splitlines()[0]}"
            raise DescriptionInvalid(asked, true, "Install one version of tensorway everywhere.") from None
        rows = held.layers * held.slots
        if (held.layers, held.slots) != shape or len(held.experts) != 4 * rows or len(held.digests) != 8 * rows:
            true = f"It has {held.layers} layers of {held.slots} slots; here are {shape[0]} of {shape[1]}."
            raise Incompatible(asked, true, "Load the same model, with as many redundant experts, on every rank.")
        experts = np.frombuffer(held.experts, "<i4")
        if rows and (experts.min() < EMPTY or experts.max() >= self._num_logical):
            raise Incompatible(asked, f"It names experts beyond {self._num_logical - 1}.", "Load the same model.")
        return held

    def _one_table(self, placement: Placement, seen: Digests) -> Digests:
        """One digest for each expert, of all that hold it; raises `Incompatible` where replicas differ."""
        table = np.zeros((placement.layers, placement.num_logical), dtype=np.uint64)
        layer, slot = np.nonzero((placement.map >= 0) & (seen != UNKNOWN))
        expert = placement.map[layer, slot]
        table[layer, expert] = seen[layer, slot]
        wrong = np.flatnonzero(table[layer, expert] != seen[layer, slot])
        if len(wrong):
            first = int(wrong[0])
            where = np.flatnonzero(placement.map[layer[first]] == expert[first]) // placement.slots
            raise Incompatible(
                f"The replicas of {len(table)} layers were compared.",
                f"Expert {expert[first]} of layer {layer[first]} is not the same on ranks {sorted(set(where.tolist()))}"
                f"; {len(wrong)} replicas differ in all.",
                "Load it anew there: what derives from weights (scales) has to be loaded and moved with them.",
            )
        return table


def _decoded(key: str, value: bytes) -> _Next:
    try:
        return _DECODE_NEXT(value)
    except UNREADABLE as error:
        true = f"It names no members: {str(error).splitlines()[0]}"
        raise DescriptionInvalid(f"The record {key} was read.", true, "Install one version everywhere.") from None
