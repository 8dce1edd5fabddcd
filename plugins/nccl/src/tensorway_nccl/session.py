"""The communicator `nccl`: rows of experts from device to device, in rounds between two members at a time.

Imported by `offers` when one is constructed; imports torch if the lane is torch's. The engine's thread is never in a
call of NCCL: `driver` has a thread, `protocol` what it does, `lanes` and what implements it the library.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import Counter
from collections.abc import Collection, Sequence
from queue import Empty, SimpleQueue
from typing import Final

from tensorway.eplb import (
    Capabilities,
    Drained,
    EplbContext,
    Event,
    ExpertLayout,
    ExpertTensor,
    Failed,
    Fetch,
    Filled,
    Group,
    PeerFailed,
    Reservation,
    Send,
    Served,
    Staging,
    check_move,
)
from tensorway.errors import BackendUnavailable, Closed, DeadlineExceeded, MemoryInvalid, PeerLost
from tensorway.platforms import report
from tensorway_nccl.driver import Driver
from tensorway_nccl.lanes import Lane, Piece
from tensorway_nccl.library import OLDEST, Nccl, find
from tensorway_nccl.messages import WARM, Key
from tensorway_nccl.options import NcclOptions
from tensorway_nccl.wires import form

#: Rows longer than this are moved in several pieces, so that a round can be short.
PIECE: Final = 16 << 20


def reserve(layout: ExpertLayout, staging: Staging) -> Reservation:
    """Rows have no buffers of ours, but NCCL has, for each member: `warmup` makes it take them."""
    return Reservation(warmup=True)


class NcclSession:
    """See `tensorway.eplb.Session`. Nothing is put on a device before both ends of a move have said that it may be."""

    control = None

    def __init__(self, options: NcclOptions, context: EplbContext, lane: Lane | None = None) -> None:
        """`lane` is for tests: another library than the one that the options name."""
        self._options = options
        self._context = context
        self._lane = lane or chosen(options, context.layout)
        self._check_memory()
        self.capabilities = Capabilities(devices=self._lane.devices, initiator="both", regroup=True)
        self._pid = os.getpid()
        self._arrived: SimpleQueue[Event] = SimpleQueue()
        #: What a warmup has heard that was not its own.
        self._heard: list[Event] = []
        self._closed = False
        self._enter(context.group, self._formed(context.group, context.deadline))

    def __repr__(self) -> str:
        return f"NcclSession({self._group.path}, {self._group.name}, epoch {self._group.epoch}, {self._lane.name})"

    def _formed(self, group: Group, deadline: float) -> Driver:
        wires, self._lane.host = form(group, self._context.rendezvous, self._options, self._lane.name, deadline)
        return Driver(group, wires, self._lane, self._options.timeout_s, self._arrived)

    def _enter(self, group: Group, driver: Driver) -> None:
        self._group = group
        self._driver = driver
        self._turns: Counter[tuple[bool, int, int, int]] = Counter()
        # Also of who forgot to close, at the end of the process at the latest.
        self._end = weakref.finalize(self, driver.close, "The session is gone.", 2.0)

    # -- moves

    def warmup(self, deadline: float) -> None:
        """Move one byte to each other member and back, into a row that nobody has: what NCCL takes, it takes now."""
        self._check()
        until = time.monotonic() + deadline
        lease = self._context.staging.lease(layer=0, rows=1)
        try:
            self._warm(lease.rows[0], until, deadline)
        except BaseException:
            lease.quarantine(lease.rows)  # a byte may still be on its way
            raise
        finally:
            lease.release()

    def _warm(self, row: int, until: float, deadline: float) -> None:
        from array import array

        tensor = self._tensors(0)[0]
        here = self._context.staging.regions[tensor.kind]
        into = Piece(here.address + row * tensor.row_bytes, 1)
        awaited: dict[object, int] = {}
        for peer in self._group.others:
            fetch = Fetch(0, peer, array("i", [0]), array("i", [row]), -1)
            send = Send(0, peer, array("i", [0]), -1)
            awaited |= {fetch: peer, send: peer}
            self._driver.post(fetch, WARM, [into], deadline)
            self._driver.serve(send, WARM, [Piece(tensor.region.address, 1)])
        asked = f"{self._group.name} was to meet the other members of {self._group.path} over NCCL."
        while awaited:
            try:
                event = self._arrived.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                names = ", ".join(sorted({self._group.members[peer] for peer in awaited.values()}))
                true = f"Not all were there within {deadline:g} s: {names}."
                raise DeadlineExceeded(asked, true, "See that every member calls `warmup`.") from None
            subject = event.send if isinstance(event, Served) else getattr(event, "fetch", None)
            if subject not in awaited:
                self._heard.append(event)
            elif isinstance(event, Failed):
                name = self._group.members[event.fetch.peer]
                raise PeerLost(asked, f"{name}: {event.why}.", "Form the group anew without who is lost.")
            elif not isinstance(event, Drained):
                del awaited[subject]

    def begin(self, cycle: int, fetches: Sequence[Fetch], sends: Sequence[Send]) -> None:
        """Forget the turns of earlier cycles."""
        self._check()
        self._turns = Counter({key: turn for key, turn in self._turns.items() if key[2] >= cycle})
        self._driver.forget(cycle)

    def post(self, fetch: Fetch, deadline: float) -> None:
        """Ask for rows; they arrive where they are to be."""
        self._check()
        tensors, key = self._checked(fetch), self._key(fetch)
        if not fetch.slots:
            self._arrived.put(Filled(fetch))
            return
        staging, pieces = self._context.staging.regions, list[Piece]()
        for row in fetch.rows:
            for tensor in tensors:
                region = staging[tensor.kind]
                pieces += _cut(region.address + row * tensor.row_bytes, tensor.row_bytes)
        self._driver.post(fetch, key, pieces, deadline)

    def serve(self, send: Send, deadline: float) -> None:
        """Let rows be sent from where they lie: until `Served` they must stay as they are."""
        self._check()
        tensors, key = self._checked(send), self._key(send)
        if not send.slots:
            self._arrived.put(Served(send))
            return
        pieces = []
        for slot in send.slots:
            for tensor in tensors:
                pieces += _cut(tensor.region.address + slot * tensor.stride, tensor.row_bytes)
        self._driver.serve(send, key, pieces)

    def poll(self, seconds: float) -> list[Event]:
        """Wait for something to arrive; sleeps, and never spins. Also says what became of moves after `close`."""
        events, self._heard = self._heard, []
        wait = not events and not self._closed and seconds > 0
        try:
            events.append(self._arrived.get(wait, seconds if wait else None))
            while True:
                events.append(self._arrived.get_nowait())
        except Empty:
            return events

    def cancel(self, fetches: Collection[Fetch], why: str) -> None:
        """What is in no round is released; what is, is drained with the round."""
        if not self._closed and os.getpid() == self._pid:
            self._driver.cancel(list(fetches), why)

    # -- members

    def regroup(self, group: Group, deadline: float) -> None:
        """Connect to the new members, then let go of the old: so nobody who goes on takes another for dead."""
        self._check()
        driver = self._formed(group, deadline)
        self._leave("The group was formed anew.", 2.0)
        # Those speak of ranks that are others' now.
        self._heard = [event for event in self.poll(0.0) if not isinstance(event, PeerFailed)]
        self._enter(group, driver)

    def close(self, deadline: float = 5.0) -> None:
        """Abort what is under way, and cut the connections. Members that still have moves with this one lose it."""
        if not self._closed and os.getpid() == self._pid:
            self._closed = True
            self._leave("The session was closed.", deadline)
            self._lane.close()

    def _leave(self, why: str, seconds: float) -> None:
        self._end.detach()
        self._driver.close(why, seconds)

    # -- what was given

    def _check_memory(self) -> None:
        layout, staging = self._context.layout, self._context.staging
        asked = "Experts were to be moved over NCCL."
        if missing := [kind[0] for kind in layout.kinds if kind not in staging.regions]:
            raise MemoryInvalid(
                asked,
                f"The staging has no rows of {', '.join(missing)}: of that name, length and device.",
                "Make it of the layout's kinds, in memory of the same device.",
            )
        devices = sorted({kind[2] for kind in layout.kinds})
        if len(devices) > 1 or devices[0].partition(":")[0] not in self._lane.devices:
            raise MemoryInvalid(
                asked,
                f"They are on {', '.join(devices)}, and here it moves what is on one of "
                f"{', '.join(sorted(self._lane.devices))}.",
                "Give the weights of one device, or take another communicator: gloo, onesided.",
            )

    def _checked(self, subject: Fetch | Send) -> list[ExpertTensor]:
        check_move(subject, self._group, self._context.layout, self._context.staging)
        return self._tensors(subject.layer)

    def _tensors(self, layer: int) -> list[ExpertTensor]:
        """In the order in which both ends go through them: by name, as `ExpertLayout.kinds`."""
        return sorted(self._context.layout.layers[layer], key=lambda tensor: tensor.name)

    def _key(self, subject: Fetch | Send) -> Key:
        """The n-th fetch of a layer from a member in a cycle meets the n-th send there; a send knows no attempts."""
        counted = (isinstance(subject, Fetch), subject.peer, subject.cycle, subject.layer)
        turn = self._turns[counted]
        self._turns[counted] += 1
        return subject.cycle, subject.layer, turn

    def _check(self) -> None:
        if self._closed or os.getpid() != self._pid:
            true = "It is closed." if self._closed else "It belongs to the process that this one was forked from."
            raise Closed(f"{self!r} was used.", true, "Open another, in this process.")


def _cut(address: int, nbytes: int) -> list[Piece]:
    return [Piece(address + start, min(PIECE, nbytes - start)) for start in range(0, nbytes, PIECE)]


def chosen(options: NcclOptions, layout: ExpertLayout) -> Lane:
    """The lane that the options name; raises `BackendUnavailable`."""
    device = layout.kinds[0][2]
    kind = "rocm" if report("rocm").usable and not report("cuda").usable else "cuda"
    found = find(kind)
    complete = isinstance(found, Nccl) and found.version[:2] >= OLDEST and not found.missing
    if options.lane == "torch" or (options.lane == "auto" and not complete):
        from tensorway_nccl.torch_lane import TorchLane

        return TorchLane(device, options.timeout_s)
    if not isinstance(found, Nccl) or not complete:
        raise BackendUnavailable(
            "NCCL was to be called by itself.",
            f"No library of 2.18 or newer loads here: {found}.",
            "Install one, or set the option `lane` to torch.",
        )
    from tensorway_nccl import direct, runtime
    from tensorway_nccl.direct_lane import DirectLane

    _, _, index = device.partition(":")
    return DirectLane(direct.load(found.path), runtime.load(kind, int(index or 0)), options.max_ctas)
