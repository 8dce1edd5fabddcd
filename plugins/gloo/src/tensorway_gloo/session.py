"""The communicator `gloo`: rows of experts over connections of torch.distributed's gloo, sent and received in pairs.

Imported by `offers` when one is constructed; imports torch. Torch's default group, and every other global of
torch.distributed, is left alone: the group here is the movement's, whose ranks may be others.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import Counter
from collections.abc import Collection, Sequence
from queue import Empty
from typing import Final

import attrs
import torch

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
from tensorway.errors import Closed, MemoryInvalid
from tensorway_gloo.formation import form
from tensorway_gloo.mesh import EMPTY, Mesh, said
from tensorway_gloo.messages import Message, bounced, bytes_of, messages
from tensorway_gloo.options import GlooOptions

#: Kinds of device whose rows torch copies to host memory and back, and the host's own.
DEVICES: Final = frozenset({"cpu", "cuda", "rocm", "xpu"})
#: A tag has 31 bits: 12 of the layer, 4 of the turn, 14 of the cycle, 1 for what comes back. The last turn is never
#: taken: see `NEVER_SENT`.
_CYCLES: Final = 1 << 14
_BACK: Final = 1
_TURNS: Final = 15


def reserve(layout: ExpertLayout, staging: Staging) -> Reservation:
    """What a session takes in buffers: for all rows that can be on their way here, and as many that leave."""
    widest = max(
        bounced([tensor.row_bytes for tensor in tensors], on_host=layout.host_visible) for tensors in layout.layers
    )
    taken = 2 * staging.rows * widest
    return Reservation(host_bytes=taken) if layout.host_visible else Reservation(pinned_bytes=taken)


@attrs.define(eq=False)
class _Move:
    """A fetch or a send that is under way."""

    subject: Fetch | Send
    tag: int
    messages: list[Message]
    #: When a fetch is given up.
    until: float = float("inf")
    #: What gloo has in its hands; it goes wrong if they are dropped before it is done.
    works: list[object] = attrs.field(factory=list)
    #: Its `Failed` is out; what is left to say is `Drained`, and not even that if its rows were released.
    cancelled: bool = False
    released: bool = False


class GlooSession:
    """See `tensorway.eplb.Session`. gloo's own threads move the bytes; `poll` says what they have done."""

    control = None

    def __init__(self, options: GlooOptions, context: EplbContext) -> None:
        self.capabilities = Capabilities(
            devices=DEVICES, initiator="both", staged=not context.layout.host_visible, regroup=True
        )
        self._options = options
        self._context = context
        self._pid = os.getpid()
        self._moves: list[_Move] = []
        self._events: list[Event] = []
        self._closed = False
        if missing := [kind[0] for kind in context.layout.kinds if kind not in context.staging.regions]:
            raise MemoryInvalid(
                f"Experts with the tensors {', '.join(missing)} were to be moved.",
                "The staging has no rows of that kind: of that name, length and device.",
                "Make it of the layout's kinds: Staging(buffers, rows), Staging.on_host(layout.kinds, rows).",
            )
        self._live = [{tensor.name: bytes_of(tensor.region) for tensor in tensors} for tensors in context.layout.layers]
        self._staging = {kind: bytes_of(region) for kind, region in context.staging.regions.items()}
        self._enter(context.group, form(context.group, context.rendezvous, options, context.deadline))

    def __repr__(self) -> str:
        return f"GlooSession({self._group.path}, {self._group.name}, epoch {self._group.epoch})"

    def _enter(self, group: Group, mesh: Mesh | None) -> None:
        self._group = group
        self._mesh = mesh
        self._lost: set[int] = set()
        self._turns: Counter[tuple[bool, int, int, int]] = Counter()
        # Also at the end of a process that forgot to close: a thread that is woken by gloo later would abort it.
        self._end = weakref.finalize(self, mesh.close) if mesh else None

    # -- moves

    def warmup(self, deadline: float) -> None:
        """Nothing is left to the first use."""

    def begin(self, cycle: int, fetches: Sequence[Fetch], sends: Sequence[Send]) -> None:
        """Forget the turns of earlier cycles."""
        self._check()
        self._turns = Counter({key: turn for key, turn in self._turns.items() if key[2] >= cycle})

    def post(self, fetch: Fetch, deadline: float) -> None:
        """Receive into staging; what is small, or for an accelerator, by way of a buffer."""
        self._check()
        tensors = self._checked(fetch)

        def row(tensor: int, position: int) -> torch.Tensor:
            kind = tensors[tensor].kind
            start = fetch.rows[position] * kind[1]
            return self._staging[kind][start : start + kind[1]]

        parts = messages([tensor.row_bytes for tensor in tensors], len(fetch.rows), row)
        self._start(_Move(fetch, self._tag(fetch), parts, time.monotonic() + deadline))

    def serve(self, send: Send, deadline: float) -> None:
        """Send from the live rows, or from copies of them: until `Served` they must stay as they are."""
        self._check()
        tensors = self._checked(send)

        def row(tensor: int, position: int) -> torch.Tensor:
            start = send.slots[position] * tensors[tensor].stride
            return self._live[send.layer][tensors[tensor].name][start : start + tensors[tensor].row_bytes]

        parts = messages([tensor.row_bytes for tensor in tensors], len(send.slots), row)
        for part in parts:
            part.pack()
        self._start(_Move(send, self._tag(send), parts))

    def poll(self, seconds: float) -> list[Event]:
        """Wait for something to arrive; sleeps, and never spins. Also says what became of moves after `close`."""
        until = time.monotonic() + seconds
        if self._mesh is not None:
            self._listen(self._mesh, until)
        elif not self._events and not self._closed:
            time.sleep(max(0.0, seconds))  # alone in the group
        events, self._events = self._events, []
        return events

    def _listen(self, mesh: Mesh, until: float) -> None:
        """Settle all that has arrived; with nothing to say yet, wait for the first, or for a fetch whose time is up."""
        while True:
            fetches = [move for move in self._moves if move.until < until and not move.cancelled]
            wake = min([until, *(move.until for move in fetches)])
            left = 0.0 if self._events else max(0.0, wake - time.monotonic())
            try:
                self._settle(*mesh.arrived.get(left > 0, left or None))
            except Empty:
                late = [move.subject for move in fetches if move.until <= time.monotonic()]
                self.cancel([fetch for fetch in late if isinstance(fetch, Fetch)], "its deadline has passed")
                if self._events or time.monotonic() >= until:
                    return

    def cancel(self, fetches: Collection[Fetch], why: str) -> None:
        """gloo takes no receive back: rows that it fills itself are drained when they have come, or with the group."""
        for move in self._moves:
            if move.subject in fetches and isinstance(move.subject, Fetch) and not move.cancelled:
                move.cancelled = True
                move.released = not any(part.direct for part in move.messages)
                self._events.append(Failed(move.subject, why, move.released))

    # -- members

    def regroup(self, group: Group, deadline: float) -> None:
        """Connect to the new members, then let go of the old: so nobody who goes on takes another for dead."""
        self._check()
        mesh = form(group, self._context.rendezvous, self._options, deadline)
        self._leave("The group was formed anew.")
        # Those speak of ranks that are others' now.
        self._events = [event for event in self._events if not isinstance(event, PeerFailed)]
        self._enter(group, mesh)

    def close(self, deadline: float = 5.0) -> None:
        """Cut the connections. Members that still have moves with this one lose it."""
        if not self._closed and os.getpid() == self._pid:
            self._closed = True
            self._leave("The session was closed.", deadline)

    def _leave(self, why: str, seconds: float = 2.0) -> None:
        if self._end is not None:
            self._end.detach()
        if self._mesh is not None:
            self._listen(self._mesh, 0.0)
            self._mesh.close(seconds)
            self._mesh = None
        for move in self._moves:
            if isinstance(move.subject, Fetch):
                self._over(move, move.subject, why)
        self._moves = []

    # -- one move

    def _start(self, move: _Move) -> None:
        assert self._mesh is not None, "a group with a peer has a mesh"
        self._moves.append(move)
        if any(other is not move and self._same_way(move, other) for other in self._moves):
            self._mesh.arrived.put((move, f"it has not taken part in what was asked of it {_CYCLES} cycles ago"))
            return
        try:
            start = self._receive if isinstance(move.subject, Fetch) else self._send
            self._mesh.watch(move, start(self._mesh, move, move.subject.peer))
        except RuntimeError as error:  # the connection is gone, and with it what was begun on it
            self._mesh.arrived.put((move, said(error)))

    @staticmethod
    def _receive(mesh: Mesh, move: _Move, peer: int) -> object:
        """The rows, and an empty message that comes behind the last of them."""
        for part in move.messages:
            move.works.append(mesh.receive(part.tensor, peer, move.tag))
        return mesh.receive(EMPTY, peer, move.tag)

    @staticmethod
    def _send(mesh: Mesh, move: _Move, peer: int) -> object:
        """The rows, the same message, and one that comes back when all has arrived."""
        back = mesh.receive(EMPTY, peer, move.tag | _BACK)
        for part in move.messages:
            move.works.append(mesh.send(part.tensor, peer, move.tag))
        move.works.append(mesh.send(EMPTY, peer, move.tag))
        return back

    def _settle(self, move: _Move, failed: str) -> None:
        subject = move.subject
        self._moves.remove(move)
        if isinstance(subject, Fetch):
            if not failed and self._mesh is not None:
                self._mesh.tell(subject.peer, move.tag | _BACK)
            if failed or move.cancelled:
                self._over(move, subject, failed)
            else:
                for part in move.messages:
                    part.unpack()
                self._events.append(Filled(subject))
        elif not failed:
            self._events.append(Served(subject))
        if failed and subject.peer not in self._lost:
            self._lost.add(subject.peer)
            self._events.append(PeerFailed(subject.peer, failed))

    def _over(self, move: _Move, fetch: Fetch, why: str) -> None:
        """A fetch that is not filled, and that nobody writes to any more."""
        if not move.cancelled:
            self._events.append(Failed(fetch, why, released=True))
        elif not move.released:
            self._events.append(Drained(fetch))

    def _tag(self, subject: Fetch | Send) -> int:
        """The n-th fetch of a layer from a member in a cycle meets the n-th send there; a send knows no attempts."""
        key = (isinstance(subject, Fetch), subject.peer, subject.cycle, subject.layer)
        turn = self._turns[key]
        self._turns[key] += 1
        return subject.layer << 19 | turn % _TURNS << 15 | subject.cycle % _CYCLES << 1

    @staticmethod
    def _same_way(one: _Move, other: _Move) -> bool:
        same = one.tag == other.tag and one.subject.peer == other.subject.peer
        return same and type(one.subject) is type(other.subject)

    # -- what was given

    def _checked(self, subject: Fetch | Send) -> list[ExpertTensor]:
        """The layer's tensors in the order in which both ends go through them: by name, as `ExpertLayout.kinds`."""
        layout = self._context.layout
        check_move(subject, self._group, layout, self._context.staging)
        return sorted(layout.layers[subject.layer], key=lambda tensor: tensor.name)

    def _check(self) -> None:
        if self._closed or os.getpid() != self._pid:
            true = "It is closed." if self._closed else "It belongs to the process that this one was forked from."
            raise Closed(f"{self!r} was used.", true, "Open another, in this process.")
