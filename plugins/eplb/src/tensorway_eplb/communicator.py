"""The simple face of a session, `EplbCommunicator`: for engines that say row by row what is to move, layer by layer.

May import the core and its own dist. What an engine adds is collected, and moved by `execute` in one fetch for each
member; rows that are not staging rows are copied from staging when they are here. Before a row moves, both ends have
said which experts these are: what one adds and the other does not is an error, and never another expert's bytes.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Final

import attrs
import msgspec
import numpy as np

from tensorway.decoding import UNREADABLE
from tensorway.eplb import (
    ExpertLayout,
    Failed,
    Fetch,
    Filled,
    Group,
    PeerFailed,
    Reservation,
    Send,
    Served,
    Session,
    Staging,
)
from tensorway.eplb.contract import Control, Event
from tensorway.errors import (
    Closed,
    DeadlineExceeded,
    ExpertLost,
    MemoryInvalid,
    PeerLost,
    PlacementInvalid,
    TensorwayError,
    TransferFailed,
    Unsupported,
)
from tensorway.memory import Region
from tensorway_eplb.control import StoreControl
from tensorway_eplb.cycle import settle_event
from tensorway_eplb.placement import Map
from tensorway_eplb.rows import Copy, copy_on_host

_LOOK: Final = 1e-3
#: How often who is waited for is told so: that it may read, or that there is nothing new.
_AGAIN: Final = 0.25
_TELLING: Final = 0.05
#: The others are told of a failure for so long at most.
_FAREWELL: Final = 0.5
#: A transfer may fail before it is known that its peer is gone: so long is waited for that.
_GRACE: Final = 0.5
_WHY: Final = 300


class _Word(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """All that a member has to say to another: so one word that overwrites another takes nothing back."""

    epoch: int
    #: The batch that it is in, the layer of that, and the experts that the other may read, sorted.
    batch: int
    layer: int
    offered: list[int]
    #: The last batch in which it has read what the other offered.
    read: int
    #: The last batch that it gave up, and why.
    failed: int
    why: str
    #: Ranks without which it does not go on.
    lost: list[int]


_DECODE_WORD: Final = msgspec.msgpack.Decoder(_Word).decode


@attrs.define(eq=False)
class _Rows:
    """Experts that go to one member, or come from it: their slots there, and where they are wanted here."""

    experts: list[int] = attrs.field(factory=list)
    slots: list[int] = attrs.field(factory=list)
    targets: list[list[Region]] = attrs.field(factory=list)

    def sorted(self) -> _Rows:
        """By expert: engines may add in another order at each end."""
        order = sorted(range(len(self.experts)), key=lambda index: self.experts[index])
        targets = [self.targets[index] for index in order] if self.targets else []
        return _Rows([self.experts[index] for index in order], [self.slots[index] for index in order], targets)


@attrs.define(eq=False)
class _Batch:
    """What one `execute` moves, and what is still missing of it; all by rank."""

    number: int
    layer: int
    sends: dict[int, _Rows]
    wanted: dict[int, _Rows]
    served: dict[int, Send] = attrs.field(factory=dict)
    fetches: dict[int, Fetch] = attrs.field(factory=dict)
    #: Members that have not said yet what may be read.
    waiting: set[int] = attrs.field(factory=set)
    under_way: set[Fetch] = attrs.field(factory=set)
    #: Members that have not read yet, and those that could not be told that their rows were.
    unread: set[int] = attrs.field(factory=set)
    untold: set[int] = attrs.field(factory=set)
    #: A transfer that failed, and when.
    trouble: tuple[TransferFailed, float] | None = None

    @property
    def missing(self) -> set[int]:
        """Ranks without which it is not done."""
        return self.waiting | self.unread | self.untold | {fetch.peer for fetch in self.under_way}


class Communicator:
    """See `tensorway.eplb.contract.EplbCommunicator`. One thread at a time uses it.

    Every member calls `execute` as often as the others. A member whose rows are wanted (`add_send`) is in it until all
    have them: after it, its rows may be overwritten. What fails at one member fails at all that are still in it.
    """

    def __init__(
        self, session: Session, control: Control, group: Group, layout: ExpertLayout, staging: Staging,
        *, copy: Copy | None = None, reservation: Reservation | None = None,
    ) -> None:  # fmt: skip
        """Over a session of these very things, which is closed with it.

        `control` is the session's own, or a `StoreControl`. `reservation` is what the communicator says that it takes.
        """
        if copy is None and not layout.host_visible:
            asked, true = "Experts on an accelerator were to be moved.", "No function was given that copies there."
            raise Unsupported(asked, true, "Give copy=: a function of two regions, target and source.")
        self._session, self._control, self._group = session, control, group
        self._layout, self._staging, self._copy = layout, staging, copy or copy_on_host
        self._reservation = reservation or _registered(session, layout, staging)
        self._both = session.capabilities.initiator == "both"
        self._old: Map | None = None
        self._layer, self._closed = 0, False
        self._stream: Any = None
        self._sends: dict[int, _Rows] = {}
        self._wanted: dict[int, _Rows] = {}
        self._enter(group)

    def _enter(self, group: Group) -> None:
        self._group = group
        self._batch = _Batch(0, 0, {}, {})
        self._failed, self._why = 0, ""
        #: The last batch in which rows of a member were read, what each has said last, and who is lost and why.
        self._read: dict[int, int] = {}
        self._heard: dict[int, _Word] = {}
        self._lost: dict[int, str] = {}
        #: Whether somebody who is lost was missed, here or elsewhere: who ends when its part is done is not.
        self._broken = False

    @property
    def needs_profile_buffer_reservation(self) -> bool:
        """Whether the first use allocates."""
        return self._reservation.warmup

    def reserve(self) -> Reservation:
        """The memory that it takes, in numbers."""
        return self._reservation

    def set_stream(self, stream: Any) -> None:
        """The stream on which rows were computed: `execute` waits for it before anybody reads them."""
        self._stream = stream

    def set_transfer_context(self, old_indices: Any, layer: int) -> None:
        """Which logical expert each slot of the group holds in this layer now."""
        if self._sends or self._wanted:
            asked, true = f"The context was to become layer {layer}.", f"Rows of layer {self._layer} are not moved yet."
            raise MemoryInvalid(asked, true, "Call execute first.")
        row = np.asarray(old_indices.tolist() if hasattr(old_indices, "tolist") else old_indices)
        slots = len(self._group.members) * self._layout.slots
        if row.shape != (slots,) or row.dtype.kind not in "iu" or not 0 <= layer < len(self._layout.layers):
            raise MemoryInvalid(
                f"The context was to become layer {layer}.",
                f"{slots} whole numbers are needed, for a layer below {len(self._layout.layers)}; got {row.shape}.",
                "Give the physical-to-logical map of the whole group.",
            )
        self._old, self._layer = row.astype(np.int32), int(layer)

    def add_send(self, tensors: Sequence[Any], dst_rank: int, expert_id: int) -> None:
        """Let a rank have the rows of an expert that this one holds."""
        peer, slot = self._peer(dst_rank), self._slot(self._group.me, expert_id)
        rows = self._sends.setdefault(peer, _Rows())
        rows.experts.append(int(expert_id))
        rows.slots.append(slot)

    def add_recv(self, tensors: Sequence[Any], src_rank: int, expert_id: int) -> None:
        """Bring an expert's rows from a rank into these buffers: one for each tensor, in the layout's order."""
        peer, slot = self._peer(src_rank), self._slot(src_rank, expert_id)
        targets = [Region.of(tensor) for tensor in tensors]
        given = [(target.nbytes, target.device) for target in targets]
        rows = [(tensor.row_bytes, tensor.region.device) for tensor in self._layout.layers[self._layer]]
        if given != rows:
            raise MemoryInvalid(
                f"Expert {expert_id} was to be received into {len(targets)} buffers.",
                f"They have (bytes, device) {given}; its tensors have {rows}.",
                "Give one buffer for each tensor, in the order of their names.",
            )
        wanted = self._wanted.setdefault(peer, _Rows())
        wanted.experts.append(int(expert_id))
        wanted.slots.append(slot)
        wanted.targets.append(targets)

    def execute(self, deadline: float = 30.0) -> None:
        """Move all that was added; see the contract. After `PeerLost` it is raised at once until `regroup`."""
        self._open()
        until = time.monotonic() + deadline
        sends, wanted = ({peer: rows.sorted() for peer, rows in all.items()} for all in (self._sends, self._wanted))
        self._sends, self._wanted = {}, {}
        self._batch = batch = _Batch(self._batch.number + 1, self._layer, sends, wanted)
        lease = None
        try:
            self._settle()
            self._check_lost(set())
            if self._stream is not None:
                self._stream.synchronize()
            lease = self._staging.lease(batch.layer, sum(len(rows.slots) for rows in wanted.values()))
            self._begin(batch, list(lease.rows), until)
            self._move(batch, until)
        except BaseException as error:
            if lease is not None:
                lease.quarantine(row for fetch in batch.under_way for row in fetch.rows)
            self._give_up(batch, error)
            raise
        finally:
            if lease is not None:
                lease.release()

    def regroup(self, group: Group, deadline: float = 30.0) -> None:
        """Go on with these members, on all of them; what was added and not moved is forgotten."""
        self._open()
        self._session.regroup(group, deadline)
        if isinstance(self._control, StoreControl):
            self._control.regroup(group)
        self._sends, self._wanted, self._old = {}, {}, None
        self._settle()
        self._enter(group)

    def close(self) -> None:
        """End; the second call does nothing."""
        if not self._closed:
            self._closed = True
            self._session.close()
            if isinstance(self._control, StoreControl):
                self._control.close()

    # -- one batch

    def _begin(self, batch: _Batch, rows: list[int], until: float) -> None:
        for peer, wanted in batch.wanted.items():
            mine, rows = rows[: len(wanted.slots)], rows[len(wanted.slots) :]
            batch.fetches[peer] = Fetch(
                batch.layer, peer, array("q", wanted.slots), array("q", mine), batch.number, attempt=1
            )
        for peer, sent in batch.sends.items():
            batch.served[peer] = Send(batch.layer, peer, array("q", sent.slots), batch.number)
        batch.waiting, batch.unread = set(batch.fetches), set(batch.served)
        # Where both sides start a move, the end of a member is seen by what is under way with it: so something is.
        none, both = array("q"), self._both
        signs = [Fetch(batch.layer, peer, none, none, batch.number) for peer in batch.fetches if both]
        answers = [Send(batch.layer, peer, none, batch.number) for peer in batch.served if both]
        sends = [*answers, *batch.served.values()]
        self._session.begin(batch.number, [*signs, *batch.fetches.values()], sends)
        for fetch in signs:
            self._session.post(fetch, until - time.monotonic())
        for send in sends:
            self._session.serve(send, until - time.monotonic())

    def _move(self, batch: _Batch, until: float) -> None:
        told = float("-inf")
        while missing := batch.missing:
            now = time.monotonic()
            if batch.trouble is not None and now >= min(batch.trouble[1] + _GRACE, until):
                raise batch.trouble[0]
            if now >= until:
                raise self._late(batch, missing)
            if now - told >= _AGAIN:
                told = now
                for peer in missing:  # also whose rows are waited for: a fabric may see only so that it is gone
                    self._say(peer)
            for event in self._session.poll(_LOOK):
                self._saw(event, batch)
            self._hear()
            self._check_lost(batch.missing)
            for peer, word in self._heard.items():
                self._heed(peer, word, batch, until)

    def _saw(self, event: Event, batch: _Batch) -> None:
        settle_event(event, self._staging)
        if isinstance(event, PeerFailed):
            self._lost.setdefault(event.peer, event.why)
        elif isinstance(event, Served) and event.send is batch.served.get(event.send.peer):
            batch.unread.discard(event.send.peer)
        elif isinstance(event, Failed) and event.fetch in batch.under_way:
            if event.released:
                batch.under_way.remove(event.fetch)
            asked = f"{len(event.fetch.rows)} experts of layer {batch.layer} were to be brought from "
            asked += f"{self._group.members[event.fetch.peer]}."
            error = TransferFailed(asked, event.why, "Regroup if the member is gone; else try the layer again.")
            batch.trouble = batch.trouble or (error, time.monotonic())
            batch.waiting.add(event.fetch.peer)  # not done with it, and never will be
        elif isinstance(event, Filled) and event.fetch in batch.under_way:
            batch.under_way.remove(event.fetch)
            self._deliver(batch, event.fetch)

    def _deliver(self, batch: _Batch, fetch: Fetch) -> None:
        self._read[fetch.peer] = batch.number
        batch.untold.add(fetch.peer)
        self._say(fetch.peer)
        for row, targets in zip(fetch.rows, batch.wanted[fetch.peer].targets, strict=True):
            for tensor, target in zip(self._layout.layers[batch.layer], targets, strict=True):
                self._copy(target, self._staging.row(tensor.kind, row))

    def _give_up(self, batch: _Batch, error: BaseException) -> None:
        """What is under way ends, and the others are told: nobody waits for this member until the deadline."""
        self._failed = batch.number
        self._why = (error.true if isinstance(error, TensorwayError) else f"{type(error).__name__}: {error}")[:_WHY]
        self._session.cancel(list(batch.under_way), "its batch failed")
        self._settle()
        batch.sends = {}
        until = time.monotonic() + _FAREWELL
        for peer in self._group.others:
            if peer not in self._lost and time.monotonic() < until:
                self._say(peer)

    def _settle(self) -> None:
        """What is over of earlier batches: their rows are free."""
        for event in self._session.poll(0.0):
            self._saw(event, self._batch)

    # -- members

    def _hear(self) -> None:
        for peer, payload in self._control.receive():
            try:
                word = _DECODE_WORD(payload)
            except UNREADABLE:
                continue  # what is no word of ours costs nobody anything
            if word.epoch != self._group.epoch:
                continue
            self._heard[peer] = word
            for rank in set(word.lost).intersection(self._group.others):
                self._lost.setdefault(rank, f"{self._group.members[peer]} says so")
                self._broken = True
            if word.offered and word.batch < self._batch.number:  # it waits in a batch that is over here
                read = self._read.get(peer, 0) >= word.batch
                self._say(peer, None if read or self._failed == word.batch else word.batch)

    def _heed(self, peer: int, word: _Word, batch: _Batch, until: float) -> None:
        """Do what the last word of a member allows in this batch."""
        name = self._group.members[peer]
        asked = f"Layer {batch.layer} was to be moved, as batch {batch.number}."
        if word.failed == batch.number:
            to_do = "See what it names, and try the layer again on all members."
            raise TransferFailed(asked, f"Member {name} gave the batch up: {word.why}", to_do)
        if word.read == batch.number:
            batch.unread.discard(peer)
        if peer not in batch.waiting or word.batch != batch.number or not word.offered or batch.trouble is not None:
            return
        if (word.layer, word.offered) != (batch.layer, batch.wanted[peer].experts):
            raise PlacementInvalid(
                asked,
                f"Member {name} sends experts {word.offered} of layer {word.layer}; "
                f"{batch.wanted[peer].experts} of layer {batch.layer} were to be received from it.",
                "Give every rank the same old and new placement, and call execute once for each layer everywhere.",
            )
        batch.waiting.remove(peer)
        fetch = batch.fetches[peer]
        batch.under_way.add(fetch)
        # Longer than ours: whose rows are missing at the deadline is said here, and not by the fabric.
        self._session.post(fetch, until - time.monotonic() + 2 * _GRACE)

    def _say(self, peer: int, refused: int | None = None) -> None:
        """All there is to say to a member; with `refused`, that nobody here reads what it offers in that batch."""
        batch, failed, why = self._batch, self._failed, self._why
        if refused is not None:
            failed, why = refused, "it did not add what would be received"
        offered = batch.sends[peer].experts if peer in batch.sends else []
        word = _Word(
            self._group.epoch, batch.number, batch.layer, offered, self._read.get(peer, 0), failed, why,
            sorted(self._lost) if self._broken else [],
        )  # fmt: skip
        try:
            self._control.send(peer, msgspec.msgpack.encode(word), _TELLING)
            batch.untold.discard(peer)
        except DeadlineExceeded:
            pass  # it is said again, for as long as this batch lasts
        except PeerLost as error:
            self._lost.setdefault(peer, error.true)

    def _slot(self, rank: int, expert: int) -> int:
        first = rank * self._layout.slots
        row = self._old if self._old is not None else np.zeros(0, dtype=np.int32)
        held = np.flatnonzero(row[first : first + self._layout.slots] == expert)
        if not len(held):
            asked = f"Expert {expert} of layer {self._layer} was to come from rank {rank}."
            true = "That rank does not hold it, by the context that was set."
            raise ExpertLost(asked, true, "Call set_transfer_context with the map before the move.")
        return int(held[0])

    def _peer(self, rank: int) -> int:
        self._open()
        if rank not in self._group.others:
            raise MemoryInvalid(
                f"Rows were to be moved with rank {rank}.",
                f"Other ranks of this group are {list(self._group.others)}.",
                "Give ranks of the group, not global ones.",
            )
        return int(rank)

    def _late(self, batch: _Batch, missing: Iterable[int]) -> DeadlineExceeded:
        names = ", ".join(self._group.members[rank] for rank in sorted(missing))
        return DeadlineExceeded(
            f"Layer {batch.layer} was to be moved.",
            f"It is not done by the deadline with {names}.",
            "See whether they run; regroup without them if not.",
        )

    def _check_lost(self, missing: set[int]) -> None:
        if self._broken or not missing.isdisjoint(self._lost):
            self._broken = True
            names = "; ".join(f"{self._group.members[rank]} ({why})" for rank, why in sorted(self._lost.items()))
            raise PeerLost(
                f"Layer {self._layer} was to be moved.", f"Lost: {names}.", "Call regroup() on all that are left."
            )

    def _open(self) -> None:
        if self._closed:
            raise Closed("A communicator was used.", "It is closed.", "Make another.")


def _registered(session: Session, layout: ExpertLayout, staging: Staging) -> Reservation:
    """What it takes to read rows where they lie: no buffers, but all of the memory is registered."""
    regions = {(tensor.region.address, tensor.region.nbytes) for layer in layout.layers for tensor in layer}
    registered = len(regions) + len(staging.regions) if session.capabilities.initiator == "receiver" else 0
    return Reservation(registrations=registered)
