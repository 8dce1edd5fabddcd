"""The simple face of a session, `EplbCommunicator`: for engines that say row by row what is to move, layer by layer.

May import the core and its own dist. What an engine adds is collected, and moved by `execute` in one fetch for each
member; rows that are not staging rows are copied from staging when they are here.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from typing import Any, Final

import attrs
import msgspec
import numpy as np

from tensorway.eplb import (
    ExpertLayout,
    Failed,
    Fetch,
    Filled,
    Group,
    PeerFailed,
    Reservation,
    Send,
    Session,
    Staging,
)
from tensorway.eplb.contract import Control
from tensorway.errors import Closed, DeadlineExceeded, ExpertLost, MemoryInvalid, PeerLost, TransferFailed
from tensorway.memory import Region
from tensorway_eplb.cycle import settle_event
from tensorway_eplb.placement import Map
from tensorway_eplb.rows import Copy, copy_on_host

_LOOK: Final = 1e-3
#: How often who reads from here is told that it may, until it has said that it is done.
_AGAIN: Final = 0.25
_TELLING: Final = 0.05


class _Word(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What members say to each other about one batch: my rows may be read; I have read yours."""

    epoch: int
    batch: int
    read: bool


@attrs.define(eq=False)
class _Wanted:
    """Rows that an engine wants from one member."""

    slots: list[int] = attrs.field(factory=list)
    targets: list[list[Region]] = attrs.field(factory=list)


class Communicator:
    """See `tensorway.eplb.contract.EplbCommunicator`. One thread at a time uses it.

    Every member calls `execute` as often as the others. A member whose rows are wanted (`add_send`) is in it until all
    have them: after it, its rows may be overwritten.
    """

    def __init__(
        self, session: Session, control: Control, group: Group, layout: ExpertLayout, staging: Staging,
        *, copy: Copy | None = None, reservation: Reservation | None = None,
    ) -> None:  # fmt: skip
        self._session, self._control, self._group = session, control, group
        self._layout, self._staging, self._copy = layout, staging, copy or copy_on_host
        self._reservation = reservation or Reservation()
        self._old: Map | None = None
        self._layer, self._batch, self._closed = 0, 0, False
        self._stream: Any = None
        self._sends: dict[int, list[int]] = {}
        self._wanted: dict[int, _Wanted] = {}
        self._ready: set[tuple[int, int]] = set()
        self._served: set[tuple[int, int]] = set()

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
            raise MemoryInvalid(
                f"The context was to become layer {layer}.",
                f"Rows of layer {self._layer} were added and not moved.",
                "Call execute first.",
            )
        row = np.asarray(old_indices.tolist() if hasattr(old_indices, "tolist") else old_indices)
        slots = len(self._group.members) * self._layout.slots
        if row.shape != (slots,) or row.dtype.kind not in "iu" or not 0 <= layer < len(self._layout.layers):
            raise MemoryInvalid(
                f"The context was to become layer {layer}.",
                f"{slots} whole numbers are needed, for a layer below {len(self._layout.layers)}; got {row.shape}.",
                "Give the physical-to-logical map of the whole group.",
            )
        self._old, self._layer = row.astype(np.int32), layer

    def add_send(self, tensors: Sequence[Any], dst_rank: int, expert_id: int) -> None:
        """Let a rank have the rows of an expert that this one holds."""
        self._sends.setdefault(self._peer(dst_rank), []).append(self._slot(self._group.me, expert_id))

    def add_recv(self, tensors: Sequence[Any], src_rank: int, expert_id: int) -> None:
        """Bring an expert's rows from a rank into these buffers: one for each tensor, in the layout's order."""
        targets = [Region.of(tensor) for tensor in tensors]
        lengths = [tensor.row_bytes for tensor in self._layout.layers[self._layer]]
        if [target.nbytes for target in targets] != lengths:
            raise MemoryInvalid(
                f"Expert {expert_id} was to be received into {len(targets)} buffers.",
                f"They have {[target.nbytes for target in targets]} bytes; its tensors have {lengths}.",
                "Give one buffer for each tensor, in the order of their names.",
            )
        wanted = self._wanted.setdefault(self._peer(src_rank), _Wanted())
        wanted.slots.append(self._slot(src_rank, expert_id))
        wanted.targets.append(targets)

    def execute(self, deadline: float = 30.0) -> None:
        """Move all that was added; see the contract."""
        self._open()
        until = time.monotonic() + deadline
        if self._stream is not None:
            self._stream.synchronize()
        self._batch += 1
        sends, wanted = self._sends, self._wanted
        self._sends, self._wanted = {}, {}
        lease = self._staging.lease(self._layer, sum(len(rows.slots) for rows in wanted.values()))
        fetches: dict[Fetch, int] = {}
        try:
            self._move(sends, wanted, list(lease.rows), fetches, until)
        except BaseException:
            lease.quarantine(row for fetch in fetches for row in fetch.rows)
            self._session.cancel(list(fetches), "its batch failed")
            raise
        finally:
            lease.release()

    def close(self) -> None:
        """End; the second call does nothing."""
        if not self._closed:
            self._closed = True
            self._session.close()

    # -- inside

    def _move(
        self, sends: dict[int, list[int]], wanted: dict[int, _Wanted], rows: list[int], fetches: dict[Fetch, int],
        until: float,
    ) -> None:  # fmt: skip
        for peer, slots in sends.items():
            self._session.serve(Send(self._layer, peer, array("q", slots), self._batch), until - time.monotonic())
        waiting, unread, told = dict(wanted), set(sends), 0.0
        both = self._session.capabilities.initiator == "both"
        while waiting or fetches or unread:
            if (now := time.monotonic()) >= until:
                raise self._late(set(waiting) | set(fetches.values()) | unread)
            if now - told > _AGAIN:
                told = now
                for peer in unread:
                    self._say(peer, read=False)
            for peer in [peer for peer in waiting if both or (peer, self._batch) in self._ready]:
                mine, rows = rows[: len(waiting[peer].slots)], rows[len(waiting[peer].slots) :]
                fetch = Fetch(self._layer, peer, array("q", waiting.pop(peer).slots), array("q", mine), self._batch)
                fetches[fetch] = peer
                self._session.post(fetch, until - time.monotonic())
            for event in self._session.poll(_LOOK):
                self._saw(event, wanted, fetches)
            self._hear()
            unread = {peer for peer in unread if (peer, self._batch) not in self._served}
        self._ready = {word for word in self._ready if word[1] > self._batch}
        self._served = {word for word in self._served if word[1] > self._batch}

    def _saw(self, event: Any, wanted: dict[int, _Wanted], fetches: dict[Fetch, int]) -> None:
        if isinstance(event, PeerFailed):
            name = self._group.members[event.peer]
            raise PeerLost.because(f"Layer {self._layer} was to be moved; member {name} takes part.", event.why)
        settle_event(event, self._staging)
        if isinstance(event, Failed) and event.fetch in fetches:
            del fetches[event.fetch]
            rows, peer = len(event.fetch.rows), event.fetch.peer
            asked = f"{rows} experts of layer {self._layer} were to be brought from rank {peer}."
            raise TransferFailed(asked, event.why, "Regroup if the member is gone; else try the layer again.")
        if isinstance(event, Filled) and event.fetch in fetches:
            peer = fetches.pop(event.fetch)
            for row, targets in zip(event.fetch.rows, wanted[peer].targets, strict=True):
                for tensor, target in zip(self._layout.layers[self._layer], targets, strict=True):
                    kind = (tensor.name, tensor.row_bytes, tensor.region.device)
                    self._copy(target, self._staging.row(kind, row))
            self._say(peer, read=True)

    def _hear(self) -> None:
        for peer, payload in self._control.receive():
            try:
                word = msgspec.msgpack.decode(payload, type=_Word)
            except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
                continue  # what is no word of ours costs nobody anything
            if word.epoch != self._group.epoch:
                continue
            if word.read:
                self._served.add((peer, word.batch))
            elif word.batch < self._batch:
                self._say(peer, read=True, batch=word.batch)  # it did not hear that we had done with it
            else:
                self._ready.add((peer, word.batch))

    def _say(self, peer: int, *, read: bool, batch: int | None = None) -> None:
        word = _Word(self._group.epoch, self._batch if batch is None else batch, read)
        try:
            self._control.send(peer, msgspec.msgpack.encode(word), _TELLING)
        except DeadlineExceeded:
            pass  # it is said again

    def _slot(self, rank: int, expert: int) -> int:
        self._open()
        first = rank * self._layout.slots
        row = self._old if self._old is not None else np.zeros(0, dtype=np.int32)
        held = np.flatnonzero(row[first : first + self._layout.slots] == expert)
        if not len(held):
            raise ExpertLost(
                f"Expert {expert} of layer {self._layer} was to come from rank {rank}.",
                "That rank does not hold it, by the context that was set.",
                "Call set_transfer_context with the map before the move.",
            )
        return int(held[0])

    def _peer(self, rank: int) -> int:
        if rank not in self._group.others:
            raise MemoryInvalid(
                f"Rows were to be moved with rank {rank}.",
                f"Other ranks of this group are {list(self._group.others)}.",
                "Give ranks of the group, not global ones.",
            )
        return rank

    def _late(self, missing: set[int]) -> DeadlineExceeded:
        names = ", ".join(self._group.members[rank] for rank in sorted(missing))
        return DeadlineExceeded(
            f"Layer {self._layer} was to be moved.",
            f"It is not done by the deadline with {names}.",
            "See whether they run; regroup without them if not.",
        )

    def _open(self) -> None:
        if self._closed:
            raise Closed("A communicator was used.", "It is closed.", "Make another.")
